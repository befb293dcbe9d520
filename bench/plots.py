"""Figures of the benchmarks, written without a display, for every kind of colour vision.

The functions that draw a whole figure take plain dictionaries and sequences, write one file, whose format
follows the suffix, and return where. Where matplotlib is missing, ModuleNotFoundError says which extra
brings it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rmsgd.plots import DPI, PALETTE, one_panel

DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vP*X<>hd"
# An optimizer looks the same in every figure; those that are compared most differ most.
STYLES = {
    "sgd": (0, "o"),
    "adam": (1, "s"),
    "sam": (2, "D"),
    "rmsgd": (3, "^"),
    "rmsgd-published": (4, "v"),
    "sgdp": (5, "P"),
    "adamp": (6, "*"),
    "adabound": (7, "X"),
    "adabelief": (0, "<"),
    "adagrad": (1, ">"),
    "sls": (2, "h"),
    "rmsgd-release": (3, "d"),
    "rmsgd-paper": (1, "v"),
    "adamw": (7, "s"),
}
"""Optimizer to its colour's index in the palette and its marker."""


def style_of(optimizer: str) -> tuple[str, str]:
    """The colour and the marker of an optimizer, the same in every figure."""
    colour, marker = STYLES.get(optimizer, (len(PALETTE) - 1, "d"))
    return PALETTE[colour], marker


def style(index: int) -> tuple[str, str]:
    """The colour and the marker of what is no optimizer, by its place."""
    return PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)]


def bands_over_time(
    path: Path,
    curves: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]],
    *,
    ylabel: str,
    title: str = "",
    xlabel: str = "time (s)",
) -> Path:
    """Mean of several runs over time for each optimizer, with a band from the lowest to the highest.

    The vertical axis spans what the runs reach in their second half, where they differ by little;
    their first points may lie below it.

    Args:
        path: file to write.
        curves: optimizer name to times and values, both of shape (runs, points). Point i of every
            run is drawn at the mean of their times i. NaN entries (a run that ended early) are
            left out of mean and band.
        ylabel: label of the vertical axis, with its unit.
        title: above the axes.
        xlabel: label of the horizontal axis, with its unit.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: times and values differ in shape, or are not two-dimensional.

    """
    figure, axes = one_panel(title, xlabel, ylabel)
    late: list[float] = []
    for index, (name, (times, values)) in enumerate(curves.items()):
        across, heights = np.asarray(times, dtype=np.float64), np.asarray(values, dtype=np.float64)
        if across.shape != heights.shape or across.ndim != 2:
            raise ValueError(
                f"{name}: times and values must share a shape (runs, points), "
                f"got {across.shape} and {heights.shape}"
            )
        known = ~np.isnan(heights).all(axis=0)
        if not known.any():
            continue
        across, heights = np.where(np.isnan(heights), np.nan, across)[:, known], heights[:, known]
        plain_name = name.split(" ")[0]
        colour = style_of(plain_name)[0] if plain_name in STYLES else style(index)[0]
        dash = DASHES[index // len(PALETTE) % len(DASHES)]
        centre = np.nanmean(across, axis=0)
        low, high = np.nanmin(heights, axis=0), np.nanmax(heights, axis=0)
        axes.fill_between(centre, low, high, color=colour, alpha=0.2, linewidth=0)
        if len(centre) == 1:  # a band without a width
            axes.vlines(centre, low, high, color=colour, alpha=0.4)
        mean = np.nanmean(heights, axis=0)
        late += [*low[len(low) // 2 :], *high[len(high) // 2 :]]
        marker = "o" if len(centre) <= 40 else None
        axes.plot(
            centre, mean, color=colour, linestyle=dash, linewidth=1.8, marker=marker, markersize=3, label=name
        )
    axes.set_xlim(left=0)
    if late:
        margin = 0.08 * (max(late) - min(late)) or 1.0
        axes.set_ylim(min(late) - margin, max(late) + margin)
    if curves:
        figure.legend(frameon=False, loc="outside right upper")  # inside, it would hide what ends there
    return save(figure, path)


def proportions(
    path: Path,
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    names: Sequence[str],
    xlabel: str,
    ylabel: str,
    title: str = "",
) -> Path:
    """Points of each series over x, both logarithmic, beside a line of slope 1 through the first.

    Args:
        path: file to write.
        x: horizontal positions, positive.
        series: label to heights, positive, one per x.
        names: what each x is, written below or above its points.
        xlabel: label of the horizontal axis, with its unit.
        ylabel: label of the vertical axis, with its unit.
        title: above the axes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.

    """
    figure, axes = one_panel(title, xlabel, ylabel)
    for colour, marker, (label, heights) in zip(PALETTE, "osDv", series.items(), strict=False):
        axes.plot(
            x, heights, marker, color=colour, label=label, fillstyle="full" if marker == "o" else "none"
        )
    first = np.asarray(next(iter(series.values())), dtype=np.float64)
    slope = float(np.exp(np.mean(np.log(first / np.asarray(x)))))
    ends = np.array([min(x), max(x)])
    axes.plot(ends, slope * ends, "-", color="0.75", zorder=0, label="proportional")
    stacks = np.array(list(series.values()), dtype=np.float64)
    # In turn left of the highest point and right of the lowest, away from the line: neighbours may be close.
    for turn, i in enumerate(np.argsort(x)):
        left = turn % 2 == 0
        axes.annotate(
            names[i],
            (x[i], np.nanmax(stacks[:, i]) if left else np.nanmin(stacks[:, i])),
            textcoords="offset points",
            xytext=(-6, 3) if left else (6, -3),
            ha="right" if left else "left",
            va="bottom" if left else "top",
            fontsize=8,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(x=0.18)  # room for the names
    axes.legend(frameon=False)
    return save(figure, path)


def stacked_bars(
    path: Path,
    names: Sequence[str],
    parts: Mapping[str, Sequence[float]],
    *,
    xlabel: str,
    notes: Sequence[str] = (),
    title: str = "",
) -> Path:
    """One horizontal bar per name, put together from parts.

    Args:
        path: file to write.
        names: labels of the bars, from top to bottom.
        parts: label of a part to its length in every bar, in the order they are stacked.
        xlabel: label of the horizontal axis, with its unit.
        notes: what is written at the end of each bar.
        title: above the axes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.

    """
    figure, axes = one_panel(title, xlabel, "", height=1.6 + 0.34 * len(names))
    places = np.arange(len(names))
    ends = np.zeros(len(names))
    for colour, (label, lengths) in zip(PALETTE, parts.items(), strict=False):
        axes.barh(places, lengths, left=ends, color=colour, label=label, height=0.7)
        ends += np.asarray(lengths, dtype=np.float64)
    for place, end, note in zip(places, ends, notes, strict=False):
        axes.annotate(note, (end, place), textcoords="offset points", xytext=(5, 0), va="center", fontsize=8)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1.1 * max(ends, default=1.0))
    figure.legend(frameon=False, loc="outside lower center", ncols=len(parts))
    return save(figure, path)


def save(figure: Any, path: Path) -> Path:
    """Writes the figure and returns where."""
    figure.savefig(path, dpi=DPI)
    return path
