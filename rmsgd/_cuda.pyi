"""The CUDA kernels of rmsgd, compiled by nvcc. Every function raises RuntimeError with CUDA's own message."""

from typing import Any

from numpy.typing import NDArray

CUDA_VERSION: int
"""Of the toolkit it was built with: 1000 major + 10 minor."""
ARCHITECTURES: str
"""What it was compiled for, as in RMSGD_CUDA_ARCHS."""

def device_count() -> int:
    """How many GPUs there are."""

def attributes(device: int) -> tuple[int, ...]:
    """What the device has: the fields of ``rmsgd.backends.cuda_devices.Attributes``."""

def argument_bytes(name: str) -> int:
    """Size of a kernel's argument. KeyError: no kernel has this name."""

def resident_blocks(name: str, device: int, threads: int, shared_bytes: int) -> int:
    """How many blocks of a kernel fit on the device at once."""

def launch(
    name: str,
    device: int,
    blocks: int,
    threads: int,
    shared_bytes: int,
    stream: int,
    arguments: NDArray[Any],
    cooperative: bool = False,
) -> None:
    """Launch a kernel. ValueError: ``arguments`` is not of its size, or there is no block to launch."""
