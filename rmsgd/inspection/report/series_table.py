"""A series of checkpoints as a table for the terminal."""

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType

from rmsgd.inspection.report.series import Series
from rmsgd.inspection.report.text import from_to, name_cell, shape_text, terminal_table
from rmsgd.metrics import AVERAGED, NETWORK_QUALITY, QUALITY, SCALARS, mean


def series_table(series: Series) -> RenderableType:
    """A row per checkpoint with the means over its layers, then a row per layer with its values over time."""
    names = ("layers", *(f"{metric.heading}, mean" for metric in AVERAGED), NETWORK_QUALITY.heading)
    checkpoints = terminal_table("checkpoints", "source", names)
    for source, report in zip(series.sources, series.reports, strict=True):
        means = (metric.text(mean(metric, report.layers)) for metric in AVERAGED)
        q = NETWORK_QUALITY.text(report.quality)
        checkpoints.add_row(name_cell(source), str(len(report.measured)), *means, q)
    names = ("shape", *(metric.heading for metric in SCALARS), f"{QUALITY.heading} over time")
    layers = terminal_table("layers, from the first checkpoint to the last", "layer", names)
    for name, row in series.by_layer().items():
        known = [layer for layer in row if layer is not None]
        first, last = known[0], known[-1]
        layers.add_row(
            name_cell(name),
            shape_text(last.shape),
            *(from_to(m, getattr(first, m.name), getattr(last, m.name)) for m in SCALARS),
            sparkline([math.nan if layer is None else layer.quality for layer in row]),
        )
    return Group(checkpoints, layers)


def sparkline(values: Sequence[float]) -> str:
    """A line of blocks whose heights show the values, from the least to the largest; NaN is a space."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return ""
    low, span = min(known), max(known) - min(known)
    blocks = "▁▂▃▄▅▆▇█"
    return "".join(
        " " if math.isnan(value) else blocks[round((value - low) / span * 7) if span > 0.0 else 0]
        for value in values
    )
