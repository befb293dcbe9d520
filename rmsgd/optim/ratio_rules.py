"""Rules that are functions from what was measured to the ratios of the layers, a user's own among them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from rmsgd.optim.options import AT_LEAST_0, in_short, listed

RatioRule: TypeAlias = Callable[[Any], Mapping[str, float]]
"""From a ``Report``, or a ``TailReport`` where the function has ``measures = "tails"``, to multiples of the
learning rate by the names of layers. A layer that it leaves out keeps its rate."""


def measures_tails(rule: RatioRule) -> bool:
    """Whether a rule wants the tail exponents of the layers, and not the metrics of their low-rank parts."""
    return getattr(rule, "measures", None) == "tails"


def name_of(rule: RatioRule) -> str:
    """What a rule is called in checkpoints."""
    return str(getattr(rule, "name", None) or getattr(rule, "__name__", None) or type(rule).__name__)


def checked_ratios(ratios: object, names: Sequence[str]) -> dict[str, float]:
    """What a rule has returned, for layers of these names.

    Raises:
        TypeError: it is no mapping.
        ValueError: there is no layer of a name, or a ratio is no finite number of 0 or more.
    """
    if not isinstance(ratios, Mapping):
        raise TypeError(f"a rule must return a dict of ratios by the names of layers, got {in_short(ratios)}")
    unknown = [str(name) for name in ratios if name not in names]
    if unknown:
        raise ValueError(
            f"the rule gave ratios of {listed(unknown)}: no such layer was measured, only {listed(names)}"
        )
    holds, expected = AT_LEAST_0
    for name, ratio in ratios.items():
        if not holds(ratio):
            raise ValueError(f"the ratio of {name} must be {expected} and finite, got {in_short(ratio)}")
    return {name: float(ratio) for name, ratio in ratios.items()}
