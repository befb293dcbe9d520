"""The reference as a backend, whose functions run as they are or compiled by numba."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmsgd import reference
from rmsgd.backends.base import FIELDS, NOT_FINITE, STATUS, StepGroup
from rmsgd.backends.by_reference import ByReference
from rmsgd.backends.per_tensor import Update
from rmsgd.element_types import rounding
from rmsgd.layers import Unfolding, as_matrix


def _on_arrays(update: Callable[..., tuple[Any, Any]]) -> Update:
    """Turn an update of flat arrays, such as ``reference.momentum_update``, into one of tensors."""

    def on_tensors(
        w: Tensor, grad: Tensor, v: Tensor, eta: float, hyper: StepGroup, fresh: bool
    ) -> tuple[Tensor, Tensor]:
        arrays = [_flat(t).numpy() for t in (w, grad, v)]
        number = arrays[0].dtype.type
        scalars = [number(x) for x in (eta, hyper.momentum, hyper.dampening, hyper.weight_decay)]
        new = update(*arrays, *scalars, hyper.nesterov, hyper.maximize, fresh, hyper.velocity)
        new_w, new_v = (torch.as_strided(torch.from_numpy(x), w.shape, w.stride()) for x in new)
        return new_w, new_v

    return on_tensors


def _flat(tensor: Tensor) -> Tensor:
    """A view of a dense tensor's elements in the order in which they lie in memory."""
    return torch.as_strided(tensor, (tensor.numel(),), (1,))


class NumpyBackend(ByReference):
    """The reference's functions: ``measure`` for EVBMF with metrics, ``update`` for the step."""

    def __init__(
        self,
        name: str,
        description: str,
        measure: Callable[..., tuple[float, ...]],
        update: Callable[..., Any],
    ) -> None:
        super().__init__(measure, _on_arrays(update))
        self.name = name
        self.description = description

    def measure(self, matrices: Sequence[tuple[Tensor, Unfolding]]) -> Tensor:
        """See ``base.Backend``. Every matrix is measured by a float64 SVD."""
        table = torch.full((len(matrices), FIELDS), math.nan, dtype=torch.float64, device="cpu")
        for row, (weight, unfolding) in zip(table, matrices, strict=True):
            matrix = as_matrix(weight.detach(), unfolding).double().numpy()
            if not np.isfinite(matrix).all():
                row[STATUS] = NOT_FINITE
                continue
            gamma = torch.from_numpy(reference.singular_values(matrix, rounding(weight.dtype)))
            row.copy_(self.measure_spectrum(gamma, unfolding.M))
        return table
