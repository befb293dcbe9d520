"""Figures, for people with and without full colour vision, written without a display.

Every function takes plain dictionaries and sequences and writes one file, whose format follows the
suffix. Layers, of which there may be hundreds, are coloured by depth; optimizers, of which there are
few, by a palette that survives every common form of colour blindness.

matplotlib is imported when the first figure is drawn. Where it is missing, ModuleNotFoundError says
which extra brings it.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt

# Okabe and Ito's palette (2008), black last: it is easily taken for an axis.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
DASHES = ("-", "--", "-.", ":")
DPI = 150


def layer_curves(
    path: str | PathLike[str],
    curves: Mapping[str, Sequence[float]],
    *,
    ylabel: str,
    title: str = "",
    xlabel: str = "epoch",
    first: int = 1,
    log: bool = False,
) -> None:
    """One curve per layer over the epochs, coloured by depth.

    Args:
        path: file to write.
        curves: layer name to values, one per epoch, in the order of the network. NaN leaves a gap.
        ylabel: label of the vertical axis, with its unit.
        title: above the axes.
        xlabel: label of the horizontal axis.
        first: number of the first epoch.
        log: logarithmic vertical axis; values that are not positive are left out.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: there is no curve.

    """
    if not curves:
        raise ValueError("curves is empty: there is no layer to draw")
    figure, axes = _axes(title, xlabel, ylabel)
    colours = _depth_colours(figure, axes, list(curves))
    thin = 1.6 if len(curves) <= 30 else 0.8
    for colour, values in zip(colours, curves.values(), strict=True):
        heights = np.asarray(values, dtype=np.float64)
        if log:
            heights = np.where(heights > 0, heights, np.nan)
        epochs = np.arange(first, first + len(heights))
        axes.plot(epochs, heights, color=colour, linewidth=thin, alpha=0.85, marker=_marker(heights))
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    _whole_numbers(axes)
    _save(figure, path)


def bands_over_time(
    path: str | PathLike[str],
    curves: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]],
    *,
    ylabel: str,
    title: str = "",
    xlabel: str = "time (s)",
) -> None:
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
    figure, axes = _axes(title, xlabel, ylabel)
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
        colour = PALETTE[index % len(PALETTE)]
        dash = DASHES[index // len(PALETTE) % len(DASHES)]
        centre = np.nanmean(across, axis=0)
        low, high = np.nanmin(heights, axis=0), np.nanmax(heights, axis=0)
        axes.fill_between(centre, low, high, color=colour, alpha=0.2, linewidth=0)
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
    if len(curves) > 6:
        figure.legend(frameon=False, loc="outside right upper")
    elif curves:
        axes.legend(frameon=False, loc="lower right")
    _save(figure, path)


def proportions(
    path: str | PathLike[str],
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    names: Sequence[str],
    xlabel: str,
    ylabel: str,
    title: str = "",
) -> None:
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
    figure, axes = _axes(title, xlabel, ylabel)
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
    _save(figure, path)


def stacked_bars(
    path: str | PathLike[str],
    names: Sequence[str],
    parts: Mapping[str, Sequence[float]],
    *,
    xlabel: str,
    notes: Sequence[str] = (),
    title: str = "",
) -> None:
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
    figure, axes = _axes(title, xlabel, "")
    figure.set_size_inches(7.2, 1.6 + 0.34 * len(names))
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
    _save(figure, path)


def require_matplotlib() -> Any:
    """The module; ModuleNotFoundError says which extra brings it."""
    try:
        import matplotlib
    except ImportError as error:
        message = "figures need matplotlib: pip install 'rmsgd-kernels[plot]'"
        raise ModuleNotFoundError(message, name="matplotlib") from error
    return matplotlib


def _axes(title: str, xlabel: str, ylabel: str) -> tuple[Any, Any]:
    require_matplotlib()
    # A Figure of our own instead of pyplot: no window system, no state shared with the user's plots.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _depth_colours(figure: Any, axes: Any, names: Sequence[str], most: int = 8) -> list[Any]:
    """One colour per layer, and a colour bar that names a few of them from input to output."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    # The last tenth of viridis is a yellow that vanishes on white.
    colourmap = colormaps["viridis"].resampled(256)
    last = max(len(names) - 1, 1)
    scale = ScalarMappable(Normalize(0, last / 0.9), colourmap)
    bar = figure.colorbar(scale, ax=axes, label="layer, from input to output", pad=0.02)
    bar.ax.set_ylim(0, last)
    ticks = np.unique(np.linspace(0, len(names) - 1, min(most, len(names))).round().astype(int))
    bar.set_ticks(ticks, labels=[short_name(names[tick]) for tick in ticks])
    bar.ax.tick_params(labelsize=7)
    return list(scale.to_rgba(np.arange(len(names))))


def short_name(name: str, most: int = 28) -> str:
    """A layer's name for a label: its end, at most so many characters."""
    name = name.removesuffix(".weight")
    return name if len(name) <= most else "…" + name[1 - most :]


def _marker(values: npt.NDArray[np.float64]) -> str:
    """A single point draws no line: mark it."""
    return "o" if np.count_nonzero(~np.isnan(values)) == 1 else ""


def _whole_numbers(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _save(figure: Any, path: str | PathLike[str]) -> None:
    figure.savefig(path, dpi=DPI)
