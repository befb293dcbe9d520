"""safetensors files: a header in JSON, then the bytes of the tensors."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmsgd.inspection.reading.file_format import Beginning, FileFormat, OpenFile
from rmsgd.inspection.reading.natural_order import natural_order
from rmsgd.inspection.reading.stored import CheckpointError, StoredTensor

_LONGEST_HEADER = 100 << 20  # the library accepts no longer one

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": getattr(torch, "float8_e8m0fnu", None),
}


def _is_this(file: Beginning) -> bool:
    return file.bytes[8:9] == b"{" and int.from_bytes(file.bytes[:8], "little") <= _LONGEST_HEADER


class _Mapped:
    """A file that is mapped when it is needed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: Any = None

    def handle(self) -> Any:
        if self._handle is None:
            import safetensors

            self._handle = safetensors.safe_open(self._path, framework="pt")  # type: ignore[no-untyped-call]
        return self._handle

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self.handle().get_tensor(name)
        return tensor

    def release(self) -> None:
        self._handle = None


def _open(path: Path) -> OpenFile:
    mapped = _Mapped(path)
    try:
        handle = mapped.handle()
    except Exception as error:
        if trailing := _trailing_bytes(path):
            raise CheckpointError(
                f"{trailing:,} bytes follow the last tensor, which no safetensors file has: it was written "
                "over a longer one, or something was appended"
            ) from error
        raise
    tensors = {}
    for name in sorted(handle.keys(), key=natural_order):
        piece = handle.get_slice(name)
        dtype = _DTYPES.get(str(piece.get_dtype()))
        tensors[name] = StoredTensor(name, tuple(piece.get_shape()), partial(mapped.read, name), dtype=dtype)
    return OpenFile(tensors, handle.metadata() or {}, mapped.release)


def _trailing_bytes(path: Path) -> int:
    """The number of bytes behind the last tensor; 0 where it is not known."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if length > min(size, _LONGEST_HEADER):
                return 0
            header = json.loads(file.read(length))
        ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
        return max(0, size - 8 - length - int(max(ends, default=0)))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
        return 0


FORMATS = [FileFormat("a safetensors file", _is_this, _open, suffixes=(".safetensors",))]
