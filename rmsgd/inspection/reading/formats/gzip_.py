"""gzip, with another file in it, which is unpacked and then read in its own format."""

import gzip
from collections.abc import Iterator
from pathlib import Path

from rmsgd.inspection.reading.file_format import Beginning, FileFormat, check_unpacked

_BLOCK = 1 << 20


def _is_this(file: Beginning) -> bool:
    return file.bytes.startswith(b"\x1f\x8b")


def _unpack(path: Path) -> Iterator[bytes]:
    packed, unpacked = path.stat().st_size, 0
    with gzip.open(path, "rb") as file:
        while block := file.read(_BLOCK):
            unpacked += len(block)
            check_unpacked(packed, unpacked)
            yield block


FORMATS = [FileFormat("a gzip file", _is_this, unpack=_unpack)]
