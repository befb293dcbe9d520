"""Which network of a checkpoint is probed, and its tensors by name.

A training checkpoint is a tree of mappings: a state dict beside an optimizer's, a second network, a moving
average of the first. One network is chosen, or all that belong together, and a note names the choice.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from rmsgd.inspection.reading.pickles import StandIn
from rmsgd.inspection.reading.stored import CheckpointError, StoredTensor, in_memory
from rmsgd.inspection.reading.torch_pickles import Array, TensorSubclass

WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "models", "module", "net", "network")
"""Keys under which training scripts put a state dict beside an optimizer's; Lightning uses the first."""

_DEEPEST = 64
_MOST = 1_000_000
"""The most entries to look at: a file of a few kilobytes may nest mappings, each ten times in the next."""
_MOST_PARTS = 1000
"""The most networks in a list. A longer list is a history or a data set."""

_MOST_LISTED = 20
_MOST_CANDIDATES = 64
"""The most parts with the name of a copy. Where there are more, they are the parts of layers."""

_AVERAGES = {"ema", "teacher", "shadow", "polyak"}
_COPIES = {*_AVERAGES, "target", "swa", "avg", "averaged", "average", "momentum", "slow", "old"}
_ORIGINALS = {"teacher": ("student",), "target": ("online", "policy", "main", "student")}


@dataclass(frozen=True)
class Found:
    """The tensors of the network that is probed, by name, and a line on the other networks in the file."""

    tensors: dict[str, StoredTensor]
    notes: tuple[str, ...] = ()


def find_network(tree: Any, key: str | None = None) -> Found:
    """The tensors of a state dict, or of the state dict inside a training checkpoint.

    With ``key``, the tensors under that key or path of keys ("ema.module") are taken.

    Otherwise a mapping under one of ``WRAPPERS`` is the state dict: its keys stay as they are, and everything
    beside it is left alone. Where there is none, every tensor is taken, those of inner mappings under
    "outer.inner". A list of mappings is a mapping with the keys "0", "1" and so on. An optimizer's state dict
    (a mapping with "state" and "param_groups") holds no weights, and neither do mappings deeper than
    ``_DEEPEST``. A moving average and a teacher are copies of another network and are left out.

    Raises:
        CheckpointError: there are no weights under ``key``.
        ValueError: a mapping contains itself, or shared mappings can be reached in millions of ways.
    """
    if key is None:
        path, tensors, beside = _Search().network(tree)
    else:
        path, tensors, beside = key, _under_key(tree, key), []
    copies = copies_in(tensors)
    kept = {
        name: stored
        for name, stored in tensors.items()
        if not any(name.startswith(f"{copy}.") for copy in copies)
    }
    others = [*(f"{path}.{copy}" if path else copy for copy in copies), *beside]
    if not others:
        return Found(kept)
    heads = {name.split(".")[0] for name in kept}
    measured = path or (heads.pop() if len(heads) == 1 and "." not in copies[0] else "the rest")
    return Found(kept, (f"{measured} is measured; --key (in Python key=) chooses {' or '.join(others)}",))


def _under_key(tree: Any, key: str) -> dict[str, StoredTensor]:
    everything = _Search().flat(tree)
    prefix = f"{key}."
    there = {name.removeprefix(prefix): x for name, x in everything.items() if name.startswith(prefix)}
    if not there:
        heads = dict.fromkeys(name.split(".")[0] for name, x in everything.items() if len(x.shape) > 1)
        listed = ", ".join([*heads][:_MOST_LISTED]) + (", ..." if len(heads) > _MOST_LISTED else "")
        raise CheckpointError(f"no weights under the key {key!r}; there are {listed or 'none at all'}")
    return {name: replace(stored, name=name) for name, stored in there.items()}


def copies_in(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """The parts of a network that are a moving average or an earlier state of the rest, by their path.

    A part counts as a copy by its name, "model_ema" or "teacher", if at least half of its weights have
    the shapes of half of those beside it. For words with other meanings ("target"), the original must
    also be there by its name.
    """
    candidates: dict[str, None] = {}
    for name in tensors:
        parts = name.split(".")[:-1]
        index = next((i for i, part in enumerate(parts) if _words(part) & _COPIES), None)
        if index is not None:
            candidates[".".join(parts[: index + 1])] = None
    if len(candidates) > _MOST_CANDIDATES:
        return []
    return [path for path in candidates if _is_copy(path, tensors)]


def _is_copy(path: str, tensors: Mapping[str, StoredTensor]) -> bool:
    outer, _, part = path.rpartition(".")
    prefix = f"{outer}." if outer else ""
    beside = {
        name: stored
        for name, stored in tensors.items()
        if name.startswith(prefix) and not name.startswith(f"{path}.")
    }
    siblings = {name.removeprefix(prefix).split(".")[0] for name in beside}
    originals = siblings & _originals(part)
    if originals:
        beside = {n: x for n, x in beside.items() if n.removeprefix(prefix).split(".")[0] in originals}
    elif not _words(part) & _AVERAGES:
        return False
    mine = Counter(x.shape for n, x in tensors.items() if n.startswith(f"{path}.") and len(x.shape) > 1)
    theirs = Counter(x.shape for x in beside.values() if len(x.shape) > 1)
    shared = (mine & theirs).total()
    return shared > 0 and 2 * shared >= mine.total() and 2 * shared >= theirs.total()


def _words(part: str) -> set[str]:
    return {word.lower() for word in re.split(r"[_\-]|(?<=[a-z])(?=[A-Z])", part)}


def _originals(part: str) -> set[str]:
    """The possible names of the original: "model" for "model_ema", "student" for "teacher"."""
    names = set()
    for word in _words(part) & _COPIES:
        without = re.sub(rf"_?{word}_?", "", part, flags=re.IGNORECASE)
        names |= {without} if without else set()
        names |= {re.sub(word, other, part, flags=re.IGNORECASE) for other in _ORIGINALS.get(word, ())}
    return names


class _Search:
    """One search through mappings. The mappings that contain a mapping are its ``outer``."""

    def __init__(self) -> None:
        self._seen = 0

    def network(
        self, tree: Any, outer: tuple[Any, ...] = ()
    ) -> tuple[str, dict[str, StoredTensor], list[str]]:
        """The path of the state dict, its tensors, and the paths of other networks beside it."""
        inside = self._enter(tree, outer)
        entries = _entries(tree) or {}
        # The attribute "model" of an object is a part of it.
        for key in () if isinstance(tree, StandIn) or len(outer) == _DEEPEST else WRAPPERS:
            if _entries(entries.get(key)) is None:
                continue
            path, tensors, beside = self.network(entries[key], inside)
            if tensors:
                path = f"{key}.{path}" if path else key
                return path, tensors, [*(f"{key}.{other}" for other in beside), *_others(entries, key)]
        return "", self.flat(tree), []

    def flat(self, tree: Any) -> dict[str, StoredTensor]:
        """Every tensor by its path."""
        return {name: replace(stored, name=name) for name, stored in self._flatten(tree, "", ())}

    def _flatten(self, tree: Any, prefix: str, outer: tuple[Any, ...]) -> Iterator[tuple[str, StoredTensor]]:
        inside = self._enter(tree, outer)
        entries = _entries(tree) or {}
        if "state" in entries and "param_groups" in entries:
            return
        for key, value in entries.items():
            if isinstance(value, TensorSubclass) and value.parts:
                # torchao and similar packages flatten a tensor of their own into those that it is made of.
                for attribute, part in value.parts.items():
                    yield f"{prefix}{_hidden(str(key))}_{attribute}", part
            elif (leaf := _leaf(value)) is not None:
                yield f"{prefix}{key}", leaf
            elif len(outer) < _DEEPEST and _entries(value) is not None:
                yield from self._flatten(value, f"{prefix}{key}.", inside)

    def _enter(self, tree: Any, outer: tuple[Any, ...]) -> tuple[Any, ...]:
        """The mappings that ``tree`` lies in, with ``tree`` appended."""
        if any(tree is mapping for mapping in outer):
            raise ValueError("a mapping holds itself")
        self._seen += len(_entries(tree) or ()) + 1
        if self._seen > _MOST:
            raise ValueError(f"more than {_MOST:,} entries in mappings inside each other")
        return (*outer, tree)


def _hidden(key: str) -> str:
    """The beginning of the keys of a tensor's parts: "0._weight" for "0.weight"."""
    outer, dot, name = key.rpartition(".")
    return f"{outer}{dot}_{name}"


def _others(entries: Mapping[Any, Any], chosen: str) -> list[str]:
    """The keys beside ``chosen`` that have a network of their own under them."""
    found = []
    for key, value in entries.items():
        if key == chosen or _entries(value) is None or str(key).lower().startswith("optim"):
            continue
        try:
            tensors = _Search().flat(value)
        except ValueError:  # such an entry is left alone
            continue
        if any(len(stored.shape) > 1 for stored in tensors.values()):
            found.append(str(key))
    return found


def _leaf(value: Any) -> StoredTensor | None:
    """A tensor or an array of any kind, as a stored tensor; None for anything else."""
    if isinstance(value, StoredTensor):
        return value
    if isinstance(value, Tensor | np.ndarray):
        return in_memory(value)
    if isinstance(value, Array | TensorSubclass):
        return value.as_stored()
    return None


def _entries(value: Any) -> Mapping[Any, Any] | None:
    """The entries of a mapping, a list of mappings or an object in a pickle, by name; else None."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, list | tuple):
        parts = 0 < len(value) <= _MOST_PARTS and any(isinstance(x, Mapping | StandIn) for x in value)
        return {str(index): part for index, part in enumerate(value)} if parts else None
    return _of_object(value) if isinstance(value, StandIn) else None


def _of_object(value: StandIn) -> Mapping[Any, Any]:
    """The entries of an object in a pickle; for a module its parameters, its buffers and its modules."""
    state = value.state[0] if isinstance(value.state, tuple) and value.state else value.state
    state = state if isinstance(state, dict) else {}
    parameters, buffers, modules = (state.get(name) for name in ("_parameters", "_buffers", "_modules"))
    if not (isinstance(parameters, dict) and isinstance(buffers, dict) and isinstance(modules, dict)):
        return {**(value.items or {}), **state}
    passing = state.get("_non_persistent_buffers_set")
    kept = {
        key: replace(buffer, role="buffer") if isinstance(buffer, StoredTensor) else buffer
        for key, buffer in buffers.items()
        if not isinstance(passing, list) or key not in passing
    }
    return {**parameters, **kept, **modules}
