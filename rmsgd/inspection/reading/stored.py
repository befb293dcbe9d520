"""The tensors of something that can be probed, before any of them is read."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rmsgd.layers import is_freed


class CheckpointError(ValueError):
    """A checkpoint, or a part of one, cannot be read. The message is one line: what is wrong, and where."""


class NotMeasurableError(Exception):
    """A tensor is not a weight in plain numbers. The message says what it is."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a source, not read yet."""

    name: str
    """The key under which it is stored."""
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    """Reads it. Raises NotMeasurableError, or CheckpointError where a file cannot be read."""
    skip: str | None = None
    """Why it must not be measured, where that is known before it is read."""
    dtype: torch.dtype | None = None
    """Its dtype; None where the file's type has no counterpart in torch."""
    role: Literal["parameter", "buffer"] | None = None
    """Whether it is a parameter or a buffer; None where the source, such as a state dict, does not tell."""
    memory: Hashable = None
    """The place of its numbers, which is equal for two tensors that share them; None where it is unknown."""


@dataclass(frozen=True)
class Source:
    """All tensors of a source in its order, with errors, notes and settings."""

    tensors: tuple[StoredTensor, ...]
    errors: tuple[str, ...] = ()
    """What could not be read, one line each."""
    notes: tuple[str, ...] = ()
    """Notes for the reader of the report, one line each, such as which other networks are in the file."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings beside the tensors: a model's config.json, a safetensors file's metadata."""


def not_there() -> Tensor:
    """The ``read`` of a tensor that has no numbers to read."""
    raise NotMeasurableError("there are no numbers to read")


def mark_tied(tensors: Iterable[StoredTensor]) -> Iterator[StoredTensor]:
    """The same tensors, where one of two or more dimensions that repeats an earlier one is skipped."""
    first: dict[Hashable, str] = {}
    for stored in tensors:
        earlier = stored.name if stored.memory is None else first.setdefault(stored.memory, stored.name)
        if earlier == stored.name or len(stored.shape) < 2:
            yield stored
        else:
            yield replace(stored, skip=f"tied: the same memory as {earlier}")


# -- tensors and arrays in memory ----------------------------------------------------------------


def in_memory(value: Tensor | NDArray[Any], name: str = "") -> StoredTensor:
    """A tensor or an array of this process, of any shape, as a stored tensor."""
    role: Literal["parameter", "buffer"] | None = "parameter" if isinstance(value, nn.Parameter) else None
    if isinstance(value, np.ndarray):
        return StoredTensor(name, value.shape, lambda: as_tensor(value), memory=_address(value))
    if nn.parameter.is_lazy(value):
        return StoredTensor(name, (), not_there, "not initialised yet (a lazy module)")
    if value.is_nested:
        return StoredTensor(name, (), not_there, "a nested tensor: parts of several shapes")
    return StoredTensor(
        name,
        tuple(value.shape),
        lambda: as_tensor(value),
        dtype=value.dtype,
        role=role,
        memory=_address(value),
    )


def as_tensor(value: Tensor | NDArray[Any]) -> Tensor:
    """A tensor of the same shape and numbers, without a copy where torch can share the memory.

    A quantised tensor is turned into the numbers that it stands for. The parts of a DTensor are gathered:
    every process of its mesh must take part.

    Raises:
        NotMeasurableError: torch has no such type.
    """
    if isinstance(value, np.ndarray):
        try:
            # torch shares memory that is in this machine's byte order, has no negative strides and is
            # writeable.
            return torch.from_numpy(np.require(value, value.dtype.newbyteorder("="), ["C", "W"]))
        except TypeError:
            raise NotMeasurableError(f"an array of {value.dtype}, which torch does not know") from None
    value = value.detach()
    if is_plain(value):
        return value.dequantize() if value.is_quantized else value
    if callable(gather := getattr(value, "full_tensor", None)):  # a DTensor
        return as_tensor(gather())
    if type(value).dequantize is not Tensor.dequantize:
        try:
            return as_tensor(value.dequantize())
        except Exception:  # its package may raise anything
            return value
    return value


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor of any shape is of torch's own class. A subclass may keep anything in its memory."""
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer)


def plain_numbers(tensor: Tensor) -> Tensor:
    """The tensor itself, of any shape, if its memory holds real numbers, one for each entry.

    Raises:
        NotMeasurableError: its memory does not.
    """
    kind = str(tensor.dtype).removeprefix("torch.")
    if not is_plain(tensor):
        raise NotMeasurableError(f"a {type(tensor).__name__}, not a plain tensor")
    if tensor.layout != torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        raise NotMeasurableError(f"{layout}: sparse storage")
    if tensor.is_complex():
        raise NotMeasurableError(f"{kind}: not real")
    if tensor.is_meta:
        raise NotMeasurableError("on the meta device: a shape without values")
    if is_freed(tensor):
        raise NotMeasurableError("its memory has been freed: a shape without values")
    return tensor


def _address(value: Tensor | NDArray[Any]) -> Hashable:
    if isinstance(value, np.ndarray):
        address, strides, kind = value.__array_interface__["data"][0], value.strides, value.dtype.str
        return (address, value.shape, strides, kind) if value.size else None
    if not is_plain(value):
        return id(value)
    if value.layout != torch.strided or value.is_meta or value.numel() == 0:
        return None
    return (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
