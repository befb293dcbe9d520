"""Matrices that several tests measure."""

import torch
from torch import Tensor, nn


def low_rank(m: int, n: int, rank: int, noise: float) -> Tensor:
    """A matrix (m, n) of this rank, with entries of variance 1, and noise of this standard deviation."""
    return torch.randn(m, rank) @ torch.randn(rank, n) / rank**0.5 + noise * torch.randn(m, n)


def planted(model: nn.Module) -> nn.Module:
    """The model with a part of rank 2 in every weight: noise has the stable rank 0, as a lost value has."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p += 3 * p.std() * low_rank(len(p), p[0].numel(), 2, 0.0).view(p.shape)
    return model
