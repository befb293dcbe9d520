"""Plain torch operations: the last resort, on any device."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rmsgd import reference
from rmsgd.backends.base import (
    FIELDS,
    MEASURED,
    NOT_FINITE,
    STATUS,
    OnCallersStream,
    RateGroup,
    RateTables,
    StepGroup,
    StepTables,
)
from rmsgd.backends.numpy_ import update_rates
from rmsgd.layers import Unfolding, as_matrix


class TorchStepper:
    """Momentum steps by torch operations, a parameter at a time."""

    def __init__(self, tables: StepTables) -> None:
        self._tables = tables

    def step(
        self, gradients: Sequence[Tensor | None], groups: Sequence[StepGroup], grad_scale: float = 1.0
    ) -> None:
        """See ``base.Stepper``."""
        t = self._tables
        eta, fresh = t.eta.tolist(), t.fresh.tolist()
        for i, (p, grad, buffer) in enumerate(zip(t.parameters, gradients, t.buffers, strict=True)):
            if grad is None:
                continue
            hyper = groups[t.groups[i]]
            wide = torch.float64 if p.dtype == torch.float64 else torch.float32
            w, g = p.detach().to(wide), grad.to(wide)
            new_w, new_v = reference.momentum_update(
                w,  # type: ignore[arg-type]  # arithmetic is arithmetic
                g if grad_scale == 1.0 else g / grad_scale,  # type: ignore[arg-type]
                w if buffer is None else buffer,  # type: ignore[arg-type]
                hyper.multiplier * eta[i],
                hyper.momentum,
                hyper.dampening,
                hyper.weight_decay,
                hyper.nesterov,
                hyper.maximize,
                fresh[i],
                hyper.velocity,
            )
            p.detach().copy_(new_w)  # type: ignore[arg-type]
            if hyper.momentum != 0.0:
                if buffer is not None:
                    buffer.copy_(new_v)  # type: ignore[arg-type]
                t.fresh[i] = False

    def step_parameters(self, groups: Sequence[StepGroup], grad_scale: float = 1.0) -> None:
        """See ``base.Stepper``; one at a time is all it knows."""


class TorchBackend(OnCallersStream):
    """Singular values by ``torch.linalg`` in float64, everything after them by the reference."""

    name = "torch"
    description = f"torch {torch.__version__}, slow"

    def stepper(self, tables: StepTables) -> TorchStepper:
        """See ``base.Backend``."""
        return TorchStepper(tables)

    def measure(self, matrices: Sequence[tuple[Tensor, Unfolding]]) -> Tensor:
        """See ``base.Backend``."""
        table = torch.full((len(matrices), FIELDS), math.nan, dtype=torch.float64)
        for row, (weight, unfolding) in zip(table, matrices, strict=True):
            matrix = as_matrix(weight.detach(), unfolding)
            if matrix.device.type == "mps":  # knows no float64
                matrix = matrix.cpu()
            matrix = matrix.double()
            largest = float(matrix.abs().max())
            if not math.isfinite(largest):
                row[STATUS] = NOT_FINITE
                continue
            gamma = singular_values(matrix, largest)
            row.copy_(self.measure_spectrum(gamma, unfolding.M))
        return table.to(matrices[0][0].device) if matrices and matrices[0][0].device.type != "mps" else table

    def measure_spectrum(self, gamma: Tensor, M: int) -> Tensor:
        """See ``base.Backend``."""
        row = reference.measure_singular_values(gamma.cpu().numpy(), len(gamma), M)
        return torch.tensor([*row, MEASURED, 2.0], dtype=torch.float64)

    def update_rates(self, tables: RateTables, groups: Sequence[RateGroup], metrics: Tensor) -> None:
        """See ``base.Backend``; computed on the host."""
        host = RateTables(*(tensor.cpu() for tensor in vars(tables).values()))
        update_rates(host, groups, metrics.cpu())
        for ours, theirs in zip(vars(tables).values(), vars(host).values(), strict=True):
            ours.copy_(theirs)


def singular_values(matrix: Tensor, largest: float) -> Tensor:
    """Singular values of a float64 matrix on its device, zero where they are numerically zero.

    ``largest`` is its largest magnitude, finite. Values at or below ``M 2^-52 gamma_1`` are zero; the
    matrix is scaled by a power of two first, so that none of its squares overflows or vanishes.
    """
    if largest == 0.0:
        return matrix.new_zeros(min(matrix.shape))
    scale = math.ldexp(1.0, math.frexp(largest)[1])
    gamma = torch.linalg.svdvals(matrix / scale)
    gamma[gamma <= max(matrix.shape) * 2.0**-52 * gamma[0]] = 0.0
    return torch.mul(gamma, scale)


def create() -> TorchBackend:
    """The backend; needs nothing but torch."""
    return TorchBackend()
