"""How a weight is seen as a matrix, and which layer a parameter that is not measured follows."""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from rmsgd.element_types import ELEMENT_TYPES

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


def whole_matrix(shape: Sequence[int]) -> Unfolding:
    """A matrix as it is, also one of a single row or column, which has no unfolding with a spectrum.

    Raises:
        ValueError: the shape has another number of dimensions than two.
    """
    if len(shape) != 2:
        raise ValueError(f"expected a matrix, got shape {tuple(shape)}")
    return _unfold(shape, (0,), "matrix")


def check_matrix(weight: object, name: str) -> None:
    """Raise what is wrong with a matrix that is to be measured.

    Raises:
        TypeError: it is not a dense tensor of real floating-point numbers.
        ValueError: it is not a matrix with at least one entry, or has no values.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(weight).__name__}")
    if is_lazy(weight):
        raise ValueError(f"{name} has no shape yet, as its module is a lazy one: call the model once first")
    if weight.is_nested:
        raise TypeError(f"{name} must be dense, got a nested tensor: use its parts, weight.unbind()")
    if weight.dtype not in ELEMENT_TYPES:
        raise TypeError(f"{name} must be a real floating-point tensor, got {weight.dtype}")
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"{name} must be a matrix with at least one entry, got shape {tuple(weight.shape)}")
    if weight.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got layout {weight.layout}: use to_dense()")
    if weight.is_meta:
        raise ValueError(f"{name} is on the meta device: it has a shape but no values")
    if is_freed(weight):
        raise ValueError(f"{name} has a shape but no values: its memory has been freed")


def is_freed(tensor: Tensor) -> bool:
    """Whether the memory of a tensor of any shape was given back, as sharded training does between steps.

    Reading such a tensor ends the process.
    """
    try:
        return tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0
    except (RuntimeError, NotImplementedError):  # sparse, or a subclass that keeps its numbers elsewhere
        return False


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
