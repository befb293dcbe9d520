"""When a ratio of times counts as slower: the one rule of the gate.

A figure is a ratio of times, measured in rounds. Each round gives the logarithm of the ratio. The rounds so
far are cut into BATCHES consecutive batches, and each batch is represented by its median, which outliers do
not move. Other work on the machine lasts longer than a round, so rounds resemble their neighbours. Batches
are long and grow with the run, so they are nearly independent (the method of batch means). Student's t of the
batches' medians gives the interval of the figure.

The figure is slower when its whole interval lies above the limit, and passed when it lies below. Otherwise it
is undecided and timed further. It is judged at LOOKS fixed times. Repeated looks give chance more
opportunities, so every look spends ERROR / LOOKS (Bonferroni): over all looks together, a figure at its limit
is decided either way with a probability of at most ERROR.
"""

import math
from enum import StrEnum

import numpy as np
import numpy.typing as npt
from scipy import stats

from bench.measure import Interval

BATCHES = 16
LEAST = 3
"""The least rounds in a batch for a verdict, since shorter batches resemble each other."""

LOOKS = 8
ERROR = 0.01


class Verdict(StrEnum):
    """The verdict on a figure."""

    PASSED = "passed"
    SLOWER = "slower"
    UNDECIDED = "undecided"


def interval(logs: npt.ArrayLike, error: float = ERROR / LOOKS) -> Interval:
    """The ratio and its confidence interval from the rounds' log ratios, shape (rounds,).

    The interval is (0, inf) while the batches are too short.
    """
    rounds = np.asarray(logs, dtype=np.float64)
    if len(rounds) < LEAST * BATCHES:
        return Interval(math.exp(np.median(rounds)), 0.0, math.inf)
    medians = [np.median(batch) for batch in np.array_split(rounds, BATCHES)]
    centre = float(np.mean(medians))
    reach = float(stats.t.ppf(1 - error / 2, BATCHES - 1) * stats.sem(medians))
    return Interval(math.exp(centre), math.exp(centre - reach), math.exp(centre + reach))


def judge(measured: Interval, limit: float) -> Verdict:
    """The verdict: slower when the whole interval lies above `limit`, passed when it lies below."""
    if measured.low is not None and measured.low > limit:
        return Verdict.SLOWER
    if measured.high is not None and measured.high < limit:
        return Verdict.PASSED
    return Verdict.UNDECIDED
