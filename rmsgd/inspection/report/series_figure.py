"""The figure of a series: its metrics over the training, one layer's parts, and a map of quality."""

import math
import os
import re
from collections.abc import Sequence
from itertools import cycle, takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rmsgd.inspection.probing import Probing
from rmsgd.inspection.report.layer_bars import axis_label, name_rows, rows_height
from rmsgd.inspection.report.series import Series, comparable_name
from rmsgd.inspection.report.text import label
from rmsgd.inspection.selection import Selection
from rmsgd.layers import as_matrix, unfoldings
from rmsgd.lowrank import evbmf
from rmsgd.metrics import AVERAGED, NETWORK_QUALITY, QUALITY, LayerMetrics
from rmsgd.plots import PALETTE, blank, save, short_names

_SHOWN = (96, 192)  # the rows and columns of a matrix that are drawn
_PARTS = 5  # the number of checkpoints whose parts are drawn


def plot_series(
    series: Series, path: str | os.PathLike[str], layer: str | None = None, key: str | None = None
) -> None:
    """Draw to a file: quality over layers and checkpoints, metrics over the training, and one layer's parts.

    The parts are low rank and noise of ``layer``, by default of the layer whose quality changed most. They
    are read again from ``series.sources``, which must be paths.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: no layer was measured, ``layer`` is not one of those that were, or the suffix names no
            format of figures.
    """
    by_layer = series.by_layer()
    if not by_layer:
        raise ValueError("no layer was measured: there is nothing to draw")
    shown = _most_changed(by_layer) if layer is None else layer
    if shown not in by_layer:
        shown = comparable_name(shown)
    if shown not in by_layer:
        raise ValueError(f"there is no measured layer {layer!r}")
    heights = [2.6, 3.0, 1.4 + rows_height(len(by_layer))]
    figure = blank(11.0, sum(heights))
    courses, parts, map_ = figure.subfigures(3, 1, height_ratios=heights)
    labels = checkpoint_labels(series.sources)
    _draw_courses(courses, series, labels)
    _draw_parts(parts, series, shown, by_layer[shown], labels, key)
    _draw_map(map_, series, list(by_layer), labels)
    save(figure, path)


def checkpoint_labels(sources: Sequence[str]) -> list[str]:
    """Labels that distinguish the sources: their names without the start and the end that all share."""
    # Words and numbers are not split: epoch_10 and epoch_12 become 10 and 12.
    parts = [re.findall(r"\d+|[^\W\d_]+|[\W_]", source) for source in sources]
    start, end = _alike(parts), _alike([part[::-1] for part in parts])
    if any(len(part) <= start + end for part in parts):
        return [os.path.basename(source) for source in sources]
    return ["".join(part[start : len(part) - end]) for part in parts]


def _alike(rows: Sequence[Sequence[str]]) -> int:
    """How many first entries all rows share."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))


def low_rank_and_noise(weight: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The two parts of a weight's first unfolding, (L, M) each; their sum is the weight."""
    matrix = as_matrix(weight.detach(), unfoldings(weight.shape)[0]).double()
    found = evbmf(matrix, vectors=True)
    assert found.U is not None
    assert found.Vh is not None
    low = (found.U * found.singular_values) @ found.Vh
    return low.cpu().numpy(), (matrix - low).cpu().numpy()


# -- the panels of a series ----------------------------------------------------------------------


def _draw_courses(figure: Any, series: Series, labels: Sequence[str]) -> None:
    """Mean and range of stable rank and condition over the layers, and Q (the paper's Figure 3)."""
    panels = figure.subplots(1, len(AVERAGED) + 1)
    across = np.arange(len(labels))
    for axes, colour, metric in zip(panels, cycle(PALETTE), AVERAGED, strict=False):
        values = series.values(metric.name)
        values = np.where(np.isfinite(values), values, np.nan)
        known = ~np.isnan(values).all(axis=0)
        at, columns = across[known], values[:, known]
        axes.fill_between(
            at,
            np.nanmin(columns, axis=0),
            np.nanmax(columns, axis=0),
            color=colour,
            alpha=0.2,
            linewidth=0,
            label="lowest to highest layer",
        )
        axes.plot(at, np.nanmean(columns, axis=0), color=colour, marker=_marker(labels), label="mean")
        axes.set_ylabel(axis_label(metric), fontsize=8)
        axes.legend(frameon=False, fontsize=7)
    q = [report.quality for report in series.reports]
    panels[-1].plot(across, q, color=PALETTE[len(AVERAGED)], marker=_marker(labels))
    panels[-1].set_ylabel(f"{NETWORK_QUALITY.label}\n({NETWORK_QUALITY.meaning})", fontsize=8)
    for axes in panels:
        _name_columns(axes, labels)
        axes.grid(color="0.9", linewidth=0.6)
        top = axes.dataLim.y1  # infinite where no layer has the metric, as matrices of two rows have no tail
        axes.set_ylim(0, top * 1.05 if 0 < top < math.inf else 1)
        axes.spines[["top", "right"]].set_visible(False)


def _draw_parts(
    figure: Any,
    series: Series,
    name: str,
    row: Sequence[LayerMetrics | None],
    labels: Sequence[str],
    key: str | None,
) -> None:
    """Draw low rank above noise at a few checkpoints, in one scale of colours (the paper's Figure 1a)."""
    known = [i for i, layer in enumerate(row) if layer is not None]
    chosen = np.unique(np.linspace(0, len(known) - 1, min(_PARTS, len(known))).round().astype(int))
    pairs = []
    for i in (known[c] for c in chosen):
        layer = row[i]
        assert layer is not None
        weight = Probing(series.sources[i], Selection(key=key)).weight(layer.name)
        pairs.append((labels[i], *low_rank_and_noise(weight)))
    rows, columns = (min(size, most) for size, most in zip(pairs[0][1].shape, _SHOWN, strict=True))
    shown = [part[:rows, :columns] for _, *parts in pairs for part in parts]
    scale = max(float(np.quantile(np.abs(part), 0.995)) for part in shown) or 1.0
    panels = figure.subplots(2, len(pairs), squeeze=False)
    for column, (point, low, noise) in enumerate(pairs):
        size = float(np.abs(low + noise).max()) or 1.0  # squares of huge weights have no float64
        energy = float((((low + noise) / size) ** 2).sum()) or 1.0
        for axes, part in zip(panels[:, column], (low, noise), strict=True):
            image = axes.imshow(
                part[:rows, :columns],
                cmap="PuOr",
                vmin=-scale,
                vmax=scale,
                aspect="auto",
                interpolation="nearest",
            )
            axes.set(xticks=[], yticks=[])
        share = 100 * float(((low / size) ** 2).sum()) / energy
        panels[0, column].set_title(f"{label(point)}: low rank has {share:.0f} % of the energy", fontsize=7)
    panels[0, 0].set_ylabel("low rank")
    panels[1, 0].set_ylabel("noise")
    figure.colorbar(image, ax=panels, label="weight", pad=0.01)
    subject = f"{label(short_names([name], 60)[0])} (the first {rows} x {columns} entries)"
    figure.suptitle(f"Low rank and noise of layer {subject}", fontsize=9)


def _draw_map(figure: Any, series: Series, names: Sequence[str], labels: Sequence[str]) -> None:
    """Quality over layers and checkpoints (the paper's Figure 1b)."""
    from matplotlib.colors import PowerNorm

    axes = figure.subplots()
    values = series.values(QUALITY.name)
    axes.set_facecolor("0.85")  # it shows where a layer was not measured
    # Colours follow the root, since few layers of high quality would leave all others in one dark shade.
    scale = PowerNorm(0.5, vmin=0, vmax=float(np.nanmax(values)) or 1.0)
    image = axes.imshow(values, aspect="auto", cmap="viridis", norm=scale, interpolation="nearest")
    name_rows(axes, names)
    _name_columns(axes, labels)
    gap = 0.15 / rows_height(len(names))  # 0.15 inches as a share of the map's height, as matplotlib takes it
    figure.colorbar(
        image,
        ax=axes,
        label=f"{QUALITY.label} of every layer ({QUALITY.meaning})",
        location="top",
        aspect=60,
        pad=gap,
    )


def _most_changed(by_layer: dict[str, list[LayerMetrics | None]]) -> str:
    """The layer whose quality changed most, among those small enough to be factorised in a second."""

    def change(name: str) -> tuple[bool, float]:
        known = [layer for layer in by_layer[name] if layer is not None]
        small = unfoldings(known[0].shape)[0].L <= 1024
        return small, abs(known[-1].quality - known[0].quality)

    return max(by_layer, key=change)


# -- axes ----------------------------------------------------------------------------------------


def _name_columns(axes: Any, labels: Sequence[str]) -> None:
    step = math.ceil(len(labels) / 12)
    named = range(0, len(labels), step)
    shown = short_names(labels, 24)
    longest = max(len(shown[i]) for i in named)
    axes.set_xticks(list(named), labels=[label(shown[i]) for i in named], fontsize=7)
    axes.tick_params(axis="x", rotation=0 if longest * len(named) < 40 else 45)
    axes.set_xlabel("checkpoint")


def _marker(labels: Sequence[str]) -> str:
    return "o" if len(labels) <= 20 else ""
