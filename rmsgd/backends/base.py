"""What a backend is, and the tables it works on.

A backend has four operations on one device: ``stepper`` for mini-batches, ``measure`` and
``measure_spectrum`` for spectra with EVBMF, and ``update_rates`` for the learning-rate rules. Two more order
these beside the caller's work: ``side_stream`` and ``wait_side_stream``.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from rmsgd.layers import Unfolding

# Columns of the metrics table, one row per matrix, float64 (csrc/evbmf/metrics.h has the same).
RANK, NOISE_VARIANCE, STABLE_RANK, CONDITION_NUMBER, NUCLEAR, STATUS, STAGE = range(7)
FIELDS = 7

# Values of STATUS.
MEASURED, NOT_FINITE, NEEDS_SVD, CHANGED = range(4)

SVD_STAGE = 2
"""The value of STAGE where it took an SVD: 0 and 1 are Gram matrices in fp32 and in fp64."""


def why_not_measured(rows: Sequence[Sequence[float]]) -> str | None:
    """Why a weight was not measured, from its rows (FIELDS,) of the metrics table; None where it was."""
    statuses = {row[STATUS] for row in rows}
    if CHANGED in statuses:
        return "changed before it was measured"
    return None if statuses <= {MEASURED} else "NaN or infinite entries"


class BackendUnavailable(RuntimeError):  # noqa: N818 - it reads as the state it reports
    """A backend cannot run here; the message says why and what to do."""


class StepGroup(NamedTuple):
    """The hyper-parameters of one parameter group at one step."""

    multiplier: float
    """The factor on eta: the group's lr over the lr it was created with. On a GPU it may be a float64 tensor
    of one element there, which is read when the step runs."""
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    velocity: bool
    """Whether past gradients are kept as a velocity (Algorithm 1) or as torch's momentum buffer."""


@dataclass(frozen=True)
class StepTables:
    """The parameters of one device, as a step needs them."""

    parameters: Sequence[Tensor]
    buffers: Sequence[Tensor | None]
    """They have the parameters' strides, and float64 for a float64 parameter, else float32."""
    groups: Sequence[int]
    """For each parameter the index of its group among those given to ``step``."""
    eta: Tensor
    """(parameters,) float64, the learning rates before the groups' multipliers."""
    fresh: Tensor
    """(parameters,) bool, true until a gradient has entered the buffer."""


class Stepper(Protocol):
    """Takes steps for one set of parameters, whose memory stays where it is."""

    def scaling(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> float | None:
        """The ``grad_scale`` of the next step, or None where an overflow skips it.

        Both arguments are tensors of one element, as ``torch.amp.GradScaler`` sets them: the factor on the
        loss, and 1 or 0. A GPU reads them when the step runs, and nothing waits for them here.
        """

    def step(
        self, gradients: Sequence[Tensor | None], groups: Sequence[StepGroup], grad_scale: float = 1.0
    ) -> None:
        """Take one momentum step, in place. Gradients are never written.

        Gradients have the parameters' shapes, strides and dtypes; those of half-precision parameters may be
        float32. They are divided by ``grad_scale``, the factor that was on the loss.
        """

    def step_parameters(self, groups: Sequence[StepGroup], grad_scale: float = 1.0) -> list[int] | None:
        """Take the step along the parameters' own ``grad``, without a Python operation for each of them.

        Returns the indices of the parameters without a gradient. Returns None where no step was taken,
        because this stepper cannot do it, or because a gradient is not in the form that ``step`` takes.
        """


class HostStepper:
    """The base of steppers that the host drives: it reads AMP's numbers and leaves the rest to ``step``."""

    def scaling(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> float | None:
        """See ``Stepper``."""
        if found_inf is not None and float(found_inf) != 0.0:
            return None
        return 1.0 if grad_scale is None else float(grad_scale)

    def step_parameters(self, groups: Sequence[StepGroup], grad_scale: float = 1.0) -> list[int] | None:
        """See ``Stepper``."""
        return None


class RateGroup(NamedTuple):
    """What one parameter group contributes to an epoch end; see ``rmsgd.rules``."""

    initial_lr: float
    beta: float
    zeta: float
    decay: float
    floor: float
    anchor: float
    lowest: float
    highest: float
    column: int
    holds: bool
    rule: int
    first: bool


@dataclass(frozen=True)
class RateTables:
    """All layers of one device in registration order, and the parameters that follow them.

    Layer l measures the rows ``[spectrum_begin[l], spectrum_begin[l + 1])`` of the metrics table,
    weighted by ``weight``. Its rule moves ``unbounded``. The rate that is applied, ``eta``, is ``unbounded``
    kept within the bounds of the layer's group. For each follower, ``leader`` is the layer whose ratio eta /
    lr0 it takes, kept within the bounds of its own group, or ``layers.MEAN_OF_ALL`` or ``layers.NO_LEADER``.
    """

    parameter: Tensor  # (layers,) int32: index into eta
    group: Tensor  # (layers,) int32
    spectrum_begin: Tensor  # (layers + 1,) int32
    weight: Tensor  # (rows,) float64
    stable_rank: Tensor  # (layers,) float64, updated
    ready: Tensor  # (layers,) int32, updated
    unbounded: Tensor  # (layers,) float64, updated
    eta: Tensor  # (parameters,) float64, updated
    follower: Tensor  # (followers,) int32: index into eta
    leader: Tensor  # (followers,) int32
    follower_group: Tensor  # (followers,) int32


class OnHost:
    """The base of backends that the host drives, under which nothing runs beside the caller's work."""

    on_host = True

    def side_stream(self, device: torch.device) -> AbstractContextManager[None]:
        """See ``Backend``."""
        return nullcontext()

    def wait_side_stream(self, device: torch.device) -> None:
        """See ``Backend``."""


OPERATIONS = ("stepper", "measure", "measure_spectrum", "update_rates", "side_stream", "wait_side_stream")
"""The methods of a ``Backend``."""

ATTRIBUTES = ("name", "description", "on_host")
"""Its attributes."""


class Backend(Protocol):
    """One implementation of the step, the spectra with EVBMF, and the learning-rate rules.

    A backend of another package derives from ``OnHost`` if the host drives it, and then needs the first four
    of ``OPERATIONS``. Its stepper derives from ``HostStepper`` and needs ``step``.
    """

    name: str
    description: str
    """A line for ``rmsgd doctor`` on what runs."""
    on_host: bool
    """Whether rates and metrics lie in the host's memory instead of on the parameters' device."""

    def stepper(self, tables: StepTables) -> Stepper:
        """A stepper for these parameters."""

    def side_stream(self, device: torch.device) -> AbstractContextManager[None]:
        """In it ``measure`` and ``update_rates`` run beside the caller's stream, and steps wait for them."""

    def wait_side_stream(self, device: torch.device) -> None:
        """Make the caller's stream wait for the side stream. Call it before results from there are read."""

    def measure(self, matrices: Sequence[tuple[Tensor, Unfolding]]) -> Tensor:
        """The metrics table (matrices, FIELDS), float64, on the matrices' device or the host.

        A matrix with a NaN or an Inf has the STATUS ``NOT_FINITE`` and NaN in every metric. A matrix that was
        written to while it was measured beside the caller's stream has the STATUS ``CHANGED`` and NaN too.
        """

    def measure_spectrum(self, gamma: Tensor, M: int) -> Tensor:
        """One row of the table from L singular values (float64, descending, numerical zeros set to 0)."""

    def update_rates(self, tables: RateTables, groups: Sequence[RateGroup], metrics: Tensor) -> None:
        """Move the learning rates by one epoch end: update ``tables`` in place from the metrics table.

        ``metrics`` is (matrices, FIELDS) float64, where ``measure`` leaves it.
        """


Values = Literal["top", "half", "bulk", "all"]
"""Which singular values are wanted beside the metrics.

"top": those above the noise threshold. "half": all, the larger half of them known to three digits. "bulk":
the same, and no metrics; where others are known worse than that, they may be 0. "all": all, as exactly as a
Gram matrix in float64 gives them.
"""


@runtime_checkable
class MeasuresSpectra(Protocol):
    """What a backend may offer too; where one does not, ``backends.spectra`` takes an SVD of every matrix."""

    def spectra(
        self, matrices: Sequence[tuple[Tensor, Unfolding]], values: Values
    ) -> tuple[Tensor, list[Tensor]]:
        """The metrics table as ``measure`` gives it, and the L singular values of every matrix.

        The values are float64 on the matrix's device, descending. Those that are not wanted are right or 0,
        and where STATUS is not ``MEASURED`` none of them has a meaning. With "bulk" the columns of the table
        before STATUS need not hold the metrics.
        """


def buffer_dtype(p: Tensor) -> torch.dtype:
    """The dtype of a parameter's buffer, and of the arithmetic that updates it."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def is_aligned(tensor: Tensor) -> bool:
    """Whether the address of a tensor of any shape is a multiple of an element's size, as kernels require."""
    return tensor.data_ptr() % tensor.element_size() == 0


def same_layout(gradient: Tensor, parameter: Tensor) -> Tensor:
    """``gradient`` with the strides of ``parameter``; the tensor itself where it has them, else a copy."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_strided(
        parameter.size(), parameter.stride(), dtype=gradient.dtype, device=gradient.device
    ).copy_(gradient)
