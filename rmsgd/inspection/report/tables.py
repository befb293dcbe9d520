"""Reports as tables: for the terminal with rich, and for notebooks as HTML."""

import html
import math
from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rmsgd.inspection.report.comparison import Comparison
from rmsgd.inspection.report.series import Series
from rmsgd.metrics import LayerMetrics, Report


def printable(text: str) -> str:
    """Text from a file with whatever could steer a terminal made visible."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shape_text(shape: Sequence[int]) -> str:
    """ "64 x 3 x 7 x 7" """
    return " x ".join(map(str, shape))


def rank_text(layer: LayerMetrics) -> str:
    """The ranks with their modes, "12 in, 30 out"; a matrix has one and needs no word."""
    if layer.modes == ("matrix",):
        return str(layer.rank[0])
    return ", ".join(f"{rank} {mode}" for rank, mode in zip(layer.rank, layer.modes, strict=True))


def layers_text(count: int) -> str:
    """ "1 layer", "2 layers" """
    return f"{count} layer" if count == 1 else f"{count} layers"


def variance_text(layer: LayerMetrics) -> str:
    """The noise variances of the modes."""
    return ", ".join(f"{variance:.2e}" for variance in layer.noise_variance)


def summary(report: Report) -> str:
    """One line: Q, and how many layers it is of."""
    skipped = len(report.layers) - len(report.measured)
    left_out = f", {skipped} skipped" if skipped else ""
    return f"Q = {report.quality:.4f} over {layers_text(len(report.measured))}{left_out}"


def report_table(report: Report, source: str) -> RenderableType:
    """A row per measured layer, then the skipped ones with their reasons, then Q."""
    parts: list[RenderableType] = []
    if report.measured:
        names = ("shape", "rank", "stable rank", "condition", "quality", "noise variance")
        table = _table(source, "layer", names)
        for x in report.measured:
            numbers = (f"{v:.4f}" for v in (x.stable_rank, x.condition_number, x.quality))
            table.add_row(_name(x.name), shape_text(x.shape), rank_text(x), *numbers, variance_text(x))
        parts.append(table)
    skipped = [layer for layer in report.layers if layer.skipped is not None]
    if skipped:
        table = _table("skipped" if report.measured else f"{source}: skipped", "layer", ("shape",))
        table.add_column("reason", overflow="fold")
        for layer in skipped:
            table.add_row(_name(layer.name), shape_text(layer.shape), _name(str(layer.skipped)))
        parts.append(table)
    return Group(*parts, Text(summary(report), style="bold"))


def series_table(series: Series) -> RenderableType:
    """A row per checkpoint with the means over its layers, then a row per layer with its course."""
    checkpoints = _table("checkpoints", "source", ("layers", "stable rank, mean", "condition, mean", "Q"))
    for source, report in zip(series.sources, series.reports, strict=True):
        stable_rank = _mean(x.stable_rank for x in report.measured)
        condition = _mean(x.condition_number for x in report.measured)
        checkpoints.add_row(
            _name(source), str(len(report.measured)), stable_rank, condition, f"{report.quality:.4f}"
        )
    names = ("shape", "stable rank", "condition", "quality", "quality over time")
    layers = _table("layers, from the first checkpoint to the last", "layer", names)
    for name, row in series.by_layer().items():
        known = [layer for layer in row if layer is not None]
        first, last = known[0], known[-1]
        layers.add_row(
            _name(name),
            shape_text(last.shape),
            _from_to(first.stable_rank, last.stable_rank),
            _from_to(first.condition_number, last.condition_number),
            _from_to(first.quality, last.quality),
            sparkline([math.nan if layer is None else layer.quality for layer in row]),
        )
    return Group(checkpoints, layers)


def comparison_table(comparison: Comparison) -> RenderableType:
    """A row per layer, what changed most first."""
    before, after = comparison.sources
    names = ("shape", "quality", "change", "stable rank", "condition")
    table = _table(f"{before} -> {after}", "layer", names)
    for change in comparison.changes():
        if change.before is None or change.after is None:
            there = change.before or change.after
            where = "only in the first" if change.after is None else "only in the second"
            assert there is not None
            table.add_row(_name(change.name), shape_text(change.shape), f"{there.quality:.4f}", where, "", "")
            continue
        table.add_row(
            _name(change.name),
            shape_text(change.shape),
            _from_to(change.before.quality, change.after.quality),
            f"{change.change('quality'):+.4f}",
            _from_to(change.before.stable_rank, change.after.stable_rank),
            _from_to(change.before.condition_number, change.after.condition_number),
        )
    q = f"Q = {_from_to(comparison.before.quality, comparison.after.quality)}"
    return Group(table, Text(q, style="bold"))


def sparkline(values: Sequence[float]) -> str:
    """A line of blocks, as high as the values lie between their least and their largest; NaN: a space."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return ""
    low, span = min(known), max(known) - min(known)
    blocks = "▁▂▃▄▅▆▇█"
    return "".join(
        " " if math.isnan(value) else blocks[round((value - low) / span * 7) if span > 0.0 else 0]
        for value in values
    )


def html_table(report: Report) -> str:
    """The report as an HTML table, for notebooks; complete in itself."""
    names = ("layer", "shape", "rank", "stable rank", "condition", "quality", "noise variance")
    head = "".join(f"<th>{name}</th>" for name in names)
    rows = []
    for x in report.layers:
        cells = [x.name, shape_text(x.shape)]
        if x.skipped is None:
            cells += [rank_text(x), *(f"{v:.4f}" for v in (x.stable_rank, x.condition_number, x.quality))]
            cells.append(variance_text(x))
        else:
            cells += [f"skipped: {x.skipped}", "", "", "", ""]
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    caption = f"<caption>{html.escape(summary(report))}</caption>"
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _table(title: str, first: str, numbers: Sequence[str]) -> Table:
    table = Table(
        title=Text(printable(title)), title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    table.add_column(first, overflow="fold", min_width=16)
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    return table


def _name(name: str) -> Text:
    return Text(printable(name))


def _mean(values: Iterable[float]) -> str:
    known = list(values)
    return f"{sum(known) / len(known):.4f}" if known else ""


def _from_to(first: float, last: float) -> str:
    return f"{first:.4f} -> {last:.4f}"
