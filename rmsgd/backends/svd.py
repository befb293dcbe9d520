"""Singular values by torch's routines in float64: by SVD, or from a Gram matrix.

The torch backend measures every matrix by SVD, the compiled cores those few that a Gram matrix does not
decide.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rmsgd.backends.base import FIELDS, NOT_FINITE, STATUS
from rmsgd.element_types import rounding as rounding_of
from rmsgd.layers import Unfolding, as_matrix
from rmsgd.reference import numerical_zero

_CHUNK = 1 << 22  # entries turned to float64 at a time
_STACK = 1 << 24  # entries of the Gram matrices whose eigenvalues are found at a time


def singular_values(matrix: Tensor, largest: float, rounding: float) -> Tensor:
    """Singular values of a float64 matrix on its device, zero where they are numerically zero.

    ``largest`` is its largest magnitude, finite; ``rounding`` is that of the weight it came from. See
    ``scaled_singular_values``.
    """
    scale = power_of_two(largest)
    return scaled_singular_values(matrix / scale, rounding) * scale


def power_of_two(largest: float) -> float:
    """The divisor for a matrix of this largest magnitude with which no square overflows or vanishes.

    It has the unit of the entries and lies in (largest / 2, largest].
    """
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
    """Singular values (L,), descending, with those up to ``reference.numerical_zero`` set to 0 in place."""
    gamma[gamma <= numerical_zero(gamma.cpu().numpy(), len(gamma), M, rounding)] = 0.0
    return gamma


def measure_by_svd(
    matrices: Sequence[tuple[Tensor, Unfolding]], measure_spectrum: Callable[[Tensor, int], Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The metrics table of these matrices, on the host, and their L singular values, on their devices.

    ``measure_spectrum`` is that of a backend, and so is the form of the table: see ``base.Backend``. The
    values of a matrix with a NaN or an Inf are 0.
    """
    table = torch.full((len(matrices), FIELDS), math.nan, dtype=torch.float64, device="cpu")
    gammas = []
    for row, (weight, unfolding) in zip(table, matrices, strict=True):
        matrix, largest = double_matrix(weight, unfolding)
        if not math.isfinite(largest):
            row[STATUS] = NOT_FINITE
            gammas.append(matrix.new_zeros(unfolding.L))
            continue
        gamma = singular_values(matrix, largest, rounding_of(weight.dtype))
        row.copy_(measure_spectrum(gamma, unfolding.M))
        gammas.append(gamma)
    return table, gammas


def double_matrix(weight: Tensor, unfolding: Unfolding) -> tuple[Tensor, float]:
    """The matrix in float64 where there is such arithmetic, and its largest magnitude."""
    matrix = as_matrix(weight.detach(), unfolding)
    if matrix.device.type == "mps":  # knows no float64
        matrix = matrix.cpu()
    matrix = matrix.double()
    return matrix, float(matrix.abs().max())


def gram_singular_values(matrices: Sequence[tuple[Tensor, Unfolding]]) -> list[Tensor]:
    """Singular values of unfoldings on one device, (L,) each, descending, from Gram matrices in float64.

    Their squares are right to 16 2^-53 of the largest, and those that are numerically zero are 0. No whole
    matrix is ever in float64. Matrices with equally many rows L are one call of torch's eigenvalue routine,
    as many of them at once as ``_STACK`` entries hold, and the host waits once for each call. All entries are
    finite.
    """
    if not matrices:
        return []
    largest = torch.stack([weight.detach().abs().max().double() for weight, _ in matrices]).tolist()
    scales = [power_of_two(value) for value in largest]
    found: list[Tensor] = [Tensor()] * len(matrices)
    by_rows: dict[int, list[int]] = {}
    for i, (_, unfolding) in enumerate(matrices):
        by_rows.setdefault(unfolding.L, []).append(i)
    for L, alike in by_rows.items():
        at_once = max(1, _STACK // L**2)
        for start in range(0, len(alike), at_once):
            chosen = alike[start : start + at_once]
            stack = torch.stack([_gram(*matrices[i], scales[i]) for i in chosen])
            values = torch.linalg.eigvalsh(stack).clamp_(min=0.0).sqrt_().flip(-1)
            for i, row, on_host in zip(chosen, values, values.cpu().numpy(), strict=True):
                weight, unfolding = matrices[i]
                row[row <= numerical_zero(on_host, L, unfolding.M, rounding_of(weight.dtype))] = 0.0
                found[i] = row * scales[i]
    return found


def _gram(weight: Tensor, unfolding: Unfolding, scale: float) -> Tensor:
    """The Gram matrix (L, L) in float64 of a matrix that is divided by ``scale``."""
    matrix = as_matrix(weight.detach(), unfolding)
    gram = torch.zeros(unfolding.L, unfolding.L, dtype=torch.float64, device=matrix.device)
    columns = max(1, _CHUNK // unfolding.L)
    for begin in range(0, unfolding.M, columns):
        part = matrix[:, begin : begin + columns].double() / scale
        gram.addmm_(part, part.T)
    return gram
