"""The description of a file format for the reader of checkpoints. Each has a module in ``formats``."""

import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from rmsgd.inspection.reading.stored import CheckpointError

FIRST_BYTES = 512
"""How many first bytes a format is recognised by, besides the names in an archive."""

_FREE_BYTES = 64 << 20
_MOST_TIMES = 32


def check_unpacked(packed: int, unpacked: int) -> None:
    """Refuse a file that grows without bounds when it is unpacked. Packing hardly shrinks weights.

    Raises:
        CheckpointError: it unpacks to more than 64 MiB, and to more than 32 times its packed bytes.
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
        """The names in a zip archive; none where the file is not an archive or not a complete one."""
        if not self.bytes.startswith(b"PK\x03\x04"):
            return ()
        try:
            with zipfile.ZipFile(self.path) as archive:
                return tuple(archive.namelist())
        except Exception:  # a damaged archive may make it raise anything
            return ()

    def has(self, name: str) -> bool:
        """Whether a zip archive has a member of this name in any folder."""
        return any(member.rpartition("/")[2] == name for member in self.members)


@dataclass(frozen=True)
class OpenFile:
    """The content of an open file: mappings, lists and stand-ins, whose leaves are tensors."""

    tree: Any
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The metadata about the tensors in the file itself."""
    release: Callable[[], None] = lambda: None
    """Unmaps the file, which is mapped anew when it is needed."""


@dataclass(frozen=True)
class FileFormat:
    """One file format: how it is recognised, and how it is read: by ``open``, ``unpack``, or not at all."""

    name: str
    """Its name with the article: "a safetensors file"."""
    is_this: Callable[[Beginning], bool]
    """Recognises a file by its content. No two formats may recognise the same file."""
    open: Callable[[Path], OpenFile] | None = None
    """Opens a file. It may raise anything: the caller makes one line of it, with the path."""
    unpack: Callable[[Path], Iterator[bytes]] | None = None
    """Unpacks the file inside, a block at a time."""
    suffixes: tuple[str, ...] = ()
    """The suffixes of files that are taken for this format if no format recognises their content."""
    advice: str = ""
    """What the user can do with a file of a format that is not read."""


MOST_PIECES = 10_000_000
"""The most pieces of a header: they take some seconds. The largest vocabulary in a GGUF file has a tenth."""


class Bytes:
    """A file that is read in order, never beyond its end, and in no more than ``MOST_PIECES``."""

    def __init__(self, file: BinaryIO, start: int = 0, end: int | None = None) -> None:
        self._file = file
        self.end = file.seek(0, os.SEEK_END) if end is None else end
        self.position = file.seek(start)
        self._pieces = 0

    def take(self, count: int) -> bytes:
        """The next bytes.

        Raises:
            CheckpointError: there are fewer.
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
            CheckpointError: there are fewer.
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
        CheckpointError: it has fewer bytes.
    """
    with path.open("rb") as file:
        if start + count > file.seek(0, os.SEEK_END):
            raise CheckpointError("the file is cut short")
        file.seek(start)
        data = bytearray(count)
        if file.readinto(data) != count:
            raise CheckpointError("the file is cut short")
    return data
