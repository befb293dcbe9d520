"""Rules that give layers with a light tail a higher learning rate than layers with a heavy one.

Random weights have a light tail (a large exponent), so a layer with a light tail has learned little so far.
Both rules here map the tail exponents of the layers linearly to ratios of the learning rate, and differ in
the bounds and in the layers that they leave out. The formulas are those of the authors' public code; see
"Layer-wise rates" in the documentation for where a paper and its code differ, and where we differ from both.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from rmsgd.tails import LayerTail, TailReport


def linear_map(alphas: Sequence[float], lowest: float, highest: float) -> list[float]:
    """The ratio of every layer by its tail exponent, from ``lowest`` at the least to ``highest`` at the
    largest:

        r = lowest + (highest - lowest) (alpha - min alpha) / (max alpha - min alpha)

    An exponent of inf is the lightest tail of all: the map is that of the others. Where all are the same
    there is nothing to balance, and every ratio is 1, within the bounds.
    """
    finite = [alpha for alpha in alphas if math.isfinite(alpha)]
    least, largest = min(finite, default=0.0), max(finite, default=0.0)
    if len(finite) == len(alphas) and least == largest:
        return [min(max(1.0, lowest), highest)] * len(alphas)
    width = largest - least or math.inf
    shares = [(alpha - least) / width if math.isfinite(alpha) else 1.0 for alpha in alphas]
    return [lowest + (highest - lowest) * share for share in shares]


@dataclass(frozen=True)
class TailRule:
    """A linear map of tail exponents: a function from a ``TailReport`` to the ratios of its layers.

    Give ``LayerRates`` one with other numbers by ``dataclasses.replace(rmsgd.tail_rules.LLR, highest=3.0)``.
    """

    name: str
    help: str
    """A line on what it computes."""
    lowest: float
    """The ratio of the layer with the heaviest tail."""
    highest: float
    """The ratio of the layer with the lightest tail."""
    spare_ends: bool = False
    """Whether the first and the last layer keep the ratio 1."""
    least_values: int = 0
    """Layers with fewer eigenvalues keep the ratio 1."""
    at_highest: tuple[str, ...] = ()
    """Patterns, such as "*head": a layer of which a part of the name matches one, as "lm_head.weight" does,
    is given ``highest`` and has no part in the map."""
    within: Callable[[str], object] | None = None
    """Gives the set in which a layer is balanced, by the layer's name; None makes all layers one set."""
    gradual: bool = False
    """Whether rates move to new ones over half of the steps between two measurements, unless ``transition``
    of ``LayerRates`` says something else."""

    measures = "tails"
    """The kind of measurement that ``LayerRates`` takes for this rule."""

    def __call__(self, report: TailReport) -> dict[str, float]:
        """Return the ratios, without a unit, of the layers that could be measured, by their names."""
        ends = (*report.layers[:1], *report.layers[-1:]) if self.spare_ends else ()
        spared = {layer.name for layer in ends}
        ratios: dict[str, float] = {}
        sets: dict[object, list[LayerTail]] = {}
        for layer in report.measured:
            if any(fnmatchcase(part, like) for part in layer.name.split(".") for like in self.at_highest):
                ratios[layer.name] = self.highest
            elif layer.name in spared or layer.values < self.least_values or math.isnan(layer.alpha):
                ratios[layer.name] = 1.0
            else:
                sets.setdefault(self.within(layer.name) if self.within else None, []).append(layer)
        for layers in sets.values():
            mapped = linear_map([layer.alpha for layer in layers], self.lowest, self.highest)
            ratios |= {layer.name: ratio for layer, ratio in zip(layers, mapped, strict=True)}
        return {layer.name: ratios[layer.name] for layer in report.measured}


TEMPBALANCE = TailRule(
    "tempbalance",
    "tail exponents mapped to 0.5 to 1.5 of the rate",
    lowest=0.5,
    highest=1.5,
    spare_ends=True,
    least_values=50,
)
"""TempBalance: Zhou et al., "Temperature Balancing, Layer-wise Weight Analysis, and Neural Network Training"
(NeurIPS 2023), for SGD on images, after every epoch."""

LLR = TailRule(
    "llr",
    "tail exponents mapped to 1 to 5 times the rate, embeddings and heads at 5",
    lowest=1.0,
    highest=5.0,
    least_values=50,
    at_highest=("*emb*", "wte", "wpe", "*head"),
    gradual=True,
)
"""Layerwise Learning Rates: He et al., "One LR Doesn't Fit All: Heavy-Tail Guided Layerwise Learning Rates
for LLMs" (ICML 2026), for AdamW and Muon on language models, every 40 to 100 steps. Rates move to new ones
linearly, over half of the steps between two measurements."""

TAIL_RULES = {rule.name: rule for rule in (TEMPBALANCE, LLR)}
"""By name."""
