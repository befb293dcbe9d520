"""Files that are written whole or not at all, whatever kills the process or fills the disk."""

import io
import os
from pathlib import Path
from typing import Any

import torch

PARTIAL = ".part"


def write(path: Path, content: bytes | memoryview) -> None:
    """Writes a file so that at every moment `path` holds the old content or all of the new.

    The content goes to a temporary file beside it and to the disk (fsync), and the file is then renamed. The
    folder is synchronised too, so that the name outlives a power cut. Processes that write the same file do
    not disturb each other. One that is killed leaves its temporary file to `sweep`.

    Raises:
        OSError: the disk is full, or cannot be written to. The old file is intact, and the temporary file is
            gone.

    """
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save(path: Path, content: Any) -> None:
    """`torch.save` through `write`, serialised in memory first, since torch's writer hides a full disk."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getbuffer())


def sweep(folder: Path) -> None:
    """Removes what killed processes left in and below a folder that no other process writes to now."""
    for partial in folder.rglob(f"*{PARTIAL}"):
        partial.unlink(missing_ok=True)
