"""What can be probed: a module, a mapping of tensors, or a checkpoint."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from rmsgd.inspection.reading.checkpoints import open_checkpoint
from rmsgd.inspection.reading.stored import Source, StoredTensor, as_tensor, find_weights, stored_tensors


def open_source(source: nn.Module | Mapping[str, Any] | str | os.PathLike[str]) -> Source:
    """The tensors of a module, of a mapping of names to tensors or NumPy arrays, or of a path.

    Raises:
        TypeError: it is none of these.
        CheckpointError: see ``open_checkpoint``.
        ValueError: a mapping holds itself.
    """
    if isinstance(source, nn.Module):
        return Source(tuple(_of_module(source)))
    if isinstance(source, Mapping):
        weights = find_weights(source)
        return Source(tuple(stored_tensors(weights, lambda name: as_tensor(weights[name]))))
    if isinstance(source, str | os.PathLike):
        return open_checkpoint(source)
    raise TypeError(
        "source must be a torch.nn.Module, a mapping of names to tensors or NumPy arrays, or a path, "
        f"got {type(source).__name__}"
    )


def _of_module(module: nn.Module) -> Iterator[StoredTensor]:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, value in parameters.items():
        if nn.parameter.is_lazy(value):
            yield StoredTensor(name, (), lambda: torch.empty(0), "not initialised yet (a lazy module)")
    ready = {name: value for name, value in parameters.items() if not nn.parameter.is_lazy(value)}
    yield from stored_tensors(ready, lambda name: ready[name].detach())
    for name, buffer in module.named_buffers():
        # A quantised module keeps its weights in buffers: they are listed, not passed over.
        if buffer.ndim > 1:
            yield StoredTensor(name, tuple(buffer.shape), buffer.detach, "a buffer, not a parameter")
