"""The CUDA kernels, compiled when the package was installed (``rmsgd._cuda``) or at run time (``cupy_``)."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from rmsgd.backends.base import (
    FIELDS,
    MEASURED,
    NEEDS_SVD,
    NOISE_VARIANCE,
    NOT_FINITE,
    STAGE,
    STATUS,
    SVD_STAGE,
    BackendUnavailable,
    RateGroup,
    RateTables,
    StepTables,
    Values,
)
from rmsgd.backends.cuda_spectra import LARGEST, Matrix, SpectraPlan, workspace_bytes
from rmsgd.backends.cuda_step import CudaStepper
from rmsgd.backends.kernels import TEAM_SHARED, Kernels, upload
from rmsgd.backends.streams import Streams, check_not_capturing, named_range
from rmsgd.backends.svd import double_matrix, gram_singular_values, singular_values
from rmsgd.element_types import rounding
from rmsgd.layers import as_matrix

WORKSPACE_BYTES = 224 * 2**20
"""The most bytes of workspace of a batch of matrices; half of that when memory is short."""

_KEPT_PLANS = 8
_RATES_THREADS = 256
_VALUES_THREADS = 32

_RATE_GROUP = np.dtype(
    [
        ("initial_lr", "f8"),
        ("beta", "f8"),
        ("zeta", "f8"),
        ("decay", "f8"),
        ("floor", "f8"),
        ("anchor", "f8"),
        ("lowest", "f8"),
        ("highest", "f8"),
        ("column", "i4"),
        ("holds", "i4"),
        ("rule", "i4"),
        ("first", "i4"),
    ]
)
_RATE_POINTERS = (
    *("parameter", "group", "spectrum_begin", "weight", "groups"),
    *("stable_rank", "ready", "unbounded", "eta"),
)
_FOLLOWER_POINTERS = ("follower", "leader", "follower_group")
_RATE_TABLES = np.dtype(
    [
        ("layers", "i4"),
        *((name, "u8") for name in _RATE_POINTERS),
        ("followers", "i4"),
        *((name, "u8") for name in _FOLLOWER_POINTERS),
    ],
    align=True,
)
_RATES_ARGUMENTS = np.dtype(
    [("tables", _RATE_TABLES), ("metrics", "u8"), ("measured", "u8"), ("held", "u8")], align=True
)
_VALUES_ARGUMENTS = np.dtype(
    [
        *((name, "u8") for name in ("values", "scratch", "row")),
        *((name, "f8") for name in ("M", "rounding")),
        *((name, "i4") for name in ("L", "singular")),
    ]
)


class CudaBackend:
    """Step, spectra with EVBMF and rules on NVIDIA GPUs, for which the host waits for nothing.

    The host waits only for matrices of more than ``LARGEST`` rows, which torch's own routine measures.
    """

    on_host = False

    def __init__(
        self,
        name: str,
        kernels: Kernels,
        description: str,
        streams: Callable[[torch.device], Streams] = Streams,
    ) -> None:
        self.name = name
        self.description = description
        self._kernels = kernels
        self._make_streams = streams
        self._streams_of: dict[torch.device, Streams] = {}
        self._plans: dict[tuple[object, ...], list[SpectraPlan]] = {}
        self._lock = Lock()  # it guards these two, since threads may have networks of their own
        self._budget = WORKSPACE_BYTES

    def _streams(self, device: torch.device) -> Streams:
        with self._lock:
            if device not in self._streams_of:
                self._streams_of[device] = self._make_streams(device)
            return self._streams_of[device]

    # -- steps -----------------------------------------------------------------------------------

    def stepper(self, tables: StepTables) -> CudaStepper:
        """See ``base.Backend``."""
        return CudaStepper(self._kernels, self._streams(tables.eta.device), tables)

    # -- epoch ends ------------------------------------------------------------------------------

    @contextmanager
    def side_stream(self, device: torch.device) -> Iterator[None]:
        """See ``base.Backend``."""
        with self._streams(device).side_stream():
            yield

    def wait_side_stream(self, device: torch.device) -> None:
        """See ``base.Backend``."""
        self._streams(device).wait_side_stream()

    def measure(self, matrices: Sequence[Matrix]) -> Tensor:
        """See ``base.Backend``.

        Within ``side_stream`` the Gram matrices are formed on the caller's stream and the rest beside it.
        Weights that the fp32 Gram matrix does not decide (because their singular values span more than about
        1e4) are read once more there. A weight that has changed by then gets the status ``CHANGED``.

        Raises:
            RuntimeError: a CUDA graph is being captured.
            torch.cuda.OutOfMemoryError: there is no room for the workspace of a single matrix. It says how
                much that is.
        """
        if not matrices:
            return torch.empty(0, FIELDS, dtype=torch.float64)
        device = matrices[0][0].device
        check_not_capturing((weight for weight, _ in matrices), "the measurement of weights")
        streams = self._streams(device)
        small = [i for i, (_, u) in enumerate(matrices) if u.L <= LARGEST]
        table = torch.empty(len(matrices), FIELDS, dtype=torch.float64, device=device)
        if small:
            self._measure_small([matrices[i] for i in small], streams, table, small)
        streams.side_waits()
        for i, (weight, u) in enumerate(matrices):
            if u.L > LARGEST:
                _warn_of_large(tuple(weight.shape))
                try:
                    table[i] = self._measure_large(weight.detach(), (weight, u))
                except torch.cuda.OutOfMemoryError:
                    raise _no_room(weight, 16 * u.L * (u.L + u.M)) from None
        return table

    def _measure_small(
        self, matrices: Sequence[Matrix], streams: Streams, table: Tensor, rows: Sequence[int]
    ) -> None:
        whole = len(rows) == len(table)
        target = table if whole else table.new_empty(len(rows), FIELDS)
        while True:
            try:
                first = 0
                with streams.caller_stream():  # where the Gram matrices read the tables
                    plans = self._plans_for(matrices)
                for plan in plans:
                    end = first + plan.count
                    plan.measure(streams, target[first:end])
                    # The caller may drop a weight that the side stream has yet to read again.
                    for weight, _ in matrices[first:end]:
                        streams.record_stream(weight)
                    first = end
                break
            except torch.cuda.OutOfMemoryError:
                largest = max(matrices, key=lambda matrix: workspace_bytes(matrix[1]))
                if self._budget <= workspace_bytes(largest[1]):
                    needed = SpectraPlan(self._kernels, [largest]).workspace_bytes
                    raise _no_room(largest[0], needed) from None
                self._budget //= 2
                self._plans.clear()
        if not whole:
            table[list(rows)] = target

    def plans(self, matrices: Sequence[Matrix]) -> list[SpectraPlan]:
        """Tables for matrices of up to ``LARGEST`` rows, as many together as the workspace has room for."""
        return [SpectraPlan(self._kernels, batch) for batch in self._batches(matrices)]

    def _plans_for(self, matrices: Sequence[Matrix]) -> list[SpectraPlan]:
        """Tables for these matrices at their current addresses, made again only when one has moved."""
        key = tuple((w.data_ptr(), w.dtype, w.shape, w.stride(), w.device, u) for w, u in matrices)
        with self._lock:
            plans = self._plans.get(key)
            if plans is None:
                if len(self._plans) >= _KEPT_PLANS:
                    self._plans.pop(next(iter(self._plans)))
                plans = self._plans[key] = self.plans(matrices)
            return plans

    def _batches(self, matrices: Sequence[Matrix]) -> Iterator[list[Matrix]]:
        batch: list[Matrix] = []
        size = 0
        for matrix in matrices:
            more = workspace_bytes(matrix[1])
            if batch and size + more > self._budget:
                yield batch
                batch, size = [], 0
            batch.append(matrix)
            size += more
        if batch:
            yield batch

    def _measure_large(self, weight: Tensor, matrix: Matrix) -> Tensor:
        """One row by torch's eigenvalue routine, from an fp64 Gram matrix; the host waits for it."""
        unfolding = matrix[1]
        A = as_matrix(weight, unfolding).double()
        largest = float(A.abs().max())
        if not math.isfinite(largest):
            row = torch.full((FIELDS,), math.nan, dtype=torch.float64, device=A.device)
            row[STATUS] = NOT_FINITE
            return row
        if largest == 0.0:
            return self.measure_spectrum(A.new_zeros(unfolding.L), unfolding.M)
        exponent = max(-1000, min(1000, math.frexp(largest)[1]))
        A = A * math.ldexp(1.0, -exponent)
        values = torch.linalg.eigvalsh(A @ A.T).flip(0)
        row = self._measure_values(values, unfolding.M, rounding(weight.dtype), singular=False)
        if row[STATUS] == NEEDS_SVD:
            gamma = singular_values(as_matrix(weight, unfolding).double(), largest, rounding(weight.dtype))
            return self.measure_spectrum(gamma, unfolding.M)
        row[NOISE_VARIANCE] = row[NOISE_VARIANCE] * math.ldexp(1.0, exponent) * math.ldexp(1.0, exponent)
        return row

    def spectra(self, matrices: Sequence[Matrix], values: Values) -> tuple[Tensor, list[Tensor]]:
        """See ``base.MeasuresSpectra``: torch's eigenvalue routine in fp64, for matrices of as many rows at
        once. The host waits for it.

        Where the rank took an SVD, so do the values.
        """
        table = self.measure(matrices)
        rows = table.tolist()
        by_gram = [row[STATUS] == MEASURED and row[STAGE] != SVD_STAGE for row in rows]
        of_gram = iter(
            gram_singular_values([matrix for matrix, so in zip(matrices, by_gram, strict=True) if so])
        )
        gammas = []
        for (weight, unfolding), row, so in zip(matrices, rows, by_gram, strict=True):
            if so:
                gammas.append(next(of_gram))
            elif row[STATUS] != MEASURED:
                gammas.append(torch.zeros(unfolding.L, dtype=torch.float64, device=weight.device))
            else:
                gammas.append(singular_values(*double_matrix(weight, unfolding), rounding(weight.dtype)))
        return table, gammas

    def measure_spectrum(self, gamma: Tensor, M: int) -> Tensor:
        """See ``base.Backend``."""
        return self._measure_values(gamma, M, 0.0, singular=True)

    def _measure_values(self, values: Tensor, M: int, rounding: float, singular: bool) -> Tensor:
        values = values.contiguous()
        L = len(values)
        scratch = values.new_empty(2 * L + 2)
        row = values.new_empty(FIELDS)
        arguments = np.zeros(1, _VALUES_ARGUMENTS)
        arguments[0] = (values.data_ptr(), scratch.data_ptr(), row.data_ptr(), M, rounding, L, singular)
        stream = self._streams(values.device).current()
        self._kernels.launch(
            "rmsgd_values", values.device.index or 0, 1, _VALUES_THREADS, 0, stream, arguments
        )
        return row

    def update_rates(self, tables: RateTables, groups: Sequence[RateGroup], metrics: Tensor) -> None:
        """See ``base.Backend``."""
        device = tables.eta.device
        streams = self._streams(device)
        layers, followers = len(tables.parameter), len(tables.follower)
        on_device = upload(np.array([tuple(group) for group in groups], _RATE_GROUP), device)
        measured = torch.empty(layers, dtype=torch.float64, device=device)
        held = torch.empty(layers, dtype=torch.int32, device=device)
        arguments = np.zeros(1, _RATES_ARGUMENTS)
        head = arguments[0]
        packed = head["tables"]
        packed["layers"], packed["followers"] = layers, followers
        for name in (*_RATE_POINTERS, *_FOLLOWER_POINTERS):
            packed[name] = (on_device if name == "groups" else getattr(tables, name)).data_ptr()
        head["metrics"] = metrics.data_ptr()
        head["measured"], head["held"] = measured.data_ptr(), held.data_ptr()
        with named_range("rmsgd: learning rates"):
            self._kernels.launch(
                "rmsgd_rates",
                device.index or 0,
                1,
                _RATES_THREADS,
                TEAM_SHARED,
                streams.current(),
                arguments,
            )
        for tensor in vars(tables).values():
            streams.record_stream(tensor)


def _no_room(weight: Tensor, needed: int) -> torch.cuda.OutOfMemoryError:
    """The error for a weight whose measurement takes ``needed`` bytes."""
    return torch.cuda.OutOfMemoryError(
        f"measuring a weight of shape {tuple(weight.shape)} takes {needed >> 20} MiB of GPU memory beside "
        "it, and there is no room: free some before epoch_step(), or leave the weight out with probe=False "
        "in its group. Weights, momentum and rates are as they were"
    )


@cache
def _warn_of_large(shape: tuple[int, ...]) -> None:
    warnings.warn(
        f"a weight of shape {shape} is measured by torch.linalg.eigvalsh, and the host waits for it: the "
        f"kernels measure matrices of up to {LARGEST} rows. probe=False in its group leaves it out",
        stacklevel=2,
    )


def create() -> CudaBackend:
    """The backend; raises BackendUnavailable where there is no GPU, no driver or no ``rmsgd._cuda``."""
    check_torch()
    try:
        from rmsgd import _cuda
    except ImportError as error:
        raise BackendUnavailable(
            f"rmsgd._cuda is not there ({error}): it is built at installation where nvcc "
            "(CUDA 12.1 or later) is found"
        ) from None
    version = f"{_cuda.CUDA_VERSION // 1000}.{_cuda.CUDA_VERSION % 1000 // 10}"
    try:
        _cuda.device_count()
        try_out(_cuda)
    except RuntimeError as error:
        reason = (
            f"{error} (kernels built by CUDA {version} for sm_{_cuda.ARCHITECTURES}): update the driver, "
            "or set RMSGD_CUDA_ARCHS for this GPU and reinstall"
        )
        warnings.warn(f"the CUDA kernels of rmsgd cannot run here: {reason}", stacklevel=2)
        raise BackendUnavailable(reason) from None
    description = f"compiled by nvcc {version} for sm_{_cuda.ARCHITECTURES}"
    return CudaBackend("cuda", _cuda, description)


def check_torch() -> None:
    """Raise BackendUnavailable where torch itself can use no NVIDIA GPU."""
    if torch.version.cuda is None:
        raise BackendUnavailable(
            "this torch is built without CUDA: install one with it, see pytorch.org/get-started"
        )
    if not torch.cuda.is_available():
        raise BackendUnavailable(
            "torch finds no CUDA device: check nvidia-smi; without a GPU or a driver nothing can run"
        )


def try_out(kernels: Kernels) -> None:
    """Load a kernel onto torch's current device; raises RuntimeError with CUDA's message if it cannot be."""
    kernels.resident_blocks("rmsgd_rates", torch.cuda.current_device(), _RATES_THREADS, TEAM_SHARED)
