"""Weights for timing: random initialisation, or what training makes of it."""

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def make_trained_like(model: nn.Module, seed: int = 0) -> None:
    """Add to every weight the low-rank part that training leaves in it.

    A trained weight is the sum of noise and a low-rank part with a few large and many small singular values.
    Here the i-th of these is ``strength i^-.7`` times the largest of the noise, with a strength between 1.5
    and 30 and a rank of 5 to 40 %, both drawn for each layer. Times on initial weights alone would be too
    good: nothing is above the noise there, and every spectrum is easy.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    for p in model.parameters():
        if p.ndim < 2:
            continue
        flat = p.reshape(p.shape[0], -1)
        rows, columns = flat.shape
        rank = max(1, int(min(rows, columns) * uniform(0.05, 0.4)))
        edge = float(flat.std()) * (math.sqrt(rows) + math.sqrt(columns))
        sizes = edge * math.exp(uniform(math.log(1.5), math.log(30))) * torch.arange(1, rank + 1) ** -0.7
        left = _orthonormal(rows, rank, generator)
        right = _orthonormal(columns, rank, generator)
        p.add_(((left * sizes) @ right.T).reshape(p.shape).to(p.dtype))


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator)).Q
