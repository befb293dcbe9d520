"""An optimizer's learning rates are multiplied while it steps, and at no other time.

``group["lr"]`` belongs to the user and the schedulers: some of them write it anew at every step, and others
go on from the value that they find. So it holds the rate of a layer only from the beginning of
``optimizer.step()`` to its end, even if the step raises. torch's hooks alone cannot do that: after a step
that raises, torch calls no post hook. So ``step`` of the optimizer is wrapped, as torch's schedulers wrap it.
Hooks do the same for code that took a reference to the step before.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from numbers import Real
from types import MethodType
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from rmsgd.optim.options import in_short

_OURS = "_rmsgd_applied_lr"
"""The attribute of an optimizer that holds its ``AppliedLr``."""


class Owner(Protocol):
    """What knows the factors, one number for each group: a ``LayerRates``."""

    def _begin_step(self, captured: bool) -> Sequence[float]:
        """The factors of a step that begins now, which a CUDA graph may be capturing."""

    def _next_ratios(self) -> Sequence[float]:
        """The factors that a step would have if it began now."""


class AppliedLr:
    """Multiplies ``group["lr"]`` of an optimizer's groups while it steps; a new one replaces an earlier one.

    Args:
        optimizer: any object with ``param_groups`` and ``step``.
        owner: gives the factors. ``owner_of(optimizer)`` finds it.
    """

    def __init__(self, optimizer: Any, owner: Owner) -> None:
        self.owner = owner
        self._optimizer = optimizer
        self._active = False
        self._during: list[_Applied] = []
        self._factors: dict[int, _Factor] = {}
        self._watches = True
        known = _OURS in vars(optimizer)
        setattr(optimizer, _OURS, self)
        if not known:
            _hook(optimizer)
            _wrap(optimizer)

    def apply(self) -> None:
        """Multiply the rates, unless that has been done.

        Raises:
            ValueError: a group has no lr, or one that is not a number. Nothing has changed then.
            RuntimeError: a CUDA graph is being captured, and could not hold the rates.
        """
        if self._active:
            return
        groups = self._optimizer.param_groups
        check_lr(groups)
        on_gpu = any(isinstance(group["lr"], Tensor) and group["lr"].is_cuda for group in groups)
        factors = self.owner._begin_step(on_gpu and torch.cuda.is_current_stream_capturing())
        self._active = True
        for g, (group, factor) in enumerate(zip(groups, factors, strict=True)):
            lr = group["lr"]
            if isinstance(lr, Tensor):
                self._during.append(_multiplied(lr, self._factor(g, lr, factor)))
            elif factor != 1.0:
                group["lr"] = lr * factor
                self._during.append(_Replaced(group, lr, group["lr"]))

    def _factor(self, g: int, lr: Tensor, factor: float) -> Tensor:
        """The factor where the lr is: a CUDA graph that holds the step reads it there at every replay.

        It is written when it changes only: a graph would write at every replay what it was at the capture.
        """
        known = self._factors.get(g)
        if known is None or known.tensor.dtype != lr.dtype or known.tensor.device != lr.device:
            known = self._factors[g] = _Factor(torch.ones((), dtype=lr.dtype, device=lr.device))
        known.set(factor)
        return known.tensor

    def refresh(self) -> None:
        """Bring new multipliers to where graphs read them; waits for a GPU only if an lr is a tensor."""
        if self._factors:
            for g, factor in enumerate(self.owner._next_ratios()):
                if g in self._factors:
                    self._factors[g].set(factor)

    def restore(self) -> None:
        """Restore the lr of every group, except where the step has set another."""
        for applied in self._during:
            applied.undo()
        self._during = []
        self._active = False

    @contextmanager
    def during_step(self) -> Iterator[None]:
        """A context in which the rates are multiplied. Once it checks whether the optimizer reads them."""
        watches = self._watches and _has_gradients(self._optimizer)
        with _watched(self._optimizer) if watches else nullcontext(()) as watched:
            self.apply()
            for group in watched:
                group.read = False
            try:
                yield
            finally:
                self.restore()
            self._watches &= not watches


@dataclass
class _Factor:
    """A number in a tensor, and what it is."""

    tensor: Tensor
    value: float = 1.0

    def set(self, value: float) -> None:
        if value != self.value:
            self.tensor.fill_(value)
            self.value = value


class _Replaced(NamedTuple):
    """A number that took the place of another in a group."""

    group: dict[str, Any]
    before: Any
    during: Any

    def undo(self) -> None:
        if dict.get(self.group, "lr") is self.during:
            self.group["lr"] = self.before


class _Multiplied(NamedTuple):
    """A tensor that was multiplied in place: a compiled step knows the tensor itself."""

    lr: Tensor
    before: Tensor
    version: int

    @torch.no_grad()
    def undo(self) -> None:
        if self.lr._version == self.version:
            self.lr.copy_(self.before)


_Applied: TypeAlias = _Replaced | _Multiplied


@torch.no_grad()
def _multiplied(lr: Tensor, factor: Tensor) -> _Multiplied:
    before = lr.detach().clone()
    lr.mul_(factor)
    return _Multiplied(lr, before, lr._version)


def owner_of(optimizer: Any) -> Any:
    """The owner of the ``AppliedLr`` of an optimizer, None where it has none."""
    applied: AppliedLr | None = getattr(optimizer, _OURS, None)
    return None if applied is None else applied.owner


def check_lr(groups: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError for a group without a learning rate that can be multiplied apart from the others'."""
    owner: dict[int, int] = {}
    for g, group in enumerate(groups):
        lr = dict.get(group, "lr")
        if not isinstance(lr, Real | Tensor) or (isinstance(lr, Tensor) and lr.numel() != 1):
            raise ValueError(
                f'group {g}: "lr" must be a number or a tensor of one element, got {in_short(lr)}'
            )
        if isinstance(lr, Tensor) and owner.setdefault(id(lr), g) != g:
            raise ValueError(
                f'the groups {owner[id(lr)]} and {g} share one tensor as "lr": give each a tensor of its '
                "own, as rmsgd.layer_groups(params, lr=tensor) does"
            )


def _wrap(optimizer: Any) -> None:
    inner = optimizer.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        with _of(optimizer).during_step():
            return inner(*args, **kwargs)

    # While torch.compile traces. Numbers that change do not belong in a graph, and what is within does: so
    # this frame is left alone, the two calls are too, and the optimizer's step is compiled.
    def compiled(*args: Any, **kwargs: Any) -> Any:
        apply()
        try:
            return inner(*args, **kwargs)
        finally:
            restore()

    apply = _disable_dynamo(lambda: _of(optimizer).apply())
    restore = _disable_dynamo(lambda: _of(optimizer).restore())
    compiled = _disable_dynamo(compiled, recursive=False)

    @wraps(inner)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.compiler.is_compiling() else watched)(*args, **kwargs)

    optimizer.step = MethodType(step, optimizer)


def _hook(optimizer: Any) -> None:
    # A wrapper may have the method and no place for hooks.
    if hasattr(optimizer, "_optimizer_step_pre_hooks"):
        optimizer.register_step_pre_hook(_untraced(lambda it, args, kwargs: _of(it).apply()))
        optimizer.register_step_post_hook(_untraced(lambda it, args, kwargs: _of(it).restore()))


def _untraced(function: Callable[..., None]) -> Callable[..., None]:
    """The function, called and not traced by torch.compile, which is not imported before it is used."""
    left_alone = _disable_dynamo(function)
    return lambda *args: (left_alone if torch.compiler.is_compiling() else function)(*args)


def _of(optimizer: Any) -> AppliedLr:
    applied: AppliedLr = getattr(optimizer, _OURS)
    return applied


def _has_gradients(optimizer: Any) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


class _Watched(dict[str, Any]):
    """A parameter group that notes whether its lr is read."""

    read = False

    def __getitem__(self, key: str) -> Any:
        self.read |= key == "lr"
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read |= key == "lr"
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:  # an iteration over all of it reads the lr; so does dict(group)
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
    """A context that warns if nothing reads the lr of any group in it."""
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
