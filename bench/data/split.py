"""Samples with their targets."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Samples, shape (n, *sample), and targets, int64, shape (n,) or (n, length) for tokens."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)
