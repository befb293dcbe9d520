"""Samples with their targets."""

from dataclasses import dataclass

import torch
from torch import Tensor

Images = tuple[Tensor, Tensor]
"""Samples, as uint8 (n, 3, height, width) where they are images, and targets, int64 (n,)."""

Parts = tuple[Images, Images, int]
"""Training samples, test samples and the number of classes."""


@dataclass(frozen=True)
class Split:
    """Samples, shape (n, *sample), and targets, int64, shape (n,) or (n, length) for tokens."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def to(self, device: torch.device) -> "Split":
        """The same split on a device."""
        return Split(self.inputs.to(device), self.targets.to(device))
