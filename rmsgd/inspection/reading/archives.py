"""Members of zip archives, read in parts, and never more than the archive can hold."""

import struct
import zipfile
from pathlib import Path

from rmsgd.inspection.reading.file_format import check_unpacked, read_range
from rmsgd.inspection.reading.stored import CheckpointError

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_MOST_BYTES = 1 << 30
"""The largest size in bytes of a member that is read as a whole."""


class Archive:
    """A zip archive and its directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            self.members = {info.filename: info for info in archive.infolist()}

    def size(self, name: str) -> int:
        """The bytes of a member when it is unpacked.

        Raises:
            CheckpointError: there is no such member, or it claims to be larger than it can be.
        """
        info = self._member(name)
        if info.compress_type == zipfile.ZIP_STORED:
            if info.file_size > self._size:
                raise CheckpointError(f"{name} is larger than its archive")
        else:
            check_unpacked(info.compress_size, info.file_size)
        return info.file_size

    def read(self, name: str) -> bytes:
        """A member as a whole.

        Raises:
            CheckpointError: there is no such member, or it is larger than 1 GiB.
        """
        if self.size(name) > _MOST_BYTES:
            raise CheckpointError(f"{name} is larger than {_MOST_BYTES:,} bytes")
        with zipfile.ZipFile(self.path) as archive:
            return archive.read(self._member(name))

    def read_range(self, name: str, start: int, count: int) -> bytearray:
        """Bytes of a member.

        Raises:
            CheckpointError: it has fewer bytes.
        """
        if start + count > self.size(name):
            raise CheckpointError(f"{name} has fewer than {start + count:,} bytes")
        info = self._member(name)
        if info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1:
            return read_range(self.path, self._start(info) + start, count)
        with zipfile.ZipFile(self.path) as archive, archive.open(info) as file:
            while start > 0:
                passed = len(file.read(min(start, 1 << 20)))
                if passed == 0:
                    raise CheckpointError(f"{name} is cut short")
                start -= passed
            data = bytearray(file.read(count))
        if len(data) != count:
            raise CheckpointError(f"{name} is cut short")
        return data

    def _member(self, name: str) -> zipfile.ZipInfo:
        if name not in self.members:
            raise CheckpointError(f"{name} is not in it")
        return self.members[name]

    def _start(self, info: zipfile.ZipInfo) -> int:
        """The offset of a member's bytes, which follow a header whose length the directory does not give."""
        header = read_range(self.path, info.header_offset, _LOCAL_HEADER.size)
        magic, name, extra = _LOCAL_HEADER.unpack(header)
        if magic != b"PK\x03\x04":
            raise CheckpointError(f"{info.filename} is not where the archive says")
        return info.header_offset + _LOCAL_HEADER.size + int(name) + int(extra)
