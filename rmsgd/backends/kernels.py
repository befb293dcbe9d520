"""The interface of compiled kernels for the CUDA backends, and the way of tables to a GPU."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TEAM_SHARED = 512
"""Bytes of shared memory that a block's team takes before anything else does (``csrc/team_cuda.h``)."""


class Kernels(Protocol):
    """The CUDA kernels by name, each of which takes one struct. ``rmsgd._cuda`` is one implementation."""

    def launch(
        self,
        name: str,
        device: int,
        blocks: int,
        threads: int,
        shared_bytes: int,
        stream: int,
        arguments: NDArray[Any],
        cooperative: bool = False,
    ) -> None:
        """Launch a kernel. Raises RuntimeError with CUDA's message.

        ``arguments`` is its one struct, a structured array of one element, which is copied.
        """

    def resident_blocks(self, name: str, device: int, threads: int, shared_bytes: int) -> int:
        """How many blocks of a kernel fit on the device at once."""

    def attributes(self, device: int) -> Sequence[int]:
        """What the device has: the fields of ``cuda_devices.Attributes``."""


def upload(table: NDArray[Any], device: torch.device) -> Tensor:
    """The bytes of a table of any shape on the device, (bytes,) uint8. The host does not wait for it."""
    host = torch.from_numpy(np.ascontiguousarray(table).view(np.uint8).reshape(-1))
    if device.type != "cuda":
        return host.clone()
    return host.pin_memory().to(device, non_blocking=True)
