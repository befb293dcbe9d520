"""The tensors of something that can be probed, before any is read, and how weights are found in it."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network")
"""Keys under which training scripts put a state dict beside an optimizer's (Lightning: the first)."""

_DEEPEST = 8
_MOST = 1_000_000
"""Entries looked at: a file of a few kilobytes may hold one mapping in another in another, ten times each."""


class NotMeasurableError(Exception):
    """A tensor that is no weight in plain numbers; the message says what it is."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a source, not read yet."""

    name: str
    """The key as stored."""
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    """Raises NotMeasurableError, or CheckpointError where a file cannot be read."""
    skip: str | None = None
    """Why it is not to be measured, where that is known before it is read."""


@dataclass(frozen=True)
class Source:
    """All tensors of a source in its order, and what could not be read, a line each."""

    tensors: tuple[StoredTensor, ...]
    errors: tuple[str, ...] = ()


def stored_tensors(values: Mapping[str, Any], read: Callable[[str], Tensor]) -> Iterator[StoredTensor]:
    """The entries of ``values``, tensors or arrays, which ``read`` gets by name; held is only their shape.

    One of two or more dimensions that shares its memory with an earlier one is marked as skipped.
    """
    first: dict[Hashable, str] = {}
    for name, value in values.items():
        if getattr(value, "is_nested", False):
            yield StoredTensor(name, (), partial(read, name), "a nested tensor: parts of several shapes")
            continue
        memory = _memory(value)
        earlier = name if memory is None else first.setdefault(memory, name)
        skip = None if earlier == name or value.ndim < 2 else f"tied: the same memory as {earlier}"
        yield StoredTensor(name, tuple(value.shape), partial(read, name), skip)


def _memory(value: Any) -> Hashable:
    """Where a tensor or an array lies, equal for two that are the same numbers; None: nowhere."""
    if isinstance(value, np.ndarray):
        address, strides, kind = value.__array_interface__["data"][0], value.strides, value.dtype.str
        return (address, value.shape, strides, kind) if value.size else None
    if not is_plain(value) or value.layout != torch.strided or value.is_meta or value.numel() == 0:
        return None
    return (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is torch's own kind: a subclass may keep something else in its memory."""
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer)


def as_tensor(value: Tensor | NDArray[Any]) -> Tensor:
    """An array as a tensor of the same numbers, without a copy where torch can share its memory."""
    if isinstance(value, Tensor):
        return value.detach()
    try:
        # In this machine's byte order, forward, writeable: what torch shares.
        return torch.from_numpy(np.require(value, value.dtype.newbyteorder("="), ["C", "W"]))
    except TypeError:
        raise NotMeasurableError(f"an array of {value.dtype}, which torch does not know") from None


def find_weights(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """The tensors and arrays of a state dict, or of the state dict inside a training checkpoint.

    A mapping under one of ``WRAPPERS`` is the state dict: its keys stay as they are and all beside
    it is left alone. Otherwise every tensor is taken, those of inner mappings under "outer.inner".
    An optimizer's state dict (a mapping with "state" and "param_groups") holds none, and neither does
    what lies deeper than ``_DEEPEST``.

    Raises:
        ValueError: a mapping holds itself, or mappings share others until there are millions of ways to one.
    """
    return _Search().weights(tree)


class _Search:
    """One look through mappings. Those a mapping lies in are its ``outer``."""

    def __init__(self) -> None:
        self._seen = 0

    def weights(self, tree: Mapping[Any, Any], outer: tuple[Mapping[Any, Any], ...] = ()) -> dict[str, Any]:
        inside = self._enter(tree, outer)
        for key in WRAPPERS if len(outer) < _DEEPEST else ():
            if isinstance(tree.get(key), Mapping) and (weights := self.weights(tree[key], inside)):
                return weights
        return dict(self._flatten(tree, "", ()))

    def _flatten(
        self, tree: Mapping[Any, Any], prefix: str, outer: tuple[Mapping[Any, Any], ...]
    ) -> Iterator[tuple[str, Any]]:
        inside = self._enter(tree, outer)
        if "state" in tree and "param_groups" in tree:
            return
        for key, value in tree.items():
            if isinstance(value, Tensor | np.ndarray):
                yield f"{prefix}{key}", value
            elif isinstance(value, Mapping) and len(outer) < _DEEPEST:
                yield from self._flatten(value, f"{prefix}{key}.", inside)

    def _enter(
        self, tree: Mapping[Any, Any], outer: tuple[Mapping[Any, Any], ...]
    ) -> tuple[Mapping[Any, Any], ...]:
        """``tree`` put behind the mappings it lies in."""
        if any(tree is mapping for mapping in outer):
            raise ValueError("a mapping holds itself")
        self._seen += len(tree) + 1
        if self._seen > _MOST:
            raise ValueError(f"more than {_MOST:,} entries in mappings inside each other")
        return (*outer, tree)
