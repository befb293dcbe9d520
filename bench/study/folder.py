"""A run's folder: what has become of the run, and a lock that lets one process train it."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class BusyError(RuntimeError):
    """Another process is at this run."""


def status(folder: Path) -> str:
    """What has become of the run: "complete", "diverged", "unfinished" or "not begun"."""
    try:
        return json.loads((folder / "result.json").read_text(encoding="utf-8"))["status"]
    except FileNotFoundError:
        return "unfinished" if (folder / "checkpoint.pt").exists() else "not begun"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder for this process alone; the lock goes with the process, however that ends."""
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"another process is training {folder}") from None
        yield
    finally:
        os.close(handle)
