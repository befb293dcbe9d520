"""The tensors and arrays in a pickle as PyTorch, NumPy and TorchScript write them, as stored tensors."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmsgd.inspection.reading.pickles import Builders, Global, StandIn
from rmsgd.inspection.reading.stored import (
    CheckpointError,
    StoredTensor,
    as_tensor,
    in_memory,
    not_there,
)

ReadBytes = Callable[[int, int], bytearray]
"""Reads bytes of a storage, given the first and their number."""

_STORAGES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "QInt8": torch.qint8,
    "QUInt8": torch.quint8,
    "QInt32": torch.qint32,
    "Untyped": None,
}
_PLAIN = {torch.qint8: torch.int8, torch.quint8: torch.uint8, torch.qint32: torch.int32}
_MOST_DIMENSIONS = 64


@dataclass(frozen=True)
class Storage:
    """One storage of a torch file."""

    key: str
    dtype: torch.dtype | None
    """Its element type; None for a storage of bytes, whose tensor has a type of its own."""
    size: int
    """In bytes."""
    read: ReadBytes
    foreign: bool = False
    """Whether it was written on a machine with the other byte order."""


def storage_dtype(name: Any) -> torch.dtype | None:
    """The element type that a storage class such as "torch.FloatStorage" stands for; None for bytes.

    Raises:
        CheckpointError: torch has no such class.
    """
    last = name.rpartition(".")[2] if isinstance(name, Global) else ""
    kind = last.removesuffix("Storage")
    if kind not in _STORAGES or not last.endswith("Storage"):
        raise CheckpointError(f"a storage of a kind that torch does not have ({last or type(name).__name__})")
    return _STORAGES[kind]


def element_type(name: Any) -> torch.dtype | None:
    """The type that a name such as "torch.float8_e4m3fn" stands for; None where this torch lacks it."""
    found = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, Global) else None
    return found if isinstance(found, torch.dtype) else None


# -- tensors -------------------------------------------------------------------------------------


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> StoredTensor:
    if not isinstance(storage, Storage):
        return _odd("a tensor without a storage", size)
    if len(more) > 2 and more[2]:  # its numbers are the conjugates or the negatives of the stored ones
        return _odd("a lazily negated tensor", size)
    return _of_storage(storage, storage.dtype, offset, size, stride)


def _tensor_with_type(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *more: Any
) -> StoredTensor:
    found = element_type(dtype)
    if not isinstance(storage, Storage) or found is None:
        return _odd(f"{dtype}, a type that this torch does not know", size)
    return _of_storage(storage, found, offset, size, stride)


def _of_storage(
    storage: Storage, dtype: torch.dtype | None, offset: Any, size: Any, stride: Any
) -> StoredTensor:
    if dtype is None:
        return _odd("a tensor without a type", size)
    shape, steps = _integers(size), _integers(stride)
    start = _integers((offset,))[0]
    if len(shape) != len(steps):
        raise CheckpointError("a tensor with fewer strides than dimensions")
    plain = _PLAIN.get(dtype, dtype)
    count = math.prod(shape)
    extent = 1 + sum((n - 1) * step for n, step in zip(shape, steps, strict=True)) if count else 0
    if (start + extent) * plain.itemsize > storage.size:
        raise CheckpointError("a tensor that ends behind its storage")
    if count > extent:
        return StoredTensor("", shape, not_there, f"{count:,} entries that share {extent:,} numbers")

    def read() -> Tensor:
        data = storage.read(start * plain.itemsize, extent * plain.itemsize)
        width = plain.itemsize // 2 if plain.is_complex else plain.itemsize
        if storage.foreign and width > 1:
            data = bytearray(np.frombuffer(data, f"u{width}").byteswap().tobytes())
        flat = torch.frombuffer(data, dtype=plain) if data else torch.empty(0, dtype=plain)
        return flat.as_strided(shape, steps) if count else flat.reshape(shape)

    memory = (storage.key, start, shape, steps, dtype) if count else None
    return StoredTensor("", shape, read, dtype=plain, memory=memory)


def _integers(values: Any) -> tuple[int, ...]:
    """Sizes, strides or offsets, which must not be negative and not so many that they cost time."""
    if not isinstance(values, tuple | list) or len(values) > _MOST_DIMENSIONS:
        raise CheckpointError("a tensor whose shape is invalid")
    if not all(type(n) is int and 0 <= n < 2**63 for n in values):
        raise CheckpointError("a tensor whose shape is invalid")
    return tuple(values)


def _odd(what: str, size: Any) -> StoredTensor:
    """A tensor that is in the file and cannot be measured."""
    try:
        shape = _integers(size)
    except CheckpointError:
        shape = ()
    return StoredTensor("", shape, not_there, what)


def _quantised(storage: Any, offset: Any, size: Any, stride: Any, quantiser: Any, *more: Any) -> StoredTensor:
    """A tensor of torch's own quantised types: (codes - zero point) * scale, per tensor or per channel."""
    codes = _tensor(storage, offset, size, stride)
    if codes.skip or not isinstance(quantiser, tuple) or len(quantiser) < 3:
        return _odd("a quantised tensor of a kind that is not known", size)
    scheme, scale, zero, *axis = quantiser
    if scheme == "torch.per_tensor_affine" and isinstance(scale, float) and isinstance(zero, int):
        return replace(codes, dtype=torch.float32, read=lambda: (codes.read().float() - zero) * scale)
    if scheme == "torch.per_channel_affine" and axis and type(axis[0]) is int:
        parts = [part for part in (scale, zero) if isinstance(part, StoredTensor)]
        channels = codes.shape[axis[0]] if -1 < axis[0] < len(codes.shape) else -1
        if [part.shape for part in parts] == [(channels,), (channels,)]:

            def read() -> Tensor:
                along = [-1 if d == axis[0] else 1 for d in range(len(codes.shape))]
                scales, zeros = (part.read().double().reshape(along) for part in parts)
                return ((codes.read().double() - zeros) * scales).float()

            return replace(codes, dtype=torch.float32, read=read)
    return _odd("a quantised tensor of a kind that is not known", size)


def _parameter(data: Any, *more: Any) -> Any:
    return replace(data, role="parameter") if isinstance(data, StoredTensor) else data


def _sparse(layout: Any, data: Any, *more: Any) -> StoredTensor:
    size = next((part for part in data if _is_shape(part)), ()) if isinstance(data, tuple) else ()
    name = layout.args[0] if isinstance(layout, StandIn) and layout.args else layout
    return _odd(f"{str(name).removeprefix('torch.')}: sparse storage", size)


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) > 0 and all(type(n) is int for n in value)


def _meta(dtype: Any, size: Any, *more: Any) -> StoredTensor:
    return _odd("on the meta device: a shape without values", size)


def _nested(*args: Any) -> StoredTensor:
    return _odd("a nested tensor: parts of several shapes", ())


class TensorSubclass:
    """A tensor of a class of its own, as it was saved: its name, its shape and its attributes."""

    def __init__(self, name: str, shape: tuple[int, ...], attributes: dict[Any, Any]) -> None:
        self.name = name
        self.shape = shape
        self.attributes = attributes

    @property
    def parts(self) -> dict[str, StoredTensor]:
        """The attributes that are tensors."""
        return {str(k): v for k, v in self.attributes.items() if isinstance(v, StoredTensor)}

    def as_stored(self) -> StoredTensor:
        """The tensor as the report lists it where its class is not known."""
        return StoredTensor("", self.shape, not_there, f"a {self.name}, not a plain tensor")


def _of_type(function: Any, kind: Any, args: Any, state: Any) -> Any:
    """A tensor with attributes, or of a class of its own (``torch._tensor._rebuild_from_type_v2``)."""
    args = args if isinstance(args, tuple) else ()
    attributes = state if isinstance(state, dict) else {}
    if function == "torch._utils._rebuild_wrapper_subclass" and len(args) > 2:
        return TensorSubclass(str(kind), _odd("", args[2]).shape, attributes)
    builder = BUILDERS.get(function) if isinstance(function, Global) else None
    built = builder(*args) if builder else None
    if not isinstance(built, StoredTensor):
        return StandIn(str(kind), args)
    if kind in ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"):
        return built
    return TensorSubclass(str(kind), built.shape, attributes).as_stored()


def _wrapper(kind: Any, dtype: Any, size: Any, *more: Any) -> StoredTensor:
    return TensorSubclass(str(kind), _odd("", size).shape, {}).as_stored()


# -- arrays --------------------------------------------------------------------------------------


class Array:
    """A NumPy array, which a pickle makes empty first and gives its state later."""

    def __init__(self, *args: Any, state: Any = None) -> None:
        self._state = state

    @classmethod
    def of_buffer(cls, data: Any, kind: Any, shape: Any, order: Any = "C", *args: Any) -> "Array":
        """An array in the form of protocol 5, in one piece."""
        return cls(state=(1, shape, kind, order == "F", data))

    def pickled_state(self, state: Any) -> None:
        """Take the state: version, shape, type, whether it is in Fortran's order, and the bytes."""
        self._state = state

    def as_stored(self) -> StoredTensor | None:
        """The array, or None where its state is not that of an array."""
        if not isinstance(self._state, tuple) or len(self._state) != 5:
            return None
        _, size, kind, fortran, data = self._state
        shape = _odd("", size).shape
        if isinstance(data, str):  # Python 2 wrote it
            data = data.encode("latin-1", "replace")
        if not isinstance(kind, ArrayType) or not isinstance(data, bytes) or (dtype := kind.dtype()) is None:
            return StoredTensor("", shape, not_there, "an array of Python objects")
        if math.prod(shape) * dtype.itemsize != len(data):
            return StoredTensor("", shape, not_there, "an array whose bytes do not fit its shape")
        array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
        return replace(in_memory(array), read=lambda: as_tensor(array.copy()))


class ArrayType:
    """A NumPy dtype: the text that it is made from, and then its byte order."""

    def __init__(self, text: Any = "", *args: Any) -> None:
        self._text = text
        self._order = "|"

    def pickled_state(self, state: Any) -> None:
        """Take the state, whose second entry is the byte order."""
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            self._order = state[1]

    def dtype(self) -> np.dtype[Any] | None:
        """The type, if it is a type of numbers, else None."""
        text = self._text.decode("ascii", "replace") if isinstance(self._text, bytes) else self._text
        if not isinstance(text, str) or text not in ("f2", "f4", "f8", "b1", *_INTEGERS):
            return None
        return np.dtype(text).newbyteorder("=" if self._order == "|" else self._order)  # type: ignore[arg-type]


_INTEGERS = [f"{sign}{width}" for sign in "iu" for width in (1, 2, 4, 8)]


# -- replacements of calls -----------------------------------------------------------------------


def _dictionary(*args: Any) -> dict[Any, Any]:
    """An OrderedDict, a Counter or a defaultdict. Its items come after it, or as pairs (Python 2)."""
    last = args[-1] if args else None
    if isinstance(last, dict):
        return last
    pairs = last if isinstance(last, list) else []
    return {p[0]: p[1] for p in pairs if isinstance(p, list | tuple) and len(p) == 2 and type(p[0]) is str}


def _listed(*args: Any) -> list[Any]:
    return list(args[0]) if args and isinstance(args[0], list | tuple) else []


def _encoded(text: Any = "", *args: Any) -> bytes:
    """``_codecs.encode``, which is how Python 3 writes bytes for Python 2."""
    return text.encode("latin-1", "replace") if isinstance(text, str) else b""


def _first(*args: Any) -> Any:
    return args[0] if args else None


def _size(*args: Any) -> tuple[Any, ...]:
    return tuple(_listed(*args))


BUILDERS: Builders = {
    "collections.OrderedDict": _dictionary,
    "collections.Counter": _dictionary,
    "collections.defaultdict": _dictionary,
    "builtins.dict": _dictionary,
    "builtins.list": _listed,
    "builtins.set": _listed,
    "builtins.frozenset": _listed,
    "__builtin__.set": _listed,
    "__builtin__.frozenset": _listed,
    "builtins.bytearray": _first,
    "_codecs.encode": _encoded,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_with_type,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
    "torch._utils._rebuild_qtensor": _quantised,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_sparse_csr_tensor": _sparse,
    "torch._utils._rebuild_meta_tensor_no_storage": _meta,
    "torch._utils._rebuild_nested_tensor": _nested,
    "torch._utils._rebuild_wrapper_subclass": _wrapper,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch._utils._rebuild_device_tensor_from_numpy": _first,
    "torch._utils._rebuild_xla_tensor": _first,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.jit._pickle.restore_type_tag": _first,
    "torch.jit._pickle.build_intlist": _listed,
    "torch.jit._pickle.build_doublelist": _listed,
    "torch.jit._pickle.build_boollist": _listed,
    "torch.jit._pickle.build_tensorlist": _listed,
    "numpy.core.multiarray._reconstruct": Array,
    "numpy._core.multiarray._reconstruct": Array,
    "numpy.core.numeric._frombuffer": Array.of_buffer,
    "numpy._core.numeric._frombuffer": Array.of_buffer,
    "numpy.ndarray": Array,
    "numpy.dtype": ArrayType,
}
