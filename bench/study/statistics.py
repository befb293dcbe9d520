"""Is a difference real, and do two quantities go together? By SciPy's tests."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


class Difference(NamedTuple):
    """Mean of paired differences, its confidence interval, and the p value of "there is none"."""

    mean: float
    low: float
    high: float
    p: float


class Correlation(NamedTuple):
    """Pearson's linear (PLCC) and Spearman's rank-order correlation (ROCC), with p values."""

    plcc: float
    plcc_p: float
    rocc: float
    rocc_p: float
    n: int

    def __str__(self) -> str:
        return f"PLCC {self.plcc:+.2f}, ROCC {self.rocc:+.2f} (n = {self.n})"


def paired(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> Difference:
    """a minus b, pair by pair: Student's t of the differences.

    Differences that are all the same, as of accuracies over few images, show no spread to judge them by: p is
    1, and the interval is not known (NaN) unless they are 0.

    Raises:
        ValueError: the two differ in length, or there are fewer than two pairs.

    """
    above, below = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if above.shape != below.shape or above.size < 2:
        raise ValueError(f"at least two pairs are needed, got {above.size} and {below.size} values")
    differences = above - below
    if np.ptp(differences) <= 1e-9 * np.abs([above, below]).max():
        same = float(differences.mean())
        unknown = 0.0 if same == 0 else float("nan")
        return Difference(same, unknown, unknown, 1.0)
    found = stats.ttest_1samp(differences, 0.0)
    interval = found.confidence_interval(confidence)
    return Difference(
        float(differences.mean()), float(interval.low), float(interval.high), float(found.pvalue)
    )


def holm(values: Sequence[float]) -> list[float]:
    """p values corrected for having been several (Holm, 1979), in the order given."""
    order = np.argsort(values)
    corrected = np.maximum.accumulate([(len(values) - rank) * values[i] for rank, i in enumerate(order)])
    result = np.empty(len(values))
    result[order] = np.minimum(corrected, 1.0)
    return result.tolist()


def correlation(x: ArrayLike, y: ArrayLike) -> Correlation | None:
    """How two quantities go together; None for fewer than three points or a constant one.

    Points with a value that is not a number are left out.
    """
    across, up = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    known = np.isfinite(across) & np.isfinite(up)
    across, up = across[known], up[known]
    if across.size < 3 or np.ptp(across) == 0 or np.ptp(up) == 0:
        return None
    linear, ranked = stats.pearsonr(across, up), stats.spearmanr(across, up)
    return Correlation(
        float(linear.statistic),
        float(linear.pvalue),
        float(ranked.statistic),
        float(ranked.pvalue),
        int(across.size),
    )


def in_deviations(mean: float, deviation: float, other: float, other_deviation: float) -> float:
    """(mean - other) / sqrt(both variances), leaving out a deviation that is not known; NaN without any."""
    variance = sum(value**2 for value in (deviation, other_deviation) if np.isfinite(value))
    return (mean - other) / float(np.sqrt(variance)) if variance > 0 else float("nan")
