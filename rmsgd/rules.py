"""The learning-rate rules: their formulas in plain float64, and all other differences between them.

A rule is one ``Rule`` here. Its formula stands once more, compiled for CPU and GPU, in
``csrc/evbmf/rates.h``. Nothing else in the package depends on which rule is used.
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

eta is a rate before the group's multiplier, ``gain`` is ``s(t+1) - s(t)``, and ``held`` says that the
release's not_ready list holds the layer.
``group.decay`` is gamma at an epoch end that decays, else 1, and ``group.zeta`` is the value before it.
"""


def algorithm_1(group: RateGroup, eta: float, gain: float, held: bool) -> float:
    """Algorithm 1 of the paper around an anchor a, 0 in the paper: ``a + beta (eta - a) + zeta gain``.

    Without gains a rate decays to the anchor. gamma decays eta and zeta.
    """
    change = group.beta * (group.decay * eta - group.anchor) + group.zeta * group.decay * gain
    return group.anchor + change


def release(group: RateGroup, eta: float, gain: float, held: bool) -> float:
    """The formula of rmsgd 1.0.2: the first epoch end gives ``(1 + beta) lr``, whatever was measured."""
    if group.first:
        gain = group.initial_lr
    elif held:
        gain = (group.initial_lr - group.beta * eta) / group.zeta
    return group.beta * (group.decay * eta) + group.zeta * group.decay * gain


def published(group: RateGroup, eta: float, gain: float, held: bool) -> float:
    """The formula of the branch that made the paper's tables.

    The first epoch end gives lr, gamma decays zeta alone, and the term that holds a layer is not divided by
    zeta.
    """
    if group.first:
        eta, gain = 0.0, group.initial_lr
    elif held:
        gain = group.initial_lr - group.beta * eta
    return group.beta * eta + group.zeta * group.decay * gain


def applied_rate(eta: float, lowest: float, highest: float) -> float:
    """The rate of a step when its rule has come to ``eta``: ``min(max(eta, lowest), highest)``.

    The rule goes on from eta itself. Its gains add up to the stable rank, so a bound on eta would forget the
    gains and keep the losses: a layer that was held at the bound would fall below its first rate as soon as
    its stable rank shrank.
    """
    return min(max(eta, lowest), highest)


# -- the measurement s of a layer ----------------------------------------------------------------


ModeWeights: TypeAlias = Callable[[Sequence[int], float], list[float]]
"""From ``(shape, lr0)`` of a layer to the weight of each of its unfoldings in its measurement s."""


def mean_over_modes(shape: Sequence[int], lr0: float) -> list[float]:
    """The weights of the mean over the modes, which add up to 1."""
    parts = unfoldings(shape)
    modes = sum(len(part.modes) for part in parts)
    return [len(part.modes) / modes for part in parts]


def resolution_weight(L: int, lr0: float) -> float:
    """The weight of a stable rank of L rows beside rates of the size of ``lr0``: ``n^2 / (1 + n^2)``.

    One kept direction more or less moves the stable rank by 1/L. A Wiener filter gives this weight to a
    signal of the size of ``lr0`` under noise of the size of 1/L, with ``n = L lr0``. At a rate of .03 it is
    nearly 1 for 512 rows, .79 for 64 and .08 for 10.
    """
    n = L * lr0
    return n * n / (1.0 + n * n)


def mean_weighed_by_resolution(shape: Sequence[int], lr0: float) -> list[float]:
    """The mean over the modes, each multiplied by its ``resolution_weight``."""
    shares = zip(mean_over_modes(shape, lr0), unfoldings(shape), strict=True)
    return [share * resolution_weight(part.L, lr0) for share, part in shares]


def mean_per_channel(shape: Sequence[int], lr0: float) -> list[float]:
    """The mean of ``sum d_i / (d_1 channels)`` over both modes; a mode without a spectrum counts as 0."""
    modes = 1 if len(shape) == 2 else 2
    return [sum(1.0 / channels for channels in part.channels) / modes for part in unfoldings(shape)]


# -- the rules -----------------------------------------------------------------------------------

Buffer: TypeAlias = Literal["velocity", "momentum_buffer"]


@dataclass(frozen=True)
class Rule:
    """A rule by which the rates of layers move at an epoch end, and what it asks of the steps."""

    name: str
    help: str
    """A line on what it computes."""
    next_rate: NextRate
    number: int
    """The number of its formula in ``csrc/evbmf/rates.h``. Rules with the same formula share it."""
    column: int
    """The metric from which a layer's measurement s is computed, as a column of the table."""
    mode_weights: ModeWeights
    """Gives the weight of each unfolding of a layer in s."""
    initial_rank: Literal["zero", "measure"]
    """The meaning of ``initial_rank=None``."""
    buffer: Buffer
    """The form of past gradients: "velocity" as in Algorithm 1, or "momentum_buffer" as in torch's SGD."""
    leaders_by_name: bool
    """Whether a parameter without a spectrum follows a layer of its group or module instead of the layer
    before it."""
    dimensions: tuple[int, ...] = (2, 3, 4, 5)
    """The numbers of dimensions of the weights that are measured."""
    flat_kernels: bool = True
    """Whether kernels with a side of 1 are measured."""
    holds: bool = False
    """Whether a layer is held at its first rate while its s is 0 (the release's not_ready list)."""
    floor: float | None = None
    """The smallest eta; None for the option ``min_lr``."""
    anchor: float = 0.0
    """The value to which eta decays without gains, as a multiple of lr0; 0 in Algorithm 1."""
    lowest: float = 0.0
    highest: float = math.inf
    """The bounds of the rate that is applied, as multiples of lr0. eta itself may move beyond them."""

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
    help="what the branch behind the paper's tables computes",
    next_rate=published,
    number=2,
    flat_kernels=False,
    floor=1e-10,
)

RULES: Mapping[str, Rule] = {rule.name: rule for rule in (_BOUNDED, _PAPER, _RELEASE, _PUBLISHED)}
"""The rules by name. The first is the default."""

DEFAULT = _BOUNDED.name

REFERENCE_LR = 0.03
"""The learning rate that gains of the stable rank are meant for: the paper's, of SGD with momentum."""

_FORMULAS = {rule.number: rule.next_rate for rule in RULES.values()}

# -- an epoch end --------------------------------------------------------------------------------


def held_layers(
    measured: NDArray[np.float64], ready: NDArray[np.int32], watched: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """The layers that the release's ``not_ready`` list holds at their first rate; updates ``ready``.

    The release walks the list while it removes entries, so it skips the entry after a removed one in that
    pass, which is then neither held nor made ready. ``watched`` leaves layers out of the walk. All are
    (layers,), and ``measured`` is s, a share of full rank.
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
    """Take one epoch end over all layers on the CPU, and update the tables in place.

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
