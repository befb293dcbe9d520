"""How sections share the available time."""

from collections.abc import Sequence
from dataclasses import dataclass

LEAST_S = 5.0
"""The least seconds that are of use to a section."""


@dataclass(frozen=True)
class Need:
    """The seconds that a section usually takes, and those that it may take at most."""

    typical: float
    longest: float


def share(need: Need, later: Sequence[Need], remaining: float) -> float:
    """Seconds that a section may take; 0 where there is no time for it.

    The usual time of later sections is kept for them, unless that would cut this section's own usual time. So
    when time is short, earlier sections go first.
    """
    spare = remaining - sum(other.typical for other in later)
    seconds = min(need.longest, max(spare, min(need.typical, remaining)))
    return seconds if seconds >= LEAST_S else 0.0
