"""Singular values by torch's SVD in float64, for matrices whose Gram matrix is not accurate enough.

The torch backend measures every matrix in this way, and the compiled cores those few.
"""

import math

import torch
from torch import Tensor

from rmsgd.reference import numerical_zero


def singular_values(matrix: Tensor, largest: float, rounding: float) -> Tensor:
    """Singular values of a float64 matrix on its device, zero where they are numerically zero.

    ``largest`` is its largest magnitude, finite; ``rounding`` is that of the weight it came from. See
    ``scaled_singular_values``.
    """
    scale = power_of_two(largest)
    return scaled_singular_values(matrix / scale, rounding) * scale


def power_of_two(largest: float) -> float:
    """The divisor for a matrix of this largest magnitude with which no square overflows or vanishes."""
    return math.ldexp(1.0, math.frexp(largest)[1] - 1)


def scaled_singular_values(matrix: Tensor, rounding: float) -> Tensor:
    """Singular values of a float64 matrix that was divided by its ``power_of_two``.

    Values at or below ``reference.numerical_zero`` are set to 0. Rows and columns of zeros, as in a pruned
    weight, cost nothing.
    """
    gamma = matrix.new_zeros(min(matrix.shape))
    M = max(matrix.shape)
    filled = matrix != 0.0
    rows, columns = filled.any(1), filled.any(0)
    if not (rows.all() and columns.all()):
        matrix = matrix[rows][:, columns]
    gamma[: min(matrix.shape)] = torch.linalg.svdvals(matrix)
    return without_numerical_zeros(gamma, M, rounding)


def without_numerical_zeros(gamma: Tensor, M: int, rounding: float) -> Tensor:
    """Singular values, descending, with those at or below ``reference.numerical_zero`` set to 0 in place."""
    gamma[gamma <= numerical_zero(gamma.cpu().numpy(), len(gamma), M, rounding)] = 0.0
    return gamma
