"""The learning-rate rules: what each of them is called, measures, keeps and allows."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rmsgd import reference


@dataclass(frozen=True)
class Rule:
    """How the learning rate of a layer moves at an epoch end, and how its parameters take a step."""

    name: str
    arithmetic: int
    """Which formula moves eta: ``reference.PAPER``, ``RELEASE`` or ``PUBLISHED``."""
    velocity: bool
    """Whether past gradients are kept as Algorithm 1 keeps them, or as torch's SGD does."""
    initial_rank: str
    """What ``initial_rank=None`` means."""
    floor: float | None = None
    """The smallest eta; None: the option ``min_lr``."""
    anchor: float = 0.0
    """What eta decays to without gains, as a multiple of lr0; 0 in Algorithm 1."""
    weighs_resolution: bool = False
    """Whether a gain counts for less where the stable rank is coarse; see ``layers.resolution_weight``."""
    lowest: float = 0.0
    highest: float = math.inf
    """Bounds of the rate that is applied, as multiples of lr0. eta itself moves beyond them."""


RULES: Mapping[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(
            "bounded",
            reference.PAPER,
            velocity=True,
            initial_rank="measure",
            floor=-math.inf,
            anchor=1.0,
            weighs_resolution=True,
            lowest=0.5,
            highest=2.0,
        ),
        Rule("paper", reference.PAPER, velocity=True, initial_rank="zero"),
        Rule("release", reference.RELEASE, velocity=False, initial_rank="zero", floor=0.0),
        Rule("published", reference.PUBLISHED, velocity=False, initial_rank="zero", floor=1e-10),
    )
}
