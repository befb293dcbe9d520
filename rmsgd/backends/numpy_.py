"""The reference as a backend: its functions as they are, or compiled by numba."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmsgd import reference
from rmsgd.backends.base import (
    FIELDS,
    MEASURED,
    NOT_FINITE,
    NUCLEAR,
    STABLE_RANK,
    STATUS,
    OnCallersStream,
    RateGroup,
    RateTables,
    StepGroup,
    StepTables,
)
from rmsgd.layers import Unfolding, as_matrix


class NumpyStepper:
    """Momentum steps by a function ``update(w, grad, v, eta, ...) -> (w, v)`` on flat arrays."""

    def __init__(self, tables: StepTables, update: Callable[..., tuple[Any, Any]]) -> None:
        self._tables = tables
        self._update = update

    def step(
        self, gradients: Sequence[Tensor | None], groups: Sequence[StepGroup], grad_scale: float = 1.0
    ) -> None:
        """See ``base.Stepper``."""
        t = self._tables
        eta, fresh = t.eta.tolist(), t.fresh.tolist()
        for i, (p, grad, buffer) in enumerate(zip(t.parameters, gradients, t.buffers, strict=True)):
            if grad is None or p.numel() == 0:
                continue
            hyper = groups[t.groups[i]]
            # Half types have no NumPy arithmetic of their own worth having: one conversion each way.
            wide = torch.float64 if p.dtype == torch.float64 else torch.float32
            w = _flat(p.detach()).to(wide).numpy()
            g = _flat(grad).to(wide).numpy()
            if grad_scale != 1.0:
                g = g / w.dtype.type(grad_scale)
            v = w if buffer is None else _flat(buffer).numpy()
            scalars = [hyper.multiplier * eta[i], hyper.momentum, hyper.dampening, hyper.weight_decay]
            new_w, new_v = self._update(
                w,
                g,
                v,
                *(w.dtype.type(scalar) for scalar in scalars),
                hyper.nesterov,
                hyper.maximize,
                fresh[i],
                hyper.velocity,
            )
            _flat(p.detach()).copy_(torch.from_numpy(new_w))
            if hyper.momentum != 0.0:
                if buffer is not None:
                    _flat(buffer).copy_(torch.from_numpy(new_v))
                t.fresh[i] = False

    def step_parameters(self, groups: Sequence[StepGroup], grad_scale: float = 1.0) -> None:
        """See ``base.Stepper``; one at a time is all it knows."""


def _flat(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in the order they lie in memory, as a view."""
    return torch.as_strided(tensor, (tensor.numel(),), (1,))


class NumpyBackend(OnCallersStream):
    """The reference's functions: ``measure`` for EVBMF with metrics, ``update`` for the step."""

    def __init__(
        self,
        name: str,
        description: str,
        measure: Callable[..., tuple[float, ...]],
        update: Callable[..., Any],
    ) -> None:
        self.name = name
        self.description = description
        self._measure = measure
        self._update = update

    def stepper(self, tables: StepTables) -> NumpyStepper:
        """See ``base.Backend``."""
        return NumpyStepper(tables, self._update)

    def measure(self, matrices: Sequence[tuple[Tensor, Unfolding]]) -> Tensor:
        """See ``base.Backend``: a float64 SVD of every matrix."""
        table = torch.full((len(matrices), FIELDS), math.nan, dtype=torch.float64)
        for row, (weight, unfolding) in zip(table, matrices, strict=True):
            matrix = as_matrix(weight.detach(), unfolding).double().numpy()
            if not np.isfinite(matrix).all():
                row[STATUS] = NOT_FINITE
                continue
            gamma = torch.from_numpy(reference.singular_values(matrix))
            row.copy_(self.measure_spectrum(gamma, unfolding.M))
        return table

    def measure_spectrum(self, gamma: Tensor, M: int) -> Tensor:
        """See ``base.Backend``."""
        row = self._measure(gamma.numpy(), len(gamma), M)
        return torch.tensor([*row, MEASURED, 2.0], dtype=torch.float64)

    def update_rates(self, tables: RateTables, groups: Sequence[RateGroup], metrics: Tensor) -> None:
        """See ``base.Backend``."""
        update_rates(tables, groups, metrics)


def update_rates(tables: RateTables, groups: Sequence[RateGroup], metrics: Tensor) -> None:
    """``reference.update_rates`` on a table of metrics; everything on the CPU."""
    t = tables
    reference.update_rates(
        t.parameter.numpy(),
        t.group.numpy(),
        t.spectrum_begin.numpy(),
        t.weight.numpy(),
        t.stable_rank.numpy(),
        t.ready.numpy(),
        t.eta.numpy(),
        t.follower.numpy(),
        t.leader.numpy(),
        t.follower_lr.numpy(),
        groups,
        metrics[:, STABLE_RANK].numpy(),
        metrics[:, NUCLEAR].numpy(),
    )
