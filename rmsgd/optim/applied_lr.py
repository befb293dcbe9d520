"""An optimizer's learning rates are multiplied while it steps, and at no other time.

``group["lr"]`` is the user's and the schedulers': some of them write it anew at every step, and others go on
from what they find there. So it holds the rate of a layer from the beginning of ``optimizer.step()`` to its
end, also where the step raises. torch's hooks alone cannot do that: after a step that raises, torch calls no
post hook. So ``step`` of the optimizer is wrapped, as torch's schedulers wrap it, and hooks do the same where
somebody had got hold of the step before.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import wraps
from numbers import Real
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from rmsgd.optim.options import in_short

_OURS = "_rmsgd_applied_lr"
"""The attribute of an optimizer that holds what multiplies its rates."""


class AppliedLr:
    """Multiplies ``group["lr"]`` of an optimizer's groups while it steps; takes the place of an earlier one.

    Args:
        optimizer: anything with ``param_groups`` and ``step``.
        multipliers: asked at the beginning of every step for one number per group.
    """

    def __init__(self, optimizer: Any, multipliers: Callable[[], Sequence[float]]) -> None:
        self._optimizer = optimizer
        self._multipliers = multipliers
        self._during: list[tuple[dict[str, Any], Any, Any]] = []  # group, its lr, the lr of this step
        self._tensors: dict[int, Tensor] = {}
        self._watches = True
        known = _OURS in vars(optimizer)
        setattr(optimizer, _OURS, self)
        if not known:
            _hook(optimizer)
            _wrap(optimizer)

    def apply(self) -> None:
        """Multiply; once is enough.

        Raises:
            ValueError: a group has no lr, or one that is no number. Nothing has changed then.
        """
        if self._during:
            return
        groups = self._optimizer.param_groups
        check_lr(groups)
        for g, (group, factor) in enumerate(zip(groups, self._multipliers(), strict=True)):
            if factor != 1.0:
                lr = group["lr"]
                group["lr"] = self._product(g, lr, factor) if isinstance(lr, Tensor) else lr * factor
                self._during.append((group, lr, group["lr"]))

    def _product(self, g: int, lr: Tensor, factor: float) -> Tensor:
        """In a tensor of our own: groups may share theirs, and a compiled step knows the one it reads."""
        product = self._tensors.get(g)
        if product is None or product.dtype != lr.dtype or product.device != lr.device:
            product = self._tensors[g] = lr.detach().clone()
        return product.copy_(lr.detach()).mul_(factor)

    def restore(self) -> None:
        """Give every group its lr again, but for one that was given another during the step."""
        for group, lr, ours in self._during:
            if dict.get(group, "lr") is ours:
                group["lr"] = lr
        self._during = []

    @contextmanager
    def during_step(self) -> Iterator[None]:
        """Within it, the rates are multiplied, and it is seen once whether the optimizer reads them."""
        watches = self._watches and not torch.compiler.is_compiling() and _has_gradients(self._optimizer)
        with _watched(self._optimizer) if watches else nullcontext(()) as watched:
            self.apply()
            for group in watched:
                group.read = False
            try:
                yield
            finally:
                self.restore()
            self._watches &= not watches


def check_lr(groups: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError for a group without a learning rate that can be multiplied."""
    for g, group in enumerate(groups):
        lr = dict.get(group, "lr")
        if not isinstance(lr, Real | Tensor) or (isinstance(lr, Tensor) and lr.numel() != 1):
            raise ValueError(
                f'group {g}: "lr" must be a number or a tensor of one element, got {in_short(lr)}'
            )


def _wrap(optimizer: Any) -> None:
    inner = optimizer.step

    def apply_and_step(*args: Any, **kwargs: Any) -> Any:
        with getattr(optimizer, _OURS).during_step():
            return inner(*args, **kwargs)

    # Numbers that change do not belong in a graph. What is within, the step of the optimizer, does.
    uncompiled = _disable_dynamo(apply_and_step, recursive=False)

    @wraps(inner)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (uncompiled if torch.compiler.is_compiling() else apply_and_step)(*args, **kwargs)

    optimizer.step = MethodType(step, optimizer)


def _hook(optimizer: Any) -> None:
    if hasattr(optimizer, "register_step_pre_hook"):
        optimizer.register_step_pre_hook(lambda it, args, kwargs: getattr(it, _OURS).apply())
        optimizer.register_step_post_hook(lambda it, args, kwargs: getattr(it, _OURS).restore())


def _has_gradients(optimizer: Any) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


class _Watched(dict[str, Any]):
    """A parameter group that notes whether its lr is asked for."""

    read = False

    def __getitem__(self, key: str) -> Any:
        self.read |= key == "lr"
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read |= key == "lr"
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:  # whoever goes through all of it reads it; dict(group) does so too
        self.read = True
        return super().__iter__()

    def keys(self) -> Any:
        self.read = True
        return super().keys()

    def values(self) -> Any:
        self.read = True
        return super().values()

    def items(self) -> Any:
        self.read = True
        return super().items()


@contextmanager
def _watched(optimizer: Any) -> Iterator[Sequence[_Watched]]:
    """Warn if nobody asks for the lr of any group within it."""
    groups = optimizer.param_groups
    before = list(groups)
    watched = [_Watched(group) for group in before]
    groups[:] = watched
    try:
        yield watched
    finally:
        own = {id(seen): group for group, seen in zip(before, watched, strict=True)}
        for group, seen in zip(before, watched, strict=True):
            group.clear()
            group.update(dict.items(seen))
        groups[:] = [own.get(id(group), group) for group in groups]
    if not any(seen.read for seen in watched):
        warnings.warn(
            f"{type(optimizer).__name__} has taken a step without reading group['lr']: LayerRates multiplies "
            "it, and changes nothing for this optimizer",
            stacklevel=7,
        )
