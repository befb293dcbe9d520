"""What backends have in common that run the reference's formulas, on arrays or on tensors."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rmsgd import rules
from rmsgd.backends.base import MEASURED, SVD_STAGE, OnHost, RateGroup, RateTables, StepTables
from rmsgd.backends.per_tensor import OneByOneStepper, Update


class ByReference(OnHost):
    """A step, EVBMF with metrics, and rules by the reference; ``measure`` is left to the backend.

    Args:
        measure: ``reference.measure_singular_values``, or a compiled form of it.
        update: ``reference.momentum_update`` on tensors.
    """

    def __init__(self, measure: Callable[..., tuple[float, ...]], update: Update) -> None:
        self._measure = measure
        self._update = update

    def stepper(self, tables: StepTables) -> OneByOneStepper:
        """See ``base.Backend``."""
        return OneByOneStepper(tables, self._update)

    def measure_spectrum(self, gamma: Tensor, M: int) -> Tensor:
        """See ``base.Backend``."""
        row = self._measure(gamma.cpu().numpy(), len(gamma), M)
        return torch.tensor([*row, MEASURED, SVD_STAGE], dtype=torch.float64, device="cpu")

    def update_rates(self, tables: RateTables, groups: Sequence[RateGroup], metrics: Tensor) -> None:
        """See ``base.Backend``."""
        rules.update_rates(tables, groups, metrics)
