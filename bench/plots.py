"""Figures of the benchmarks, written without a display, for every kind of colour vision.

The functions that draw a whole figure take plain dictionaries and sequences, write one file, whose format
follows from the suffix, and return its path. Where matplotlib is missing, ModuleNotFoundError says which
extra installs it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rmsgd import plots
from rmsgd.plots import PALETTE, one_panel

DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vP*X<>hd"
# An optimizer looks the same in every figure. Those that are compared most often differ most in looks.
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
"""From an optimizer to the index of its colour in the palette, and its marker."""


def style_of(optimizer: str) -> tuple[str, str]:
    """The colour and the marker of an optimizer, the same in every figure."""
    colour, marker = STYLES.get(optimizer, (len(PALETTE) - 1, "d"))
    return PALETTE[colour], marker


def style(index: int) -> tuple[str, str]:
    """The colour and the marker of anything but an optimizer, by its index."""
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
    figure, axes = one_panel("", xlabel, ylabel)
    axes.set_title(title, fontsize=10)
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
        if len(centre) == 1:  # the band would have no width
            axes.vlines(centre, low, high, color=colour, alpha=0.4)
        mean = np.nanmean(heights, axis=0)
        late += [*low[len(low) // 2 :], *high[len(high) // 2 :]]
        marker = "o" if len(centre) <= 40 else None
        axes.plot(
            centre, mean, color=colour, linestyle=dash, linewidth=1.8, marker=marker, markersize=3, label=name
        )
    axes.set_xlim(left=0)
    axes.xaxis.label.set_size(9)
    span(axes, late)
    if curves:
        figure.legend(frameon=False, loc="outside right upper")  # inside, it would hide what ends there
    return save(figure, path)


def span(axes: Any, values: Sequence[float]) -> None:
    """Let the vertical axis span these values, with a margin; those that are not finite do not count."""
    if known := [value for value in values if np.isfinite(value)]:
        margin = 0.08 * (max(known) - min(known)) or 1.0
        axes.set_ylim(min(known) - margin, max(known) + margin)


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
    # Names stand in turn left of the highest point and right of the lowest, so that close neighbours stay
    # apart.
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


def overheads(
    path: Path,
    names: Sequence[str],
    series: Mapping[str, Sequence[tuple[float, float, float]]],
    *,
    reference: str,
    xlabel: str,
    title: str = "",
) -> Path:
    """What each name costs beyond a reference: points with intervals on an axis that shows 0.1 and 100 %.

    Args:
        path: file to write.
        names: what is compared, from top to bottom.
        series: label to (value, low, high) in per cent for every name; the value is written beside its point.
        reference: whose overhead is 0.
        xlabel: label of the horizontal axis.
        title: above the axes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.

    """
    figure, axes = one_panel(title, xlabel, "", height=1.5 + 0.5 * len(names) * len(series))
    shifts = 0.16 * (np.arange(len(series)) - (len(series) - 1) / 2)
    for shift, fill, (label, values) in zip(shifts, ("full", "none"), series.items(), strict=False):
        for row, (name, (value, low, high)) in enumerate(zip(names, values, strict=True)):
            colour, marker = style_of(name)
            place = row + shift
            axes.plot([low, high], [place, place], color=colour, linewidth=2)
            axes.plot(value, place, marker, color=colour, fillstyle=fill, label=label if row == 0 else None)
            note = "0" if name == reference else f"{value:+.2f}"
            axes.annotate(
                note,
                (np.nanmax([high, value]), place),
                textcoords="offset points",
                xytext=(6, 0),
                va="center",
                fontsize=8,
            )
    axes.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    # The axis is linear within 1 % and logarithmic beyond, so that it shows a tenth of a per cent and 100 %.
    axes.set_xscale("symlog", linthresh=1)
    axes.xaxis.set_major_formatter(lambda value, place: f"{value:g}".replace("-", "−"))
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.15, y=0.3)
    if len(series) > 1:
        figure.legend(frameon=False, loc="outside lower center", ncols=len(series), fontsize=8)
    return save(figure, path)


def save(figure: Any, path: Path) -> Path:
    """Writes the figure and returns its path."""
    plots.save(figure, path)
    return path
