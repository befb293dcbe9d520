"""Files of torch.save before torch 1.6, and plain pickles: one pickle after the other, then the storages."""

import io
import os
from functools import partial
from pathlib import Path
from sys import byteorder
from typing import Any, BinaryIO

from rmsgd.inspection.reading import pickles
from rmsgd.inspection.reading.file_format import Beginning, FileFormat, OpenFile, read_range
from rmsgd.inspection.reading.stored import CheckpointError
from rmsgd.inspection.reading.torch_pickles import BUILDERS, ReadBytes, Storage, storage_dtype

_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")
_VERSION = 1001


def _is_torch(file: Beginning) -> bool:
    return file.bytes.startswith(b"\x80") and _MAGIC in file.bytes[:32]


def _is_pickle(file: Beginning) -> bool:
    return file.bytes.startswith(b"\x80") and not _is_torch(file)


def _open_torch(path: Path) -> OpenFile:
    with path.open("rb") as file:
        return OpenFile(_torch_file(file, partial(read_range, path)))


def _open_pickle(path: Path) -> OpenFile:
    with path.open("rb") as file:
        return OpenFile(
            pickles.load(file, _size(file), {**BUILDERS, "torch.storage._load_from_bytes": _inner})
        )


def _inner(data: Any) -> Any:
    """A storage that was pickled by itself, as in every pickle that torch did not write."""
    if not isinstance(data, bytes) or _MAGIC not in data[:32]:
        raise CheckpointError("a storage that is none")
    return _torch_file(io.BytesIO(data), lambda start, count: bytearray(data[start : start + count]))


def _torch_file(file: BinaryIO, read: ReadBytes) -> Any:
    """A file of four pickles (a number, a version, the machine, the contents), the keys, the storages."""
    size = _size(file)

    def pickle(persistent: Any = None) -> Any:
        return pickles.load(file, size - file.tell(), BUILDERS, persistent)

    if pickle() != int.from_bytes(_MAGIC, "little") or pickle() != _VERSION:
        raise CheckpointError("a file of a version that no torch reads")
    machine = pickle()
    little = machine.get("little_endian", True) if isinstance(machine, dict) else True
    foreign = (byteorder == "little") != bool(little)
    starts: dict[str, tuple[int, int]] = {}
    widths: dict[str, int] = {}

    def storage(key: Any) -> Any:
        if isinstance(key, tuple) and len(key) > 1 and key[0] == "module":
            return key[1]  # a class, beside the text of its source
        if not isinstance(key, tuple) or len(key) < 5 or key[0] != "storage" or not isinstance(key[2], str):
            raise CheckpointError("a storage that is none")
        kind, root, count = storage_dtype(key[1]), key[2], key[4]
        view = key[5] if len(key) > 5 else None
        first = 0
        if isinstance(view, tuple) and len(view) == 3:  # a part of a larger storage
            first, count = view[1], view[2]
        width = 1 if kind is None else kind.itemsize
        widths.setdefault(root, width)
        if not all(type(n) is int and 0 <= n < 2**60 for n in (first, count)):
            raise CheckpointError("a storage that is none")

        def read_part(start: int, length: int) -> bytearray:
            begin, there = starts.get(root, (0, -1))
            if first * width + start + length > there:
                raise CheckpointError(f"storage {root} is cut short")
            return read(begin + first * width + start, length)

        return Storage(f"{root}/{first}", kind, count * width, read_part, foreign)

    contents = pickle(storage)
    keys = pickle()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointError("its storages have no names")
    for key in keys:
        count = int.from_bytes(file.read(8), "little" if little else "big")
        begin, length = file.tell(), count * widths.get(key, 1)
        if begin + length > size:
            raise CheckpointError(f"storage {key} is cut short")
        starts[key] = begin, length
        file.seek(begin + length)
    return contents


def _size(file: BinaryIO) -> int:
    """The bytes that are left in a file, without moving in it."""
    here = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(here)
    return size


FORMATS = [
    FileFormat("a torch file", _is_torch, _open_torch),
    FileFormat("a pickle", _is_pickle, _open_pickle, suffixes=(".pkl", ".pickle")),
]
