"""One network's layers as a table: for the terminal with rich, and for notebooks as HTML."""

import html
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from rmsgd.inspection.report.text import (
    name_cell,
    rank_text,
    shape_text,
    summary,
    terminal_table,
    variance_text,
)
from rmsgd.metrics import LayerMetrics, measured


def layer_table(layers: Sequence[LayerMetrics], source: str) -> RenderableType:
    """A row per measured layer, then the skipped ones with their reasons, then Q."""
    parts: list[RenderableType] = []
    known = measured(layers)
    if known:
        names = ("shape", "rank", "stable rank", "condition", "quality", "noise variance")
        table = terminal_table(source, "layer", names)
        for x in known:
            numbers = (f"{v:.4f}" for v in (x.stable_rank, x.condition_number, x.quality))
            table.add_row(name_cell(x.name), shape_text(x.shape), rank_text(x), *numbers, variance_text(x))
        parts.append(table)
    skipped = [layer for layer in layers if layer.skipped is not None]
    if skipped:
        table = terminal_table("skipped" if known else f"{source}: skipped", "layer", ("shape",))
        table.add_column("reason", overflow="fold")
        for layer in skipped:
            table.add_row(name_cell(layer.name), shape_text(layer.shape), name_cell(str(layer.skipped)))
        parts.append(table)
    return Group(*parts, Text(summary(layers), style="bold"))


def html_table(layers: Sequence[LayerMetrics]) -> str:
    """The layers as an HTML table, for notebooks; complete in itself."""
    names = ("layer", "shape", "rank", "stable rank", "condition", "quality", "noise variance")
    head = "".join(f"<th>{name}</th>" for name in names)
    rows = []
    for x in layers:
        cells = [x.name, shape_text(x.shape)]
        if x.skipped is None:
            cells += [rank_text(x), *(f"{v:.4f}" for v in (x.stable_rank, x.condition_number, x.quality))]
            cells.append(variance_text(x))
        else:
            cells += [f"skipped: {x.skipped}", "", "", "", ""]
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    caption = f"<caption>{html.escape(summary(layers))}</caption>"
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
