"""The learning-rate rules: their formulas in plain float64, and whatever else differs between them.

A rule is one ``Rule`` here; its formula stands once more, compiled for CPU and GPU, in
``csrc/evbmf/rates.h``. Nothing else in the package asks which rule it has before it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rmsgd.backends.base import NUCLEAR, STABLE_RANK, RateGroup, RateTables
from rmsgd.layers import MEAN_OF_ALL, NO_LEADER, unfoldings

# -- formulas ------------------------------------------------------------------------------------

NextRate: TypeAlias = Callable[[RateGroup, float, float, bool], float]
"""``(group, eta, gain, held)`` to the next eta, before its floor.

``gain`` is ``s(t+1) - s(t)``; ``held`` says that the release's not_ready list holds the layer.
``group.decay`` is gamma at an epoch end that decays, else 1, and ``group.zeta`` is the value before it.
"""


def algorithm_1(group: RateGroup, eta: float, gain: float, held: bool) -> float:
    """Algorithm 1 of the paper around an anchor a, 0 in the paper: ``a + beta (eta - a) + zeta gain``.

    Without gains a rate decays to the anchor. gamma decays eta and zeta.
    """
    change = group.beta * (group.decay * eta - group.anchor) + group.zeta * group.decay * gain
    return group.anchor + change


def release(group: RateGroup, eta: float, gain: float, held: bool) -> float:
    """As rmsgd 1.0.2 computes it: the first epoch end gives ``(1 + beta) lr``, whatever was measured."""
    if group.first:
        gain = group.initial_lr
    elif held:
        gain = (group.initial_lr - group.beta * eta) / group.zeta
    return group.beta * (group.decay * eta) + group.zeta * group.decay * gain


def published(group: RateGroup, eta: float, gain: float, held: bool) -> float:
    """As the branch computes it that made the paper's tables.

    The first epoch end gives lr, gamma decays zeta alone, and what holds a layer is not divided by zeta.
    """
    if group.first:
        eta, gain = 0.0, group.initial_lr
    elif held:
        gain = group.initial_lr - group.beta * eta
    return group.beta * eta + group.zeta * group.decay * gain


def applied_rate(eta: float, lowest: float, highest: float) -> float:
    """The rate that a step takes where its rule has come to ``eta``: ``min(max(eta, lowest), highest)``.

    The rule goes on from eta itself. Its gains add up to the stable rank, so a bound on what it remembers
    would forget the gains and keep the losses: a layer that was held at the bound would fall below its
    first rate as soon as its stable rank shrank.
    """
    return min(max(eta, lowest), highest)


# -- what a layer's measurement is made of -------------------------------------------------------


ModeWeights: TypeAlias = Callable[[Sequence[int], float], list[float]]
"""``(shape, lr0)`` of a layer to what each of its unfoldings counts for in its measurement s."""


def mean_over_modes(shape: Sequence[int], lr0: float) -> list[float]:
    """The mean over the modes."""
    parts = unfoldings(shape)
    modes = sum(len(part.modes) for part in parts)
    return [len(part.modes) / modes for part in parts]


def resolution_weight(L: int, lr0: float) -> float:
    """What a stable rank of L rows counts for beside rates of the size of ``lr0``: ``n^2 / (1 + n^2)``.

    One kept direction more or less moves it by 1/L. It is weighed as a Wiener filter weighs a signal of the
    size of ``lr0`` under noise of that size, with ``n = L lr0``: 512 rows count whole at a rate of .03, 64
    for .79, 10 for .08.
    """
    n = L * lr0
    return n * n / (1.0 + n * n)


def mean_weighed_by_resolution(shape: Sequence[int], lr0: float) -> list[float]:
    """The mean over the modes, each of them counting for its ``resolution_weight``."""
    shares = zip(mean_over_modes(shape, lr0), unfoldings(shape), strict=True)
    return [share * resolution_weight(part.L, lr0) for share, part in shares]


def mean_per_channel(shape: Sequence[int], lr0: float) -> list[float]:
    """For ``sum d_i / (d_1 channels)``: the mean over both modes, one without a spectrum being 0."""
    modes = 1 if len(shape) == 2 else 2
    return [sum(1.0 / channels for channels in part.channels) / modes for part in unfoldings(shape)]


# -- the rules -----------------------------------------------------------------------------------

Buffer: TypeAlias = Literal["velocity", "momentum_buffer"]


@dataclass(frozen=True)
class Rule:
    """How the rates of layers move at an epoch end, and what their parameters' steps need to know of it."""

    name: str
    help: str
    """What it is, in one line."""
    next_rate: NextRate
    number: int
    """The number of its formula in ``csrc/evbmf/rates.h``: rules of the same formula share it."""
    column: int
    """The metric, a column of the table, that a layer's measurement s is made of."""
    mode_weights: ModeWeights
    """What each unfolding of a layer counts for in s."""
    initial_rank: Literal["zero", "measure"]
    """What ``initial_rank=None`` means."""
    buffer: Buffer
    """How past gradients are kept: as Algorithm 1 keeps them, or as torch's SGD does."""
    leaders_by_name: bool
    """Whether a parameter without a spectrum follows a layer of its group or of its module, and not simply
    the layer before it."""
    dimensions: tuple[int, ...] = (2, 3, 4, 5)
    """How many dimensions the weights have that are measured."""
    flat_kernels: bool = True
    """Whether kernels with a side of 1 are measured."""
    holds: bool = False
    """Whether a layer is held at its first rate while its s is 0 (the release's not_ready list)."""
    floor: float | None = None
    """The smallest eta; None: the option ``min_lr``."""
    anchor: float = 0.0
    """What eta decays to without gains, as a multiple of lr0; 0 in Algorithm 1."""
    lowest: float = 0.0
    highest: float = math.inf
    """Bounds of the rate that is applied, as multiples of lr0. eta itself moves beyond them."""

    def probes(self, shape: Sequence[int]) -> bool:
        """Whether weights of this shape are measured."""
        if len(shape) not in self.dimensions or not (self.flat_kernels or 1 not in shape[2:]):
            return False
        return bool(unfoldings(shape))


_PAPER = Rule(
    "paper",
    "Algorithm 1 of the paper to the letter",
    algorithm_1,
    number=0,
    column=STABLE_RANK,
    mode_weights=mean_over_modes,
    initial_rank="zero",
    buffer="velocity",
    leaders_by_name=True,
)
_BOUNDED = replace(
    _PAPER,
    name="bounded",
    help="Algorithm 1 around the first rate, gains weighed by their resolution, rates within bounds",
    mode_weights=mean_weighed_by_resolution,
    initial_rank="measure",
    floor=-math.inf,
    anchor=1.0,
    lowest=0.5,
    highest=2.0,
)
_RELEASE = Rule(
    "release",
    "what rmsgd 1.0.2 computes",
    release,
    number=1,
    column=NUCLEAR,
    mode_weights=mean_per_channel,
    initial_rank="zero",
    buffer="momentum_buffer",
    leaders_by_name=False,
    dimensions=(2, 4),
    holds=True,
    floor=0.0,
)
_PUBLISHED = replace(
    _RELEASE,
    name="published",
    help="what the branch computes that made the paper's tables",
    next_rate=published,
    number=2,
    flat_kernels=False,
    floor=1e-10,
)

RULES: Mapping[str, Rule] = {rule.name: rule for rule in (_BOUNDED, _PAPER, _RELEASE, _PUBLISHED)}
"""By name; the first is the default."""

DEFAULT = _BOUNDED.name

REFERENCE_LR = 0.03
"""The learning rate that gains of the stable rank are meant for: the paper's, of SGD with momentum."""

_FORMULAS = {rule.number: rule.next_rate for rule in RULES.values()}

# -- an epoch end --------------------------------------------------------------------------------


def held_layers(
    measured: NDArray[np.float64], ready: NDArray[np.int32], watched: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Which layers the release's ``not_ready`` list holds at its first rate; updates ``ready``.

    The list is walked while entries are removed from it, so the entry after a removed one is
    skipped in that pass: neither held nor made ready. ``watched`` leaves layers out of the walk.
    """
    held = np.zeros(len(measured), dtype=np.bool_)
    skip = False
    for layer in range(len(measured)):
        if ready[layer] or not watched[layer]:
            continue
        if skip:
            skip = False
        elif abs(measured[layer]) <= 1e-8:
            held[layer] = True
        elif not math.isnan(measured[layer]):
            ready[layer] = 1
            skip = True
    return held


def update_rates(tables: RateTables, groups: Sequence[RateGroup], metrics: Tensor) -> None:
    """One epoch end over all layers, on the CPU: updates the tables in place.

    Args:
        tables: their ``eta``, ``unbounded``, ``stable_rank`` and ``ready`` are updated.
        groups: ``tables.group`` and ``tables.follower_group`` are indices into them.
        metrics: (matrices, FIELDS) float64. A NaN keeps its layer as it is.
    """
    t = {name: tensor.numpy() for name, tensor in vars(tables).items()}
    eta, unbounded, stable_rank = t["eta"], t["unbounded"], t["stable_rank"]
    table, group_of = metrics.numpy(), [groups[g] for g in t["group"]]
    measured = np.empty(len(group_of))
    for layer, group in enumerate(group_of):
        rows = slice(t["spectrum_begin"][layer], t["spectrum_begin"][layer + 1])
        measured[layer] = (t["weight"][rows] * table[rows, group.column]).sum()
    watched = np.array([group.holds and not group.first for group in group_of], dtype=np.bool_)
    held = held_layers(measured, t["ready"], watched)

    ratio = np.empty(len(group_of))
    for layer, group in enumerate(group_of):
        if not math.isnan(measured[layer]):
            gain = measured[layer] - stable_rank[layer]
            rate = _FORMULAS[group.rule](group, unbounded[layer], gain, held[layer])
            unbounded[layer] = max(rate, group.floor)
            stable_rank[layer] = measured[layer]
        applied = applied_rate(unbounded[layer], group.lowest, group.highest)
        eta[t["parameter"][layer]] = applied
        ratio[layer] = applied / group.initial_lr

    for at, lead, its_group in zip(t["follower"], t["leader"], t["follower_group"], strict=True):
        if lead != NO_LEADER and len(ratio):
            group = groups[its_group]
            rate = group.initial_lr * (ratio.sum() / len(ratio) if lead == MEAN_OF_ALL else ratio[lead])
            eta[at] = applied_rate(rate, group.lowest, group.highest)
