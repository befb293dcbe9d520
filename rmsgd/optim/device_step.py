"""The mini-batch step of the parameters of one device.

The step reads the learning rates from a table that an epoch end moves (``rmsgd.optim.device_rates``). The
state of a parameter holds its past gradients, and a flag that says whether there are any. While steps are
taken the flag is kept here, where the kernels read and write it. ``write_back`` writes it to the state.
"""

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmsgd.backends import backend_for
from rmsgd.backends.base import StepGroup, StepTables, buffer_dtype, same_layout
from rmsgd.optim.distributed import is_dtensor, local, local_gradient
from rmsgd.optim.layouts import Layouts, check_apart, dense_forms
from rmsgd.optim.options import have_gradients, is_trained
from rmsgd.optim.records import ParamRecord, trained_tensors
from rmsgd.optim.state import State, buffer_key


class DeviceStep:
    """Takes the steps of all parameters of one device.

    Args:
        device: the device of the parameters that are trained.
        records: the parameters, in registration order. A frozen one is never read, and may be a tensor of any
            kind.
        groups: all parameter groups of the optimizer; ``ParamRecord.group`` is an index into them.
        states: the state of each parameter, which keeps its buffer and gets its flag ``fresh`` written back.
        eta: (parameters,) float64, the learning rate of each before its group's multiplier, on the host or
            the device, whichever the backend uses. It is read at every step.

    Raises:
        RuntimeError: two of the parameters share memory.
    """

    def __init__(
        self,
        device: torch.device,
        records: Sequence[ParamRecord],
        groups: Sequence[Mapping[str, Any]],
        states: Mapping[Tensor, State],
        eta: Tensor,
    ) -> None:
        self.device = device
        self._records = records
        self._trained, self._parameters = trained_tensors(records, device)
        self._frozen = [m.parameter for m in records if not is_trained(m.parameter)]
        self._spread = any(map(is_dtensor, self._parameters))
        self._states = [states[m.parameter] for m in records]
        self._keepers = [self._states[i] for i in self._trained]
        self._keys = [buffer_key(groups[records[i].group]) for i in self._trained]
        self._kept = [state.get(key) for state, key in zip(self._keepers, self._keys, strict=True)]
        buffers: list[Tensor | None] = [None] * len(records)
        for i, buffer in zip(self._trained, self._kept, strict=True):
            buffers[i] = None if buffer is None else local(buffer)
        fresh = [state["fresh"] for state in self._states]
        self._fresh = torch.tensor(fresh, dtype=torch.bool, device=eta.device)
        self._known_fresh = sum(fresh)  # how many flags the state holds
        own = [local(p) for p in self._parameters]
        check_apart(own, [m.name for m in records])
        self._stepped, self._copies = dense_forms(own)
        self._empty = [i for i in self._trained if self._stepped[i].numel() == 0]
        self._backend = backend_for(device)
        self._stepper = self._backend.stepper(
            StepTables(self._stepped, buffers, [m.group for m in records], eta, self._fresh)
        )
        trained = [self._parameters[i] for i in self._trained]
        self._layouts = Layouts([*trained, *(b for b in self._kept if b is not None)])

    def is_current(self) -> bool:
        """Whether parameters and buffers have the memory and layout that they had when this was made."""
        return (
            self._layouts.hold()
            and all(map(is_, map(dict.get, self._keepers, self._keys), self._kept))
            and not have_gradients(self._frozen)
        )

    def scaling(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> float | None:
        """See ``backends.base.Stepper``."""
        return self._stepper.scaling(grad_scale, found_inf)

    def check_gradients(self) -> None:
        """Raise RuntimeError for a gradient that a step cannot use."""
        for record, p in zip(self._records, self._parameters, strict=True):
            if p.grad is not None:
                _check_gradient(p.grad, record.name)

    def step(self, groups: Sequence[StepGroup], grad_scale: float) -> None:
        """Take one step along the parameters' gradients over ``grad_scale``, the factor on the loss."""
        self._take(groups, grad_scale)
        # On the host there is nothing to wait for, and wrappers may save the state by themselves.
        on_host = self._backend.on_host and self._known_fresh
        if on_host and np.count_nonzero(self._fresh.numpy()) != self._known_fresh:
            self.write_back()

    def _take(self, groups: Sequence[StepGroup], grad_scale: float) -> None:
        if not self._copies and not self._spread:
            without = self._stepper.step_parameters(groups, grad_scale)
            if without is not None:
                _mark_written(self._parameters, without)
                return
        usable: list[Tensor | None] = []
        for record, p, stepped in zip(self._records, self._parameters, self._stepped, strict=True):
            grad = p.grad
            if grad is not None:
                grad = _usable(local_gradient(grad, p), stepped, record.name)
            usable.append(grad)
        for p, dense in self._copies:
            dense.copy_(p)
        self._stepper.step(usable, groups, grad_scale)
        for i in self._empty:  # an empty shard's gradient lies on another rank, so all their flags agree
            self._fresh[i] &= usable[i] is None
        for p, dense in self._copies:
            p.copy_(dense)
        _mark_written(self._parameters, [i for i, grad in enumerate(usable) if grad is None])

    def write_back(self) -> None:
        """Write the flags to the state."""
        fresh = self._fresh.tolist()
        for state, flag in zip(self._states, fresh, strict=True):
            state["fresh"] = flag
        self._known_fresh = sum(fresh)


def _check_gradient(grad: Tensor, name: str) -> None:
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"RMSGD does not support sparse gradients, and {name} has one ({grad.layout}); "
            "use a dense gradient (sparse=False in an embedding)"
        )


def _usable(grad: Tensor, p: Tensor, name: str) -> Tensor:
    """A gradient in the form that steppers take. Scaled, it may exceed half precision and is then float32."""
    _check_gradient(grad, name)
    if grad.dtype != p.dtype:
        grad = grad.to(buffer_dtype(p))
    return same_layout(grad.resolve_neg(), p)


def _mark_written(parameters: Sequence[Tensor], without: Sequence[int]) -> None:
    """Tell autograd which parameters have changed: all but those in ``without``."""
    left_out = set(without)
    torch.autograd.graph.increment_version(
        [p for i, p in enumerate(parameters) if i not in left_out] if without else parameters
    )
