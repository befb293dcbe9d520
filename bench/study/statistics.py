"""SciPy's tests whether a difference is real, and whether two quantities correlate."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from bench.measure import CONFIDENCE

Floats = NDArray[np.float64]
FEWEST_CLUSTERS = 5
"""With fewer, resamples of them say nothing."""

POWER = 0.8
"""The probability with which a difference that counts as detectable is seen."""


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


def paired(a: ArrayLike, b: ArrayLike) -> Difference:
    """a minus b, pair by pair: Student's t of the differences, with the interval of `CONFIDENCE`.

    Differences that are all the same, as of accuracies over few images, have no spread to judge them by. p is
    then 1, and the interval is not known (NaN) unless they are 0.

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
    interval = found.confidence_interval(CONFIDENCE)
    return Difference(
        float(differences.mean()), float(interval.low), float(interval.high), float(found.pvalue)
    )


def mean_interval(values: ArrayLike) -> tuple[float, float]:
    """The interval of a mean by Student's t at `CONFIDENCE`; NaN for fewer than two values."""
    known = np.asarray(values, dtype=np.float64)
    if known.size < 2:
        return float("nan"), float("nan")
    half = stats.t.ppf((1 + CONFIDENCE) / 2, known.size - 1) * known.std(ddof=1) / np.sqrt(known.size)
    return float(known.mean() - half), float(known.mean() + half)


def holm(values: Sequence[float]) -> list[float]:
    """p values corrected for having been several (Holm, 1979), in the order given."""
    order = np.argsort(values)
    corrected = np.maximum.accumulate([(len(values) - rank) * values[i] for rank, i in enumerate(order)])
    result = np.empty(len(values))
    result[order] = np.minimum(corrected, 1.0)
    return result.tolist()


def correlation(x: ArrayLike, y: ArrayLike) -> Correlation | None:
    """The correlation of two quantities; None for fewer than three points or a constant quantity.

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


def detectable(deviation: float, pairs: int) -> float:
    """The smallest mean difference that a paired t test of so many pairs sees with a probability of `POWER`.

    A difference is seen where the interval of `CONFIDENCE` leaves 0 out.

    Args:
        deviation: the standard deviation of the differences of single pairs.
        pairs: the number of pairs; for fewer than three, which would need many deviations, NaN is returned.

    Returns:
        The difference, in the unit of `deviation`.

    """
    if pairs < 3 or not deviation > 0:
        return float("nan")
    beyond = stats.t.ppf((1 + CONFIDENCE) / 2, pairs - 1)

    def excess(shift: float) -> float:
        # Far out, where any test sees the difference, SciPy's distribution is no number, or warns.
        with np.errstate(divide="ignore"):
            seen = stats.nct.sf(beyond, pairs - 1, shift) + stats.nct.cdf(-beyond, pairs - 1, shift)
        return float(np.nan_to_num(seen, nan=1.0)) - POWER

    # Solved for in standard errors, so that the answer is proportional to the deviation.
    return float(optimize.brentq(excess, 0.0, 10 * beyond)) * deviation / float(np.sqrt(pairs))


def bootstrapped(
    x: ArrayLike,
    y: ArrayLike,
    clusters: Sequence[object],
    centred: bool = False,
    resamples: int = 2000,
) -> dict[str, tuple[float, float, float]] | None:
    """PLCC and ROCC with bootstrap intervals (percentiles, clusters resampled with replacement).

    Args:
        x, y: the two quantities.
        clusters: what each point belongs to: points of one cluster are drawn together.
        centred: correlate what is left of both when each cluster's means are taken away; then points are
            drawn within their clusters.
        resamples: draws.

    Returns:
        "plcc" and "rocc" to (value, low, high); None for fewer than three points, a constant quantity, or,
        unless `centred`, fewer than five clusters.

    """
    across, up = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    known = np.isfinite(across) & np.isfinite(up)
    of_cluster = np.unique([str(name) for name in clusters], return_inverse=True)[1]
    if centred:
        sizes = np.bincount(of_cluster[known], minlength=of_cluster.max(initial=0) + 1)
        known &= sizes[of_cluster] > 1
    across, up = across[known], up[known]
    member = np.eye(of_cluster.max(initial=-1) + 1)[of_cluster[known]]  # (points, clusters)
    member = member[:, member.any(0)]
    if len(across) < 3 or (not centred and member.shape[1] < FEWEST_CLUSTERS):
        return None
    # How often each point is in a resample; the first is the sample itself.
    times = np.ones((resamples + 1, len(across)))
    random = np.random.default_rng(0)
    if centred:
        for column in member.T.astype(bool):
            count = int(column.sum())
            times[1:, column] = random.multinomial(count, np.full(count, 1 / count), size=resamples)
    else:
        count = member.shape[1]
        times[1:] = random.multinomial(count, np.full(count, 1 / count), size=resamples) @ member.T
    a, b = (np.broadcast_to(values, times.shape) for values in (across, up))
    if centred:
        a, b = (values - (times * values) @ member / (times @ member) @ member.T for values in (a, b))
    found = {"plcc": _pearson(a, b, times), "rocc": _pearson(_ranks(a, times), _ranks(b, times), times)}
    if any(np.isnan(values[0]) for values in found.values()):
        return None
    tail = 50 * (1 - CONFIDENCE)
    ends = {name: np.nanpercentile(values[1:], [tail, 100 - tail]) for name, values in found.items()}
    return {
        name: (float(values[0]), float(ends[name][0]), float(ends[name][1])) for name, values in found.items()
    }


def _pearson(a: Floats, b: Floats, times: Floats) -> Floats:
    """Pearson's correlation along the rows of (samples, points), each point so many times; NaN: constant."""
    total = times.sum(1, keepdims=True)
    a, b = (values - (times * values).sum(1, keepdims=True) / total for values in (a, b))
    product, squares = (times * a * b).sum(1), (times * a * a).sum(1) * (times * b * b).sum(1)
    return np.where(squares > 1e-24, product / np.sqrt(np.maximum(squares, 1e-24)), np.nan)


def _ranks(values: Floats, times: Floats) -> Floats:
    """Ranks along the rows of (samples, points), each point so many times, ties at their mean rank."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered, weights = (np.take_along_axis(array, order, axis=1) for array in (values, times))
    ends = np.cumsum(weights, axis=1)
    new = np.ones(values.shape, dtype=bool)
    new[:, 1:] = np.diff(ordered, axis=1) > 1e-12
    # The mean rank of a run of ties lies between the weight before it and the weight at its end.
    before = np.maximum.accumulate(np.where(new, ends - weights, 0.0), axis=1)
    last = np.ones(values.shape, dtype=bool)
    last[:, :-1] = new[:, 1:]
    after = np.flip(np.minimum.accumulate(np.flip(np.where(last, ends, np.inf), 1), axis=1), 1)
    ranks = np.empty_like(ends)
    np.put_along_axis(ranks, order, (before + after + 1) / 2, axis=1)
    return ranks


def in_deviations(mean: float, deviation: float, other: float, other_deviation: float) -> float:
    """(mean - other) / sqrt(both variances), leaving out a deviation that is not known; NaN without any."""
    variance = sum(value**2 for value in (deviation, other_deviation) if np.isfinite(value))
    return (mean - other) / float(np.sqrt(variance)) if variance > 0 else float("nan")
