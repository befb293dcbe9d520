"""Plain torch operations, the last resort on any device."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rmsgd import reference, rules
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
from rmsgd.backends.per_tensor import OneByOneStepper
from rmsgd.backends.svd import double_matrix, singular_values
from rmsgd.element_types import rounding
from rmsgd.layers import Unfolding


def _update(
    w: Tensor, grad: Tensor, v: Tensor, eta: float, hyper: StepGroup, fresh: bool
) -> tuple[Tensor, Tensor]:
    # The reference is written for arrays, and its arithmetic works on tensors as well.
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
    """Computes singular values by ``torch.linalg`` in float64 and everything else by the reference."""

    name = "torch"
    description = f"torch {torch.__version__}, slow"

    def stepper(self, tables: StepTables) -> OneByOneStepper:
        """See ``base.Backend``."""
        return OneByOneStepper(tables, _update)

    def measure(self, matrices: Sequence[tuple[Tensor, Unfolding]]) -> Tensor:
        """See ``base.Backend``."""
        table = torch.full((len(matrices), FIELDS), math.nan, dtype=torch.float64, device="cpu")
        for row, (weight, unfolding) in zip(table, matrices, strict=True):
            matrix, largest = double_matrix(weight, unfolding)
            if not math.isfinite(largest):
                row[STATUS] = NOT_FINITE
                continue
            gamma = singular_values(matrix, largest, rounding(weight.dtype))
            row.copy_(self.measure_spectrum(gamma, unfolding.M))
        return table

    def measure_spectrum(self, gamma: Tensor, M: int) -> Tensor:
        """See ``base.Backend``."""
        row = reference.measure_singular_values(gamma.cpu().numpy(), len(gamma), M)
        return torch.tensor([*row, MEASURED, 2.0], dtype=torch.float64, device="cpu")

    def update_rates(self, tables: RateTables, groups: Sequence[RateGroup], metrics: Tensor) -> None:
        """See ``base.Backend``."""
        rules.update_rates(tables, groups, metrics)


def create() -> TorchBackend:
    """The backend; needs nothing but torch."""
    return TorchBackend()
