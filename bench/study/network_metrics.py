"""The numbers that describe a network's weights in a study: Q, and the means of the other metrics."""

from rmsgd import Report
from rmsgd.metrics import AT_EPOCH_ENDS, NETWORK_QUALITY, QUALITY, mean

Q = NETWORK_QUALITY.symbol

AVERAGED = tuple(metric for metric in AT_EPOCH_ENDS if metric is not QUALITY)

LABELS = {Q: Q, **{metric.name: metric.label for metric in AVERAGED}}
"""The columns of records, and their names in tables."""
AXES = {Q: Q, **{metric.name: f"{metric.label}, mean" for metric in AVERAGED}}
"""Their names in figures."""


def network_metrics(report: Report) -> dict[str, float]:
    """The columns' values; NaN where no layer was measured."""
    return {Q: report.quality, **{metric.name: mean(metric, report.layers) for metric in AVERAGED}}
