"""The compiled core on the CPU, ``rmsgd._cpu``."""

import math
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rmsgd.backends.base import (
    NEEDS_SVD,
    NOT_FINITE,
    STATUS,
    BackendUnavailable,
    HostStepper,
    OnHost,
    RateGroup,
    RateTables,
    StepGroup,
    StepTables,
    Values,
    is_aligned,
)
from rmsgd.backends.svd import double_matrix, singular_values
from rmsgd.element_types import ELEMENT_TYPES, rounding
from rmsgd.layers import Unfolding

PARTS = ("gram", "tridiagonal", "eigenvalues", "evbmf")
"""The parts of the core's time for spectra."""


class NativeStepper(HostStepper):
    """The fused step: one call for all parameters."""

    def __init__(self, core: ModuleType, tables: StepTables) -> None:
        self._tables = tables  # keeps the memory alive that the plan points to
        self._parameters = list(tables.parameters)
        written = (*tables.parameters, *(b for b in tables.buffers if b is not None))
        self._written = {t.untyped_storage().data_ptr() for t in written}
        self._plan = core.StepPlan(
            [p.data_ptr() for p in tables.parameters],
            [0 if b is None else b.data_ptr() for b in tables.buffers],
            [ELEMENT_TYPES[p.dtype] for p in tables.parameters],
            [p.numel() for p in tables.parameters],
            tables.groups,
            range(len(tables.parameters)),
            tables.eta.numpy(),
            tables.fresh.numpy(),
        )

    def step(
        self, gradients: Sequence[Tensor | None], groups: Sequence[StepGroup], grad_scale: float = 1.0
    ) -> None:
        """See ``base.Stepper``."""
        usable = [g if g is None or self._is_usable(g) else g.clone() for g in gradients]
        pointers = [0 if g is None else g.data_ptr() for g in usable]
        typed = zip(usable, self._parameters, strict=True)
        dtypes = [ELEMENT_TYPES[p.dtype if g is None else g.dtype] for g, p in typed]
        self._plan.step(pointers, groups, grad_scale, torch.get_num_threads(), dtypes)

    def _is_usable(self, gradient: Tensor) -> bool:
        """Whether the gradient is aligned and shares no memory with what the step writes."""
        return is_aligned(gradient) and gradient.untyped_storage().data_ptr() not in self._written

    def step_parameters(self, groups: Sequence[StepGroup], grad_scale: float = 1.0) -> list[int] | None:
        """See ``base.Stepper``."""
        threads = torch.get_num_threads()
        without: list[int] | None = self._plan.step_tensors(
            Tensor, self._parameters, groups, grad_scale, threads
        )
        return without


class NativeBackend(OnHost):
    """The fused step, the batched spectra with EVBMF, and the rules, as compiled code."""

    name = "native"

    def __init__(self, core: ModuleType) -> None:
        self._core = core
        self.description = f"compiled, {core.isa()} kernels"

    def stepper(self, tables: StepTables) -> NativeStepper:
        """See ``base.Backend``."""
        return NativeStepper(self._core, tables)

    def measure(self, matrices: Sequence[tuple[Tensor, Unfolding]]) -> Tensor:
        """See ``base.Backend``. The Gram matrix is used where it is accurate enough, else an SVD."""
        matrices = [(w if is_aligned(w) else w.clone(), u) for w, u in matrices]
        described = [_describe(*matrix) for matrix in matrices]
        rows = self._core.measure(described, torch.get_num_threads())
        self._complete(rows, matrices)
        return torch.from_numpy(rows)

    def spectra(
        self, matrices: Sequence[tuple[Tensor, Unfolding]], values: Values
    ) -> tuple[Tensor, list[Tensor]]:
        """See ``base.MeasuresSpectra``."""
        matrices = [(w if is_aligned(w) else w.clone(), u) for w, u in matrices]
        described = [_describe(*matrix) for matrix in matrices]
        rows, gamma = self._core.spectra(described, values, torch.get_num_threads())
        found = list(torch.split(torch.from_numpy(gamma), [u.L for _, u in matrices]))
        for i, exact in self._complete(rows, matrices).items():
            found[i] = exact
        return torch.from_numpy(rows), found

    def _complete(
        self, rows: NDArray[np.float64], matrices: Sequence[tuple[Tensor, Unfolding]]
    ) -> dict[int, Tensor]:
        """Measure by SVD what a Gram matrix does not decide, and fill in the rows of the table.

        Returns the singular values (L,) of those matrices, by their indices.
        """
        exact: dict[int, Tensor] = {}
        # Rarely any: a look at each row would cost a tenth of a small network's epoch end.
        for i in np.flatnonzero(rows[:, STATUS] == NEEDS_SVD).tolist():
            weight, unfolding = matrices[i]
            exact[i] = singular_values(*double_matrix(weight, unfolding), rounding(weight.dtype))
            rows[i] = self.measure_spectrum(exact[i], unfolding.M).numpy()
        rows[rows[:, STATUS] == NOT_FINITE, :STATUS] = math.nan
        return exact

    def seconds_by_part(self, matrices: Sequence[tuple[Tensor, Unfolding]]) -> NDArray[np.float64]:
        """Seconds (PARTS,) that the core takes to measure these matrices, part by part, summed over them."""
        described = [_describe(*matrix) for matrix in matrices]
        _, seconds = self._core.measure_parts(described, torch.get_num_threads())
        return np.asarray(seconds)

    def measure_spectrum(self, gamma: Tensor, M: int) -> Tensor:
        """See ``base.Backend``."""
        return torch.from_numpy(self._core.measure_spectrum(gamma.numpy(), M))

    def update_rates(self, tables: RateTables, groups: Sequence[RateGroup], metrics: Tensor) -> None:
        """See ``base.Backend``."""
        arrays = [tensor.numpy() for tensor in vars(tables).values()]
        self._core.update_rates(*arrays, groups, metrics.numpy())


def _describe(weight: Tensor, unfolding: Unfolding) -> tuple[object, ...]:
    """A weight in the form that the core takes: address, dtype, and sizes and strides of either side."""
    shape, strides = weight.shape, weight.stride()
    small, large = unfolding.small, unfolding.large
    return (
        weight.data_ptr(),
        ELEMENT_TYPES[weight.dtype],
        [shape[d] for d in small],
        [strides[d] for d in small],
        [shape[d] for d in large],
        [strides[d] for d in large],
    )


def create() -> NativeBackend:
    """The backend; raises BackendUnavailable where the core was not built or cannot be loaded."""
    try:
        from rmsgd import _cpu
    except ImportError as error:
        raise BackendUnavailable(
            f"rmsgd._cpu is not there ({error}): it is built at installation where a C++17 compiler is found"
        ) from None
    try:
        return NativeBackend(_cpu)
    except RuntimeError as error:  # RMSGD_ISA names an instruction set that this CPU does not have
        raise BackendUnavailable(str(error)) from None
