"""The format of names, shapes and numbers in tables, figures and pages, and the form of terminal tables."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from rmsgd.inspection.reading.printable import printable
from rmsgd.metrics import NETWORK_QUALITY, LayerMetrics, Metric, measured, network_quality


def shape_text(shape: Sequence[int]) -> str:
    """A shape as text, such as "64 x 3 x 7 x 7"."""
    return " x ".join(map(str, shape))


def metric_text(metric: Metric, layer: LayerMetrics) -> str:
    """A metric of a measured layer; for several modes "12 in, 30 out" or "5.1e-03, 4.8e-03".

    Whole numbers are short, so they have the name of their mode beside them.
    """
    value = getattr(layer, metric.name)
    if not metric.per_mode:
        return metric.text(value)
    if len(value) == 1 or metric.format != "d":
        return ", ".join(map(metric.text, value))
    return ", ".join(f"{metric.text(v)} {mode}" for v, mode in zip(value, layer.modes, strict=True))


def layers_text(count: int) -> str:
    """A number of layers as text, such as "1 layer" or "2 layers"."""
    return f"{count} layer" if count == 1 else f"{count} layers"


def summary(layers: Sequence[LayerMetrics]) -> str:
    """A line with Q and the number of layers that it is taken over."""
    known = measured(layers)
    skipped = len(layers) - len(known)
    left_out = f", {skipped} skipped" if skipped else ""
    q = NETWORK_QUALITY.text(network_quality(layers))
    return f"{NETWORK_QUALITY.symbol} = {q} over {layers_text(len(known))}{left_out}"


def from_to(metric: Metric, first: float, last: float) -> str:
    """A number before and after, such as "0.1200 -> 0.3400"."""
    return f"{metric.text(first)} -> {metric.text(last)}"


def terminal_table(title: str, first: str, numbers: Sequence[str]) -> Table:
    """An empty table with a column of names called ``first`` and then columns of numbers."""
    table = Table(
        title=Text(printable(title)), title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    table.add_column(first, overflow="fold", min_width=16)
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    return table


def name_cell(name: str) -> Text:
    """A name from a file as a cell, which is printed as it is, without rich's markup."""
    return Text(printable(name))


def label(text: str) -> str:
    """Text from a file as a label of a figure, where matplotlib takes what is between dollars for math."""
    return printable(text).replace("$", r"\$")
