"""When a ratio of times counts as slower: the one rule of the gate.

A figure is a ratio of times, measured in rounds; a round gives the logarithm of the ratio. The rounds so
far are cut into BATCHES consecutive batches, and each batch speaks with its median, which outliers do not
move. What a busy machine does lasts longer than a round, so that rounds resemble their neighbours; batches
are long and grow with the run, so that they are as good as independent (the method of batch means).
Student's t of the batches' medians gives the interval of the figure.

The figure is slower when its whole interval lies above the limit, passed when it lies below, and else
undecided and timed on. It is judged at LOOKS fixed times. Looking repeatedly gives chance more
opportunities, so every look spends ERROR / LOOKS (Bonferroni): over all looks together, a figure that is
at its limit is called either way with a probability of ERROR at most.
"""

import math
from enum import StrEnum

import numpy as np
import numpy.typing as npt
from scipy import stats

from bench.measure import Interval

BATCHES = 16
LEAST = 3
"""Rounds in a batch below which nothing is said: shorter batches resemble each other."""

LOOKS = 8
ERROR = 0.01


class Verdict(StrEnum):
    """What is known of a figure."""

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
    """Slower when the whole interval lies above `limit`, passed when it lies below."""
    if measured.low is not None and measured.low > limit:
        return Verdict.SLOWER
    if measured.high is not None and measured.high < limit:
        return Verdict.PASSED
    return Verdict.UNDECIDED
