"""How a weight is seen as a matrix, and which layer a parameter that is not measured follows."""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from torch import Tensor

MEAN_OF_ALL, NO_LEADER = -1, -2
"""These stand in place of the layer that a parameter without a spectrum follows."""


class Unfolding(NamedTuple):
    """A weight as an L x M matrix with L <= M: which of its dimensions make up each side.

    A conv weight ``(o, i, *k)`` has the mode "out", ``(o, i * prod k)``, and the mode "in",
    ``(i, o * prod k)``; a 2-D weight has the one mode "matrix". The two modes of a 1 x 1 kernel are
    transposes of each other and share their singular values, hence one unfolding with two modes.
    """

    small: tuple[int, ...]
    """Dimensions of the smaller side, whose Gram matrix is taken."""
    large: tuple[int, ...]
    L: int
    M: int
    modes: tuple[str, ...]
    channels: tuple[int, ...]
    """For each mode, the rows before the smaller side was chosen. The released code divides by them."""

    @property
    def cost(self) -> int:
        """Estimated time to measure it, in multiplications: those of Gram matrix and tridiagonal form."""
        return self.L**2 * (self.M + 3 * self.L)


def _unfold(shape: Sequence[int], rows: tuple[int, ...], mode: str) -> Unfolding:
    columns = tuple(d for d in range(len(shape)) if d not in rows)
    m, n = (math.prod(shape[d] for d in side) for side in (rows, columns))
    small, large = (rows, columns) if m <= n else (columns, rows)
    return Unfolding(small, large, min(m, n), max(m, n), (mode,), (m,))


def unfoldings(shape: Sequence[int]) -> tuple[Unfolding, ...]:
    """The distinct unfoldings of a weight of this shape that have a spectrum (L > 1).

    Raises:
        ValueError: the shape has fewer than two dimensions.
    """
    return _unfoldings(tuple(shape))


@cache
def _unfoldings(shape: tuple[int, ...]) -> tuple[Unfolding, ...]:
    if len(shape) < 2:
        raise ValueError(f"a weight needs two or more dimensions to be a matrix, got shape {tuple(shape)}")
    if len(shape) == 2:
        candidates = [_unfold(shape, (0,), "matrix")]
    else:
        candidates = [_unfold(shape, (1,), "in"), _unfold(shape, (0,), "out")]
        if math.prod(shape[2:]) == 1:
            first, second = candidates
            candidates = [first._replace(modes=("in", "out"), channels=first.channels + second.channels)]
    return tuple(u for u in candidates if u.L > 1)


def as_matrix(weight: Tensor, unfolding: Unfolding) -> Tensor:
    """The L x M matrix, a view of ``weight`` where its layout allows one."""
    return weight.permute(unfolding.small + unfolding.large).reshape(unfolding.L, unfolding.M)


def leader_of(name: str | None, earlier_in_group: int | None, probed_names: Sequence[str | None]) -> int:
    """The probed parameter whose ratio a parameter that is not probed takes, by index, or ``MEAN_OF_ALL``.

    It is the one before it in its own group. If there is none, it is the one whose module path shares the
    longest prefix with its own (the first of equals). If there is none either, it is ``MEAN_OF_ALL``.
    """
    if earlier_in_group is not None:
        return earlier_in_group
    if name is None:
        return MEAN_OF_ALL
    best, longest = MEAN_OF_ALL, 0
    for index, other in enumerate(probed_names):
        if other is None:
            continue
        shared = 0
        for mine, theirs in zip(name.split(".")[:-1], other.split(".")[:-1], strict=False):
            if mine != theirs:
                break
            shared += 1
        if shared > longest:
            best, longest = index, shared
    return best
