"""Plain torch operations, the last resort on any device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rmsgd import reference
from rmsgd.backends.base import StepGroup
from rmsgd.backends.by_reference import ByReference
from rmsgd.backends.svd import measure_by_svd
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


class TorchBackend(ByReference):
    """Computes singular values by ``torch.linalg`` in float64 and everything else by the reference."""

    name = "torch"
    description = f"torch {torch.__version__}, slow"

    def __init__(self) -> None:
        super().__init__(reference.measure_singular_values, _update)

    def measure(self, matrices: Sequence[tuple[Tensor, Unfolding]]) -> Tensor:
        """See ``base.Backend``."""
        table, _ = measure_by_svd(matrices, self.measure_spectrum)
        return table


def create() -> TorchBackend:
    """The backend; needs nothing but torch."""
    return TorchBackend()
