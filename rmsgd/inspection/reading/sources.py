"""The sources that can be probed: a module, a mapping of tensors, or a checkpoint."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rmsgd.inspection.reading.checkpoints import open_checkpoint
from rmsgd.inspection.reading.networks import find_network
from rmsgd.inspection.reading.stored import (
    CheckpointError,
    NotMeasurableError,
    Source,
    StoredTensor,
    as_tensor,
    in_memory,
    mark_tied,
    not_there,
)


def open_source(
    source: nn.Module | Mapping[str, Any] | str | os.PathLike[str], key: str | None = None
) -> Source:
    """The tensors of a module, of a mapping of names to tensors or NumPy arrays, or of a path.

    Raises:
        TypeError: ``source`` is none of these.
        CheckpointError: see ``open_checkpoint``, or there are no weights under ``key``.
        ValueError: a mapping holds itself.
    """
    if isinstance(source, nn.Module):
        return Source(tuple(mark_tied(_under(_of_module(source), key))))
    if isinstance(source, Mapping):
        found = find_network(source, key)
        return Source(tuple(mark_tied(found.tensors.values())), notes=found.notes)
    if isinstance(source, str | os.PathLike):
        return open_checkpoint(source, key)
    raise TypeError(
        "source must be a torch.nn.Module, a mapping of names to tensors or NumPy arrays, or a path, "
        f"got {type(source).__name__}"
    )


def _under(tensors: Iterator[StoredTensor], key: str | None) -> Iterator[StoredTensor]:
    """The tensors of the submodule ``key``; all of them where it is None."""
    if key is None:
        yield from tensors
        return
    there = [x for x in tensors if x.name.startswith(f"{key}.")]
    if not there:
        raise CheckpointError(f"no weights under the key {key!r}: this module has no such part")
    yield from (replace(x, name=x.name.removeprefix(f"{key}.")) for x in there)


def _of_module(module: nn.Module) -> Iterator[StoredTensor]:
    """Parameters, then buffers. A weight that a parametrization makes replaces the tensors it is made of."""
    parametrised = {
        f"{outer}.parametrizations.{name}" if outer else f"parametrizations.{name}": (outer, part, name)
        for outer, part in module.named_modules(remove_duplicate=False)
        if parametrize.is_parametrized(part)
        for name in part.parametrizations  # type: ignore[union-attr]
    }
    for name, value in module.named_parameters(remove_duplicate=False):
        path, _, last = name.rpartition(".")
        if path not in parametrised or not last.startswith("original"):
            yield in_memory(value, name)
        elif last in ("original", "original0"):
            yield _made(*parametrised[path])
    for name, buffer in module.named_buffers():
        yield replace(in_memory(buffer, name), role="buffer")


def _made(outer: str, module: nn.Module, name: str) -> StoredTensor:
    """The weight that a module's parametrizations make. It is made when it is read."""

    def read() -> Tensor:
        modes = {part: part.training for part in module.parametrizations.modules()}  # type: ignore[union-attr]
        try:
            for part in modes:
                part.training = False  # spectral_norm would take a step of its power iteration
            with torch.no_grad():
                return as_tensor(getattr(module, name))
        except Exception as error:  # the parametrization is the user's code
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise NotMeasurableError(f"its parametrization fails: {reason}") from None
        finally:
            for part, training in modes.items():
                part.training = training

    full = f"{outer}.{name}" if outer else name
    try:
        shape = tuple(read().shape)
    except NotMeasurableError as reason:
        return StoredTensor(full, (), not_there, str(reason))
    return StoredTensor(full, shape, read, role="parameter")
