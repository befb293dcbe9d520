"""Which parameters are probed, and how a weight is seen as a matrix."""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rmsgd.optim.rules import RULES
from rmsgd.reference import PAPER, PUBLISHED

SUPPORTED_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Unfolding(NamedTuple):
    """A weight as an L x M matrix with L <= M: which of its dimensions make up either side.

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
    """Per mode, the rows before the smaller side was chosen: what the released code divides by."""

    @property
    def cost(self) -> int:
        """Time of measuring it in units of a multiplication: Gram matrix and tridiagonal form."""
        return self.L**2 * (self.M + 3 * self.L)


def _unfold(shape: Sequence[int], rows: tuple[int, ...], mode: str) -> Unfolding:
    columns = tuple(d for d in range(len(shape)) if d not in rows)
    m, n = (math.prod(shape[d] for d in side) for side in (rows, columns))
    small, large = (rows, columns) if m <= n else (columns, rows)
    return Unfolding(small, large, min(m, n), max(m, n), (mode,), (m,))


def unfoldings(shape: Sequence[int]) -> tuple[Unfolding, ...]:
    """The unfoldings of a weight of this shape that have a spectrum (L > 1), distinct ones only.

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


def is_probed(weight: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether the optimizer measures this parameter: a trainable floating weight with a spectrum.

    ``group`` is its parameter group: ``probe=False`` opts out, ``linear=False`` leaves 2-D weights
    out. The rules "release" and "published" probe what their sources probe: 4-D (and 2-D) weights,
    "published" only kernels without a side of 1.
    """
    if not (group["probe"] and weight.requires_grad and weight.is_floating_point()):
        return False
    shape = weight.shape
    if not 2 <= weight.ndim <= 5 or (weight.ndim == 2 and not group["linear"]):
        return False
    arithmetic = RULES[group["rule"]].arithmetic
    if arithmetic != PAPER and weight.ndim not in (2, 4):
        return False
    if arithmetic == PUBLISHED and weight.ndim == 4 and 1 in shape[2:]:
        return False
    return bool(unfoldings(shape))


def resolution_weight(L: int, lr0: float) -> float:
    """What a stable rank of L rows counts for beside rates of the size of ``lr0``: ``n^2 / (1 + n^2)``.

    One kept direction more or less moves it by 1/L. It is weighed as a Wiener filter weighs a signal of the
    size of ``lr0`` under noise of that size, with ``n = L lr0``: 512 rows count whole at a rate of .03, 64
    for .79, 10 for .08.
    """
    n = L * lr0
    return n * n / (1.0 + n * n)


def measurement_weights(shape: Sequence[int], rule: str, lr0: float) -> list[float]:
    """What each unfolding's metric counts for in the layer's measurement s.

    "paper": s is the mean of the stable rank over the modes; "bounded": each of them weighed by its
    resolution. The other rules: the mean of ``sum d_i / (d_1 rows)`` over both modes, one without a spectrum
    counting as 0.
    """
    parts = unfoldings(shape)
    if RULES[rule].arithmetic == PAPER:
        modes = sum(len(u.modes) for u in parts)
        weighs = RULES[rule].weighs_resolution
        return [len(u.modes) / modes * (resolution_weight(u.L, lr0) if weighs else 1.0) for u in parts]
    modes = 1 if len(shape) == 2 else 2
    return [sum(1.0 / rows for rows in u.channels) / modes for u in parts]


def as_matrix(weight: Tensor, unfolding: Unfolding) -> Tensor:
    """The L x M matrix, a view of ``weight`` where its layout allows one."""
    return weight.permute(unfolding.small + unfolding.large).reshape(unfolding.L, unfolding.M)


def leader_of(name: str | None, earlier_in_group: int | None, probed_names: Sequence[str | None]) -> int:
    """Which probed parameter's ratio a parameter that is not probed takes (an index; -1: their mean).

    The one before it in its own group, else the one whose module path shares the longest prefix
    with its own (the first of equals), else none in particular.
    """
    if earlier_in_group is not None:
        return earlier_in_group
    if name is None:
        return -1
    best, longest = -1, 0
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
