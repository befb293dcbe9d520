"""The figure of one network, with bars for the metrics of every layer.

It is drawn like the figures of ``rmsgd.plots``: without a display, for every kind of colour vision, and with
matplotlib imported when it is needed. Every layer has a row of its own, as high as its name, so a figure
grows with the network.
"""

import math
import os
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np

from rmsgd.inspection.report.text import label, summary
from rmsgd.metrics import SCALARS, LayerMetrics, Metric, measured
from rmsgd.plots import PALETTE, blank, save, short_names

_ROW = 0.15  # inches: a line of 7 points
_TALLEST = 80.0  # inches: beyond it rows become thinner and only some are named


def draw_layers(layers: Sequence[LayerMetrics], path: str | os.PathLike[str]) -> None:
    """Draw bars of every measured layer's metrics, those of ``metrics.SCALARS``, the input at the top.

    Layers whose low rank is empty are grey. They have quality 0 and condition number 1 by definition.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: no layer was measured, or the suffix names no format of figures.
    """
    layers = measured(layers)
    if not layers:
        raise ValueError("no layer was measured: there is nothing to draw")
    figure = blank(10.0 / 3 * len(SCALARS), 1.4 + rows_height(len(layers)))
    panels = figure.subplots(1, len(SCALARS), sharey=True)
    empty = [not any(layer.rank) for layer in layers]
    rows = np.arange(len(layers))
    for axes, colour, metric in zip(panels, cycle(PALETTE), SCALARS, strict=False):
        values = [getattr(layer, metric.name) for layer in layers]
        colours = ["0.75" if nothing else colour for nothing in empty]
        axes.barh(rows, np.nan_to_num(values, nan=0.0, posinf=0.0), color=colours, height=0.75)
        longest = max((value for value in values if math.isfinite(value)), default=0.0)
        axes.set(xlabel=axis_label(metric), xlim=(0, longest * 1.05 or 1))
        axes.grid(axis="x", color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labeltop=len(layers) > 60)
    name_rows(panels[0], [layer.name for layer in layers])
    note = "; grey: nothing stands out from the noise" if any(empty) else ""
    figure.suptitle(f"{summary(layers)}{note}", fontsize=10)
    save(figure, path)


def axis_label(metric: Metric) -> str:
    """A metric's name on an axis, and below it the meaning and range of its numbers."""
    return f"{metric.label}\n({metric.meaning}, {metric.range})"


def rows_height(rows: int) -> float:
    """The height of rows in inches, at most ``_TALLEST``."""
    return min(max(rows, 6) * _ROW, _TALLEST)


def name_rows(axes: Any, names: Sequence[str]) -> None:
    """Order the layers from the top down, and name as many as there is room for."""
    step = math.ceil(len(names) * _ROW / rows_height(len(names)))
    named = range(0, len(names), step)
    labels = short_names(names, 48)
    axes.set_yticks(list(named), labels=[label(labels[i]) for i in named], fontsize=7)
    axes.set_ylim(len(names) - 0.5, -0.5)
