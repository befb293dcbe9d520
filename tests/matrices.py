"""Matrices that several tests measure."""

import torch
from torch import Tensor


def low_rank(m: int, n: int, rank: int, noise: float) -> Tensor:
    """A matrix (m, n) of this rank, with entries of variance 1, and noise of this standard deviation."""
    return torch.randn(m, rank) @ torch.randn(rank, n) / rank**0.5 + noise * torch.randn(m, n)
