"""GGUF, the format of llama.cpp. Of its encodings of numbers, the plain ones and Q8_0 are read."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rmsgd.inspection.reading.file_format import Beginning, Bytes, FileFormat, OpenFile, read_range
from rmsgd.inspection.reading.stored import CheckpointError, StoredTensor, not_there

_PLAIN = {
    0: torch.float32,
    1: torch.float16,
    24: torch.int8,
    25: torch.int16,
    26: torch.int32,
    27: torch.int64,
    28: torch.float64,
    30: torch.bfloat16,
}
_Q8_0 = 8
_BLOCK = np.dtype([("scale", "<f2"), ("codes", "i1", 32)])
_NAMES = {
    **{2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K"},
    **{14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL"},
    **{21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"},
}

_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_MOST_STRINGS = 10_000_000
_MOST_DIMENSIONS = 8


def _is_this(file: Beginning) -> bool:
    return file.bytes.startswith(b"GGUF")


def _open(path: Path) -> OpenFile:
    with path.open("rb") as file:
        data = Bytes(file, 4)
        version = data.number(4)
        if version not in (2, 3):
            raise CheckpointError(f"GGUF version {version}, and versions 2 and 3 are read")
        tensors, settings = data.number(8), data.number(8)
        alignment = 32
        for _ in range(settings):
            key, kind = data.take(data.number(8)), data.number(4)
            if key == b"general.alignment" and kind == 4:
                alignment = data.number(4)
            else:
                _skip_value(data, kind)
        infos = [_info(data) for _ in range(_possible(tensors, data))]
        start = -(-data.position // alignment) * alignment if alignment else data.position
    return OpenFile({name: _tensor(path, name, shape, kind, start + at) for name, shape, kind, at in infos})


def _possible(count: int, data: Bytes) -> int:
    """A count, checked against the bytes of the file, which could not hold more."""
    if count > data.end - data.position:
        raise CheckpointError("it is cut short")
    return count


def _skip_value(data: Bytes, kind: int) -> None:
    if kind == _STRING:
        data.skip(data.number(8))
    elif kind == _ARRAY:
        kind, count = data.number(4), _possible(data.number(8), data)
        if kind in _WIDTHS:
            data.skip(count * _WIDTHS[kind])
        elif kind == _STRING and count <= _MOST_STRINGS:
            for _ in range(count):
                data.skip(data.number(8))
        else:
            raise CheckpointError("a setting of a type that GGUF does not have")
    elif kind in _WIDTHS:
        data.skip(_WIDTHS[kind])
    else:
        raise CheckpointError("a setting of a type that GGUF does not have")


def _info(data: Bytes) -> tuple[str, tuple[int, ...], int, int]:
    name = data.take(data.number(8)).decode("utf-8", "replace")
    dimensions = data.number(4)
    if dimensions > _MOST_DIMENSIONS:
        raise CheckpointError(f"{name} has {dimensions} dimensions")
    sizes = [data.number(8) for _ in range(dimensions)]
    return name, tuple(reversed(sizes)), data.number(4), data.number(8)


def _tensor(path: Path, name: str, shape: tuple[int, ...], kind: int, start: int) -> StoredTensor:
    if kind == _Q8_0 and shape and shape[-1] % 32 == 0:
        return StoredTensor(name, shape, partial(_read_blocks, path, shape, start), dtype=torch.float32)
    if kind in _PLAIN:
        read = partial(_read_plain, path, shape, start, _PLAIN[kind])
        return StoredTensor(name, shape, read, dtype=_PLAIN[kind])
    encoding = _NAMES.get(kind, f"encoding {kind}")
    return StoredTensor(name, shape, not_there, f"{encoding}: packed weights, and only Q8_0 is unpacked")


def _read_plain(path: Path, shape: tuple[int, ...], start: int, dtype: torch.dtype) -> Tensor:
    data = read_range(path, start, math.prod(shape) * dtype.itemsize)
    return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(shape)


def _read_blocks(path: Path, shape: tuple[int, ...], start: int) -> Tensor:
    """Q8_0: blocks of 32 signed bytes with a scale in half precision."""
    data = read_range(path, start, math.prod(shape) // 32 * _BLOCK.itemsize)
    blocks = np.frombuffer(data, _BLOCK)
    # Not NumPy's product: it warns of a scale that is not finite, of which the report tells by itself.
    codes, scale = (torch.from_numpy(blocks[part].astype(np.float32)) for part in ("codes", "scale"))
    return (codes * scale[:, None]).reshape(shape)


FORMATS = [FileFormat("a GGUF file", _is_this, _open, suffixes=(".gguf",))]
