"""A lock on a folder for one process at a time, which is released when the process ends in any way."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class BusyError(RuntimeError):
    """Another process holds this folder."""


@contextmanager
def locked(folder: Path, wait: bool = False, name: str = ".lock") -> Iterator[None]:
    """Holds the folder for this process alone. The lock is released when the process ends in any way.

    Args:
        folder: the folder to hold, which must exist.
        wait: whether to wait until another process releases it.
        name: the name of the lock's file. Locks of different names do not exclude each other.

    Raises:
        BusyError: another process holds it, and this one does not wait.

    """
    handle = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise BusyError(f"another process is at {folder}") from None
        yield
    finally:
        os.close(handle)
