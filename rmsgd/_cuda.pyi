"""The CUDA kernels of rmsgd, compiled by nvcc. Every function raises RuntimeError with CUDA's own message."""

from typing import Any

from numpy.typing import NDArray

CUDA_VERSION: int
"""The version of the toolkit that built it: 1000 major + 10 minor."""
ARCHITECTURES: str
"""The architectures that it was compiled for, as in RMSGD_CUDA_ARCHS."""

def device_count() -> int:
    """How many GPUs there are."""

def attributes(device: int) -> tuple[int, ...]:
    """The device's attributes, as the fields of ``rmsgd.backends.cuda_devices.Attributes``."""

def argument_bytes(name: str) -> int:
    """The size of a kernel's argument in bytes. Raises KeyError if no kernel has this name."""

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
    """Launch a kernel. Raises ValueError if ``arguments`` has another size, or there is no block."""
