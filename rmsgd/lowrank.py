"""EVBMF (empirical variational Bayes matrix factorization) of one matrix, to select a rank or compress."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rmsgd.backends import backend_for
from rmsgd.backends.base import NOISE_VARIANCE, RANK
from rmsgd.backends.svd import power_of_two, scaled_singular_values, without_numerical_zeros
from rmsgd.element_types import rounding
from rmsgd.layers import check_matrix
from rmsgd.reference import shrink


@dataclass(frozen=True)
class LowRank:
    """The low-rank part of an (m, n) matrix, ``U @ diag(singular_values) @ Vh``, and the noise beside it."""

    singular_values: Tensor
    """(rank,) float64 on the weight's device: the shrunk values, descending, in units of the weight."""
    noise_variance: float
    """The noise variance per entry, in squared units of the weight: the minimiser of the free energy."""
    rank: int
    """How many singular values lie above the noise threshold, 0 to min(m, n)."""
    U: Tensor | None
    """(m, rank) float64 on the weight's device, with orthonormal columns; None without ``vectors=True``."""
    Vh: Tensor | None
    """(rank, n) float64 on the weight's device, with orthonormal rows; None without ``vectors=True``."""


@torch.no_grad()
def evbmf(weight: Tensor, vectors: bool = False) -> LowRank:
    """Split a matrix into a low-rank part and noise by empirical variational Bayes matrix factorization.

    The noise variance is the global minimiser of the free energy (Nakajima et al., JMLR 14, 2013), which is
    found in float64. The rank is the number of singular values above its threshold, and those values are
    shrunk as the analytic solution says.

    Args:
        weight: (m, n), either side the larger, any real floating dtype, on a CPU or a GPU, any strides.
        vectors: also return the singular vectors.

    Returns:
        The low-rank part and the noise variance, computed in float64 whatever the weight's dtype.

    Raises:
        TypeError: ``weight`` is not a dense floating-point tensor.
        ValueError: ``weight`` is not a matrix with at least one entry, has no values (on the meta
            device, or freed), or has a NaN or an Inf.
    """
    check_matrix(weight, "weight")
    matrix = weight.detach().double()
    largest = float(matrix.abs().max())
    if not largest < float("inf"):
        raise ValueError("weight has NaN or infinite entries")

    # Squares of values beyond 1e154 are no doubles, nor those below 1e-162.
    scale = power_of_two(largest)
    matrix = matrix / scale
    left = right = None
    if vectors:
        left, gamma, right = torch.linalg.svd(matrix, full_matrices=False)
        without_numerical_zeros(gamma, max(matrix.shape), rounding(weight.dtype))
    else:
        gamma = scaled_singular_values(matrix, rounding(weight.dtype))
    L, M = min(matrix.shape), max(matrix.shape)
    row = backend_for(matrix.device).measure_spectrum(gamma, M)
    rank, variance = int(row[RANK]), float(row[NOISE_VARIANCE])
    kept = gamma[:rank]
    if rank and variance > 0.0:
        factors = shrink((kept * kept / M).cpu().numpy(), variance, L, M)
        kept = kept * torch.from_numpy(factors).to(kept.device)
    return LowRank(
        kept * scale,
        variance * scale * scale,
        rank,
        None if left is None else left[:, :rank],
        None if right is None else right[:rank],
    )
