"""ONNX: the constants of a graph, from the protocol buffer itself and from the files beside it.

An exporter writes weights as initialisers, as nodes that return a constant, or into the graphs of branches.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import BinaryIO, TypeAlias

import torch
from torch import Tensor

from rmsgd.inspection.reading.file_format import Beginning, Bytes, FileFormat, OpenFile, read_range
from rmsgd.inspection.reading.stored import CheckpointError, StoredTensor, not_there

_DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.uint16,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    12: torch.uint32,
    13: torch.uint64,
    16: torch.bfloat16,
    17: torch.float8_e4m3fn,
    18: torch.float8_e4m3fnuz,
    19: torch.float8_e5m2,
    20: torch.float8_e5m2fnuz,
}
_MOST_DIMENSIONS = 64
_MOST_NESTED = 32

# Field numbers of onnx.proto.
_GRAPH = 7
_NODE, _INITIALISER = 1, 5
_OUTPUT, _OPERATOR, _ATTRIBUTE = 2, 4, 5
_TENSOR, _SUBGRAPH, _SUBGRAPHS = 5, 6, 11
_DIMS, _DATA_TYPE, _FLOAT_DATA, _NAME, _RAW_DATA, _DOUBLE_DATA, _EXTERNAL, _LOCATION = (
    1,
    2,
    4,
    8,
    9,
    10,
    13,
    14,
)
_INTEGER_DATA = (5, 7, 11)

_WITH_BRANCHES = ("If", "Loop", "Scan", "SequenceMap")
"""The operators whose attributes are graphs."""

Span: TypeAlias = tuple[int, int]
"""Where the bytes of a message begin and end in the file."""

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def _is_this(file: Beginning) -> bool:
    """Whether the version of the format comes first, then the producer's name: there is no magic number."""
    tag, version, field_ = file.bytes[:1], file.bytes[1:2], file.bytes[2:3]
    return tag == b"\x08" and b"\x00" < version < b"\x20" and field_ in (b"\x12", b"\x1a", b":")


@dataclass
class _Initialiser:
    """The content of a TensorProto, with the place of its numbers in the file."""

    name: str = ""
    dims: list[int] = field(default_factory=list)
    kind: int = 0
    data: tuple[int, int] | None = None
    listed: bool = False
    """Whether the numbers stand one by one in a field that is not read."""
    external: dict[str, str] | None = None


def _open(path: Path) -> OpenFile:
    tensors: dict[str, StoredTensor] = {}
    with path.open("rb") as file:
        for found in _constants(file, _spans(Bytes(file), _GRAPH)):
            tensors[_free_name(found.name, tensors)] = _tensor(path, found)
    return OpenFile(tensors)


def _free_name(name: str, taken: Mapping[str, object]) -> str:
    """The name, with a number where another branch has a tensor of that name."""
    names = chain([name], (f"{name}#{i}" for i in count(2)))
    return next(each for each in names if each not in taken)


def _constants(file: BinaryIO, graphs: Sequence[Span], depth: int = 0) -> Iterator[_Initialiser]:
    """The initialisers of graphs, and after them what their nodes hold."""
    if depth > _MOST_NESTED:
        raise CheckpointError(f"graphs within graphs, more than {_MOST_NESTED} deep")
    for graph in graphs:
        for begin, end in _spans(Bytes(file, *graph), _INITIALISER):
            yield _initialiser(Bytes(file, begin, end), end)
        for node in _spans(Bytes(file, *graph), _NODE):
            yield from _of_node(file, node, depth)


def _of_node(file: BinaryIO, node: Span, depth: int) -> Iterator[_Initialiser]:
    """The constant that a node returns, or the constants of its branches."""
    data, attributes, output, operator = Bytes(file, *node), [], "", ""
    for number, wire, value in _fields(data, data.end):
        if wire == _LENGTH and number in (_OUTPUT, _OPERATOR):
            text = data.take(value).decode("utf-8", "replace")
            output, operator = (text, operator) if number == _OUTPUT else (output, text)
        elif wire == _LENGTH:
            if number == _ATTRIBUTE:
                attributes.append((data.position, data.position + value))
            data.skip(value)
    for attribute in attributes:
        for begin, end in _spans(Bytes(file, *attribute), _TENSOR) if operator == "Constant" else ():
            constant = _initialiser(Bytes(file, begin, end), end)
            if len(constant.dims) > 1:  # the others are settings of other nodes: axes, shapes, limits
                yield replace(constant, name=output or constant.name)
        if operator in _WITH_BRANCHES:
            branches = _spans(Bytes(file, *attribute), _SUBGRAPH, _SUBGRAPHS)
            yield from _constants(file, branches, depth + 1)


def _spans(data: Bytes, *numbers: int) -> list[Span]:
    """Begin and end of each submessage of these field numbers, in a message that reaches to ``data.end``."""
    found = []
    for field_, wire, value in _fields(data, data.end):
        if wire == _LENGTH:
            if field_ in numbers:
                found.append((data.position, data.position + value))
            data.skip(value)
    return found


def _fields(data: Bytes, end: int) -> Iterator[tuple[int, int, int]]:
    """The number, wire type and value of each field. For a field with a length, the value is that length.

    ``data`` is then at the beginning of the field's bytes, which the caller must pass over.
    """
    while data.position < end:
        tag = _varint(data)
        field_, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            yield field_, wire, _varint(data)
        elif wire == _LENGTH:
            length = _varint(data)
            if length > end - data.position:
                raise CheckpointError("it is cut short")
            yield field_, wire, length
        elif wire in (_FIXED32, _FIXED64):
            yield field_, wire, data.number(4 if wire == _FIXED32 else 8)
        else:
            raise CheckpointError("not a protocol buffer")
    if data.position != end:
        raise CheckpointError("not a sound protocol buffer")


def _varint(data: Bytes) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = data.number(1)
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value
    raise CheckpointError("not a sound protocol buffer")


def _initialiser(data: Bytes, end: int) -> _Initialiser:
    found = _Initialiser()
    for number, wire, value in _fields(data, end):
        if number == _DIMS:
            found.dims += _packed(data, value) if wire == _LENGTH else [value]
            if len(found.dims) > _MOST_DIMENSIONS:
                raise CheckpointError("an initialiser whose shape is invalid")
        elif number == _DATA_TYPE and wire == _VARINT:
            found.kind = value
        elif number == _NAME and wire == _LENGTH:
            found.name = data.take(value).decode("utf-8", "replace")
        elif number == _EXTERNAL and wire == _LENGTH:
            key, text = _entry(data, data.position + value)
            found.external = {**(found.external or {}), key: text}
        elif number in (_RAW_DATA, _FLOAT_DATA, _DOUBLE_DATA) and wire == _LENGTH:
            found.listed |= found.data is not None
            found.data = data.position, value
            data.skip(value)
        elif wire == _LENGTH:
            found.listed |= number in _INTEGER_DATA
            data.skip(value)
        else:
            found.listed |= number in (_FLOAT_DATA, _DOUBLE_DATA, *_INTEGER_DATA)
    return found


def _packed(data: Bytes, length: int) -> list[int]:
    end = data.position + length
    values: list[int] = []
    while data.position < end and len(values) <= _MOST_DIMENSIONS:
        values.append(_varint(data))
    return values


def _entry(data: Bytes, end: int) -> tuple[str, str]:
    """A key and its text value."""
    texts = {1: "", 2: ""}
    for number, wire, value in _fields(data, end):
        if wire == _LENGTH:
            text = data.take(value)
            texts[number] = text.decode("utf-8", "replace")
    return texts[1], texts[2]


def _tensor(path: Path, found: _Initialiser) -> StoredTensor:
    shape, dtype = tuple(found.dims), _DTYPES.get(found.kind)
    if dtype is None:
        return StoredTensor(
            found.name, shape, not_there, f"ONNX type {found.kind}: packed weights, or no numbers"
        )
    size = math.prod(shape) * dtype.itemsize
    if found.external is not None:
        return StoredTensor(found.name, shape, partial(_read_external, path, found, dtype), dtype=dtype)
    if found.listed or found.data is None or found.data[1] != size:
        what = f"{str(dtype).removeprefix('torch.')}: an initialiser that is not stored as plain bytes"
        return StoredTensor(found.name, shape, not_there, what, dtype)
    return StoredTensor(found.name, shape, partial(_read, path, found.data[0], shape, dtype), dtype=dtype)


def _read(path: Path, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    data = read_range(path, start, math.prod(shape) * dtype.itemsize)
    return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(shape)


def _read_external(path: Path, found: _Initialiser, dtype: torch.dtype) -> Tensor:
    """The numbers from a file beside this one, which must lie in the same folder or below it."""
    said = found.external or {}
    location, offset = said.get("location", ""), said.get("offset", "0")
    folder = path.parent.resolve()
    other = (folder / location).resolve()
    if not location or not other.is_relative_to(folder):
        raise CheckpointError(f"{found.name} is said to lie outside the folder ({location})")
    if not other.is_file():
        raise CheckpointError(f"{found.name} is said to lie in {location}, which is not a file")
    if not offset.isdecimal() or len(offset) > 18:
        raise CheckpointError(f"{found.name} is said to lie at {offset[:40]}")
    return _read(other, int(offset), tuple(found.dims), dtype)


FORMATS = [FileFormat("an ONNX file", _is_this, _open, suffixes=(".onnx",))]
