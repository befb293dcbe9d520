"""How sections share the time there is."""

from collections.abc import Sequence
from dataclasses import dataclass

LEAST_S = 5.0
"""Less than this is no use to any section."""


@dataclass(frozen=True)
class Need:
    """Seconds of a section: what it usually takes, and what it may take at most."""

    typical: float
    longest: float


def share(need: Need, later: Sequence[Need], remaining: float) -> float:
    """Seconds that a section may take; 0 where there is no time for it.

    What later sections usually take is kept for them, but not at the cost of this section's own usual
    time: when all are short of time, the earlier ones go first.
    """
    spare = remaining - sum(other.typical for other in later)
    seconds = min(need.longest, max(spare, min(need.typical, remaining)))
    return seconds if seconds >= LEAST_S else 0.0
