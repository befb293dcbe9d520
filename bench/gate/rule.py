"""When a ratio of times counts as slower: the statistics of the gate.

A figure is a ratio r of two times, measured in rounds. Per round the logarithm of the two times'
ratio is taken, so that what slows both cancels. The median over rounds estimates log r; its interval
comes from order statistics (the sign test), which asks nothing of the noise's distribution. Noise of
shared machines comes in bursts, which makes rounds worth less than independent ones: the number of
rounds is divided by the integrated autocorrelation time of the signs before the quantiles are chosen.

The figure is judged against a limit at a fixed number of looks. Looking repeatedly gives chance more
opportunities, so every look gets its share of the error (Bonferroni).
"""

import math
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from bench.measure import Interval

LOOKS = 8
ERROR = 0.01
"""Probability, over all looks together, that a figure at its limit is called either way."""

FEWEST_ROUNDS = 20
"""Independent rounds below which nothing is said: the autocorrelation time itself needs some."""

Logs = npt.NDArray[np.float64]


class Verdict(StrEnum):
    """What is known of a figure."""

    PASSED = "passed"
    SLOWER = "slower"
    UNDECIDED = "undecided"


def autocorrelation_time(signs: Logs) -> float:
    """1 + 2 (sum of autocorrelations up to the first that is not positive), of signs, shape (n,)."""
    centred = signs - signs.mean()
    variance = centred @ centred
    total = 1.0
    if variance == 0:
        return total
    for lag in range(1, len(signs) // 3):
        correlation = (centred[lag:] @ centred[:-lag]) / variance
        if correlation <= 0:
            break
        total += 2 * correlation
    return total


def interval(logs: Logs, error: float = ERROR / LOOKS) -> Interval:
    """The ratio and its confidence interval from the rounds' log ratios, shape (n,).

    The interval is (0, inf) while there are too few rounds to say anything at this error.
    """
    centre = float(np.median(logs))
    rounds = len(logs) / autocorrelation_time(np.sign(logs - centre))
    reach = stats.norm.ppf(1 - error / 2) / (2 * math.sqrt(rounds))
    if rounds < FEWEST_ROUNDS:
        return Interval(math.exp(centre), 0.0, math.inf)
    low, high = np.quantile(logs, [0.5 - reach, 0.5 + reach])
    return Interval(math.exp(centre), math.exp(low), math.exp(high))


def judge(measured: Interval, limit: float) -> Verdict:
    """Slower when the whole interval lies above `limit`, passed when it lies below."""
    if measured.low > limit:
        return Verdict.SLOWER
    return Verdict.PASSED if measured.high < limit else Verdict.UNDECIDED


def log_ratio(above: npt.ArrayLike, below: npt.ArrayLike) -> Logs:
    """log(sum of the sources above / sum of those below) per round; both (sources, rounds), seconds."""
    result: Any = np.log(np.sum(above, axis=0)) - np.log(np.sum(below, axis=0))
    return np.asarray(result, dtype=np.float64)
