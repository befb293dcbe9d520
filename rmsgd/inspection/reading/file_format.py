"""What a file format is to the reader of checkpoints. Each has a module in ``formats``."""

import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from rmsgd.inspection.reading.stored import CheckpointError

FIRST_BYTES = 512
"""What a format is recognised by, beside the names in an archive."""

_FREE_BYTES = 64 << 20
_MOST_TIMES = 32


def check_unpacked(packed: int, unpacked: int) -> None:
    """Refuse what grows without bounds when it is unpacked. Weights hardly shrink when they are packed.

    Raises:
        CheckpointError: more than 64 MiB, and more than 32 times the bytes that are packed.
    """
    if unpacked > max(_FREE_BYTES, _MOST_TIMES * packed):
        raise CheckpointError(f"refused: {packed:,} bytes unpack to {unpacked:,} or more, as no weights do")


class Beginning:
    """The beginning of a file."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.bytes = file.read(FIRST_BYTES)
        self.path = path

    @cached_property
    def members(self) -> tuple[str, ...]:
        """The names in a zip archive; none where it is no archive or not a whole one."""
        if not self.bytes.startswith(b"PK\x03\x04"):
            return ()
        try:
            with zipfile.ZipFile(self.path) as archive:
                return tuple(archive.namelist())
        except Exception:  # whatever a damaged archive makes it raise
            return ()

    def has(self, name: str) -> bool:
        """Whether a zip archive has a member of this name, in whatever folder."""
        return any(member.rpartition("/")[2] == name for member in self.members)


@dataclass(frozen=True)
class OpenFile:
    """A file that was opened: mappings, lists and stand-ins, whose leaves are tensors."""

    tree: Any
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What is written about the tensors in the file itself."""
    release: Callable[[], None] = lambda: None
    """Let go of what was mapped; it is mapped anew when it is needed."""


@dataclass(frozen=True)
class FileFormat:
    """One file format: how it is told, and how it is read. One of ``open`` and ``unpack``, or neither."""

    name: str
    """With its article: "a safetensors file"."""
    is_this: Callable[[Beginning], bool]
    """By the content. No two formats may claim the same file."""
    open: Callable[[Path], OpenFile] | None = None
    """Raises whatever it likes: the caller makes one line of it, with the path."""
    unpack: Callable[[Path], Iterator[bytes]] | None = None
    """The file that is in it, a block at a time."""
    suffixes: tuple[str, ...] = ()
    """Files with these suffixes are taken for this format where their content is of none."""
    advice: str = ""
    """What to do with a file that is not read."""


MOST_PIECES = 10_000_000
"""Pieces that a header is read in: some seconds. The largest vocabulary in a GGUF file takes a tenth."""


class Bytes:
    """A file read in order, where nothing is asked for that is not there, in no more than ``MOST_PIECES``."""

    def __init__(self, file: BinaryIO, start: int = 0, end: int | None = None) -> None:
        self._file = file
        self.end = file.seek(0, os.SEEK_END) if end is None else end
        self.position = file.seek(start)
        self._pieces = 0

    def take(self, count: int) -> bytes:
        """The next bytes.

        Raises:
            CheckpointError: there are not as many.
        """
        self._check(count)
        data = self._file.read(count)
        if len(data) != count:
            raise CheckpointError("it is cut short")
        self.position += count
        return data

    def skip(self, count: int) -> None:
        """Pass over the next bytes.

        Raises:
            CheckpointError: there are not as many.
        """
        self._check(count)
        self.position = self._file.seek(self.position + count)

    def number(self, width: int) -> int:
        """The next bytes as an unsigned integer, the lowest byte first."""
        return int.from_bytes(self.take(width), "little")

    def _check(self, count: int) -> None:
        self._pieces += 1
        if self._pieces > MOST_PIECES:
            raise CheckpointError(f"a header of more than {MOST_PIECES:,} pieces")
        if not 0 <= count <= self.end - self.position:
            raise CheckpointError("it is cut short")


def read_range(path: Path, start: int, count: int) -> bytearray:
    """Bytes of a file.

    Raises:
        CheckpointError: it has not as many.
    """
    with path.open("rb") as file:
        if start + count > file.seek(0, os.SEEK_END):
            raise CheckpointError("the file is cut short")
        file.seek(start)
        data = bytearray(count)
        if file.readinto(data) != count:
            raise CheckpointError("the file is cut short")
    return data
