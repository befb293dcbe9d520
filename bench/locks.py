"""One process at a time: a lock on a folder that goes with the process, however that ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class BusyError(RuntimeError):
    """Another process is at this folder."""


@contextmanager
def locked(folder: Path, wait: bool = False, name: str = ".lock") -> Iterator[None]:
    """Holds the folder for this process alone; the lock goes with the process, however that ends.

    Args:
        folder: to hold; it is there.
        wait: until another process lets go of it.
        name: of the lock's file: who holds one by another name is not met.

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
