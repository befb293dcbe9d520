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
    OnHost,
    RateGroup,
    RateTables,
    StepGroup,
    StepTables,
)
from rmsgd.backends.numpy_ import update_rates
from rmsgd.backends.per_tensor import OneByOneStepper
from rmsgd.layers import Unfolding, as_matrix


def _update(
    w: Tensor, grad: Tensor, v: Tensor, eta: float, hyper: StepGroup, fresh: bool
) -> tuple[Tensor, Tensor]:
    # Written for arrays, and arithmetic is arithmetic.
    return reference.momentum_update(  # type: ignore[return-value]
        w,  # type: ignore[arg-type]
        grad,  # type: ignore[arg-type]
        v,  # type: ignore[arg-type]
        eta,
        hyper.momentum,
        hyper.dampening,
        hyper.weight_decay,
        hyper.nesterov,
        hyper.maximize,
        fresh,
        hyper.velocity,
    )


class TorchBackend(OnHost):
    """Singular values by ``torch.linalg`` in float64, everything after them by the reference."""

    name = "torch"
    description = f"torch {torch.__version__}, slow"

    def stepper(self, tables: StepTables) -> OneByOneStepper:
        """See ``base.Backend``."""
        return OneByOneStepper(tables, _update)

    def measure(self, matrices: Sequence[tuple[Tensor, Unfolding]]) -> Tensor:
        """See ``base.Backend``."""
        table = torch.full((len(matrices), FIELDS), math.nan, dtype=torch.float64, device="cpu")
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
        return table

    def measure_spectrum(self, gamma: Tensor, M: int) -> Tensor:
        """See ``base.Backend``."""
        row = reference.measure_singular_values(gamma.cpu().numpy(), len(gamma), M)
        return torch.tensor([*row, MEASURED, 2.0], dtype=torch.float64, device="cpu")

    def update_rates(self, tables: RateTables, groups: Sequence[RateGroup], metrics: Tensor) -> None:
        """See ``base.Backend``."""
        update_rates(tables, groups, metrics)


def singular_values(matrix: Tensor, largest: float) -> Tensor:
    """Singular values of a float64 matrix on its device, zero where they are numerically zero.

    ``largest`` is its largest magnitude, finite. See ``scaled_singular_values``.
    """
    scale = power_of_two(largest)
    return scaled_singular_values(matrix / scale) * scale


def power_of_two(largest: float) -> float:
    """What to divide a matrix of this largest magnitude by, so that no square overflows or vanishes."""
    return math.ldexp(1.0, math.frexp(largest)[1] - 1)


def scaled_singular_values(matrix: Tensor) -> Tensor:
    """Singular values of a float64 matrix that was divided by its ``power_of_two``.

    Those at or below ``M 2^-52 gamma_1`` are zero. Rows and columns of zeros, as in a pruned weight, cost
    nothing.
    """
    gamma = matrix.new_zeros(min(matrix.shape))
    M = max(matrix.shape)
    filled = matrix != 0.0
    rows, columns = filled.any(1), filled.any(0)
    if not (rows.all() and columns.all()):
        matrix = matrix[rows][:, columns]
    gamma[: min(matrix.shape)] = torch.linalg.svdvals(matrix)
    return without_numerical_zeros(gamma, M)


def without_numerical_zeros(gamma: Tensor, M: int) -> Tensor:
    """Singular values, descending, with those at or below ``M 2^-52 gamma_1`` set to 0 in place."""
    gamma[gamma <= M * 2.0**-52 * gamma[0]] = 0.0
    return gamma


def create() -> TorchBackend:
    """The backend; needs nothing but torch."""
    return TorchBackend()
