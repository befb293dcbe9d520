"""The cases of an epoch end that are timed.

The gate times them for older revisions of rmsgd too, so this module imports only names that those have.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import rmsgd
from rmsgd.layers import Unfolding, as_matrix, unfoldings

STAGES = ("fp32 Gram", "fp64 Gram", "SVD")
"""The stages of the accuracy guard, in the order in which it tries them."""


def spectra(model: nn.Module) -> list[tuple[Tensor, Unfolding]]:
    """Every weight with each of its distinct unfoldings."""
    return [(p, u) for p in model.parameters() if p.ndim > 1 for u in unfoldings(p.shape)]


def gram_products(model: nn.Module) -> Callable[[], None]:
    """`torch.mm` of every unfolding with its transpose: both modes, whole matrices, in fp32.

    This is a yardstick and not a lower bound: a Gram matrix is symmetric, so half of each product is enough,
    and the modes of a 1x1 convolution share one.
    """
    matrices = []
    for p, u in spectra(model):
        matrix = as_matrix(p.detach(), u).contiguous()
        matrices += [(matrix, torch.empty(u.L, u.L))] * len(u.modes)

    def products() -> None:
        for matrix, out in matrices:
            torch.mm(matrix, matrix.T, out=out)

    return products


def torch_spectra(model: nn.Module) -> Callable[[], None]:
    """Gram product and `torch.linalg.eigvalsh` of every distinct unfolding, in fp32."""
    matrices = [as_matrix(p.detach(), u).contiguous() for p, u in spectra(model)]

    def eigenvalues() -> None:
        for matrix in matrices:
            torch.linalg.eigvalsh(matrix @ matrix.T)

    return eigenvalues


def epoch_end(model: nn.Module, process_group: Any = None) -> Callable[[], None]:
    """RMSGD's epoch end and the read of its rates, so that no work is left running when the clock is read."""
    optimizer = rmsgd.RMSGD(model.named_parameters(), lr=0.03, process_group=process_group)

    def end() -> None:
        optimizer.epoch_step()
        optimizer.learning_rates()

    return end
