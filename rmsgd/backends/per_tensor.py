"""A stepper for backends without a fused step, which takes one parameter after the other."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rmsgd.backends.base import HostStepper, StepGroup, StepTables, buffer_dtype

Update = Callable[[Tensor, Tensor, Tensor, float, StepGroup, bool], tuple[Tensor, Tensor]]
"""From ``(w, grad, v, eta, hyper, fresh)`` to the new ``(w, v)``: ``reference.momentum_update`` on tensors.

w, grad and v have the dtype of the arithmetic, float64 for a float64 parameter and else float32.
"""


class OneByOneStepper(HostStepper):
    """Takes momentum steps by an ``Update`` of one parameter at a time."""

    def __init__(self, tables: StepTables, update: Update) -> None:
        self._tables = tables
        self._update = update

    def step(
        self, gradients: Sequence[Tensor | None], groups: Sequence[StepGroup], grad_scale: float = 1.0
    ) -> None:
        """See ``base.Stepper``."""
        t = self._tables
        if any(p.is_cuda for p in t.parameters[:1]) and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph would repeat today's rates: plain torch operations read them here"
            )
        eta, fresh = t.eta.tolist(), t.fresh.tolist()
        for i, (p, grad, buffer) in enumerate(zip(t.parameters, gradients, t.buffers, strict=True)):
            if grad is None or p.numel() == 0:
                continue
            hyper = groups[t.groups[i]]
            w, g = p.detach().to(buffer_dtype(p)), grad.to(buffer_dtype(p))
            if grad_scale != 1.0:
                g = g / grad_scale
            v = w if buffer is None else buffer
            new_w, new_v = self._update(w, g, v, hyper.multiplier * eta[i], hyper, fresh[i])
            p.detach().copy_(new_w)
            if hyper.momentum != 0.0:
                if buffer is not None:
                    buffer.copy_(new_v)
                t.fresh[i] = False
