"""A figure of what happens to every layer over the epochs, and what all figures have in common.

Figures suit readers with and without full colour vision, and are written without a display. Layers, of which
there may be hundreds, are coloured by depth. Few things, such as optimizers, are coloured by a palette that
readers with any common form of colour blindness can tell apart.

matplotlib is imported when the first figure is drawn. Where it is missing, ModuleNotFoundError says
which extra brings it.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rmsgd.extras import install_command

# Okabe and Ito's palette (2008). Black comes last, since it is easily taken for an axis.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
DPI = 150

_MOST_LABELLED = 30
"""Curves that are labelled at their ends."""

_MOST_TICKS = 8
"""Layers that a colour bar names."""

_LINE = 0.045
"""Height of a label of 7 points, as a share of a panel's."""


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
    """Draw one curve per layer over the epochs, coloured by depth, for example of ``learning_rates()``.

    Curves are labelled at their ends; curves that end at the same height share a label. Where there are
    too many curves to label, a colour bar tells how deep a layer lies.

    Args:
        path: file to write, in the format of its suffix.
        curves: from a layer's name to its values, floats, one per epoch and all in the same unit, in the
            order of the network. NaN leaves a gap.
        ylabel: label of the vertical axis, with the unit of the values.
        title: above the axes.
        xlabel: label of the horizontal axis.
        first: number of the first epoch.
        log: draw a logarithmic vertical axis; values that are not positive are left out.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: there is no curve, or the suffix names no format of figures.

    """
    if not curves:
        raise ValueError("curves is empty: there is no layer to draw")
    figure, axes = one_panel(title, xlabel, ylabel)
    labelled = len(curves) <= _MOST_LABELLED
    colours = depth_colours(figure, axes, list(curves), bar=not labelled)
    ends: list[_End] = []
    for (name, values), colour in zip(curves.items(), colours, strict=True):
        heights = np.asarray(values, dtype=np.float64)
        if log:
            heights = np.where(heights > 0, heights, np.nan)
        epochs = np.arange(first, first + len(heights))
        axes.plot(
            epochs,
            heights,
            color=colour,
            linewidth=1.6 if labelled else 0.8,
            marker=_marker_of_one_point(heights),
        )
        known = heights[~np.isnan(heights)]
        if known.size:
            ends.append(_End(name, float(known[-1]), colour))
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    if labelled:
        _label_ends(axes, ends)
    whole_numbers(axes)
    save(figure, path)


def require_matplotlib() -> Any:
    """Import matplotlib and return it; ModuleNotFoundError says which extra installs it."""
    try:
        import matplotlib
    except ImportError as error:
        message = f"figures need matplotlib: {install_command('plot')}"
        raise ModuleNotFoundError(message, name="matplotlib") from error
    return matplotlib


def blank(width: float, height: float) -> Any:
    """An empty figure of this size in inches, which shares no state with the user's plots."""
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def check_format(path: str | PathLike[str]) -> None:
    """Raise ValueError for a file whose suffix names no format in which figures are written."""
    require_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    formats = sorted(FigureCanvasBase.get_supported_filetypes().keys() - {"pgf"})  # that one needs LaTeX
    if os.path.splitext(path)[1][1:].lower() not in formats:
        known = ", ".join(f".{name}" for name in formats)
        raise ValueError(f"the suffix of {os.fspath(path)} is no format of figures; there are {known}")


def save(figure: Any, path: str | PathLike[str]) -> None:
    """Write a figure in the format of the suffix; see ``check_format``."""
    check_format(path)
    figure.savefig(path, dpi=DPI)


def plain(axes: Any, xlabel: str, ylabel: str) -> None:
    """Give axes labels, with units, and a faint grid, and remove the frame at the top and right."""
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def one_panel(title: str, xlabel: str, ylabel: str, height: float = 4.4) -> tuple[Any, Any]:
    """A figure with its only axes; ``height`` is in inches, and the labels carry the units."""
    figure = blank(7.2, height)
    axes = figure.add_subplot()
    axes.set_title(title)
    plain(axes, xlabel, ylabel)
    return figure, axes


def depth_colours(figure: Any, axes: Any, names: Sequence[str], *, bar: bool = True) -> list[Any]:
    """One colour per layer, (red, green, blue, alpha) in 0 to 1; a colour bar names a few of the layers."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    # The last tenth of viridis is a yellow that vanishes on white.
    colourmap = colormaps["viridis"].resampled(256)
    last = max(len(names) - 1, 1)
    scale = ScalarMappable(Normalize(0, last / 0.9), colourmap)
    if bar:
        legend = figure.colorbar(scale, ax=axes, label="layer, from input to output", pad=0.02)
        legend.ax.set_ylim(0, last)
        ticks = np.unique(np.linspace(0, len(names) - 1, min(_MOST_TICKS, len(names))).round().astype(int))
        labels = short_names(names)
        legend.set_ticks(ticks, labels=[labels[tick] for tick in ticks])
        legend.ax.tick_params(labelsize=7)
    return list(scale.to_rgba(np.arange(len(names))))


class _End(NamedTuple):
    """Where a curve ends."""

    name: str
    value: float
    colour: Any


def _label_ends(axes: Any, ends: Sequence[_End]) -> None:
    """Name the curves beside their ends, from the highest down; curves that end alike share a label."""
    to_share = axes.transData + axes.transAxes.inverted()
    heights = [float(to_share.transform((1.0, end.value))[1]) for end in ends]
    groups: list[tuple[float, list[int]]] = []
    for i in sorted(range(len(ends)), key=lambda i: -heights[i]):
        if groups and groups[-1][0] - heights[i] < _LINE / 2:
            groups[-1][1].append(i)
        else:
            groups.append((heights[i], [i]))
    names = short_names([end.name for end in ends])
    free = 1.0 + _LINE
    for height, members in groups:
        free = min(height, free - _LINE)
        first = min(members)  # the layer that comes first in the network
        end = ends[first]
        more = f" and {len(members) - 1} more" if len(members) > 1 else ""
        axes.annotate(
            names[first] + more,
            (1.0, height),
            (1.04, free),
            xycoords="axes fraction",
            fontsize=7,
            color=end.colour,
            va="center",
            arrowprops={"arrowstyle": "-", "color": end.colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0},
            annotation_clip=False,
        )


def short_names(names: Sequence[str], most: int = 28) -> list[str]:
    """Layers' names for labels, of at most ``most`` characters where different names then stay different.

    A long name keeps its head, its tail and every number, since numbers tell blocks apart, and "…" stands for
    the rest. Names that would read alike are written in full.
    """
    plain = [name.removesuffix(".weight") for name in names]
    short = [_shortened(name, most) for name in plain]
    alike = {text for text, count in Counter(short).items() if count > 1}
    return [
        full if text in alike and plain.count(full) == 1 else name if text in alike else text
        for name, full, text in zip(names, plain, short, strict=True)
    ]


def _shortened(name: str, most: int) -> str:
    """A name without words of its middle and, if that is not enough, without the inside of its ends."""
    parts = name.split(".")
    words = [i for i in range(1, len(parts) - 1) if not parts[i].isdigit()]
    text = name
    for i in sorted(words, key=lambda i: abs(i - (len(parts) - 1) / 2)):  # from the middle outwards
        if len(text) <= most:
            break
        parts[i] = "…"
        text = _joined(parts)
    if len(text) <= most:
        return text
    if len(parts) == 1:
        parts = [name[: len(name) // 2], "…", name[len(name) // 2 :]]
    between = _joined(["", *parts[1:-1], ""])
    if most - len(between) < most // 3:
        between = "…"
    room = most - len(between)
    head, tail = parts[0], parts[-1]
    kept = min(len(tail), max(room - len(head), (room + 1) // 2))
    head = head if len(head) <= room - kept else f"{head[: room - kept - 1]}…"
    tail = tail if len(tail) == kept else f"…{tail[1 - kept :]}"
    return re.sub("…+", "…", f"{head}{between}{tail}")


def _joined(parts: Sequence[str]) -> str:
    return re.sub(r"\.?…[.…]*", "…", ".".join(parts))


def _marker_of_one_point(values: npt.NDArray[np.float64]) -> str:
    """The marker of a curve: a single point draws no line, so it gets one."""
    return "o" if np.count_nonzero(~np.isnan(values)) == 1 else ""


def whole_numbers(axes: Any) -> None:
    """Put the ticks of the horizontal axis at whole numbers only, since epochs have no halves."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
