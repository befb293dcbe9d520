"""The way from the rates before a measurement to those that it has set."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Transition:
    """Rates that move linearly to new ones, in steps of the optimizer.

    With r the rate before a measurement and r' the one that it has set, the k-th step after it takes

        r + (r' - r) min(k / n, 1)
    """

    steps: int = 0
    """n; 0 where new rates hold at once."""
    taken: int = 0
    """The optimizer's steps since the last measurement, k of the last one."""
    begin: Mapping[Tensor, float] = field(default_factory=dict)
    """r of the parameters, before their groups' lr; one that has none here has r' at once."""

    def share(self, k: int) -> float:
        """How much of the way the k-th step has gone, from 0 to 1."""
        return min(k / self.steps, 1.0) if self.steps else 1.0

    @property
    def moves(self) -> bool:
        """Whether the next step takes other rates than the measurement has set."""
        return self.share(self.taken + 1) < 1.0

    def at(self, k: int, rates: Mapping[Tensor, float]) -> dict[Tensor, float]:
        """The rates of the k-th step, where the measurement has set ``rates``."""
        share = self.share(k)
        return {p: between(self.begin.get(p, rate), rate, share) for p, rate in rates.items()}


def between(begin: float, end: float, share: float) -> float:
    """The number that is this share of the way from one to another, exactly ``end`` where that is 1."""
    return end if share == 1.0 else begin + (end - begin) * share
