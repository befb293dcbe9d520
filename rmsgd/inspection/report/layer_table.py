"""One network's layers as a table, for the terminal by rich and for notebooks as HTML."""

import html
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from rmsgd.inspection.report.text import (
    metric_text,
    name_cell,
    shape_text,
    summary,
    terminal_table,
)
from rmsgd.metrics import SHOWN, LayerMetrics, measured


def layer_table(layers: Sequence[LayerMetrics], source: str) -> RenderableType:
    """A row per measured layer, then the skipped ones with their reasons, then Q."""
    parts: list[RenderableType] = []
    known = measured(layers)
    if known:
        table = terminal_table(source, "layer", ("shape", *(metric.heading for metric in SHOWN)))
        for layer in known:
            numbers = (metric_text(metric, layer) for metric in SHOWN)
            table.add_row(name_cell(layer.name), shape_text(layer.shape), *numbers)
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
    """The layers as a self-contained HTML table for notebooks."""
    head = "<th>layer</th><th>shape</th>" + "".join(
        f'<th title="{html.escape(metric.help)}">{html.escape(metric.heading)}</th>' for metric in SHOWN
    )
    rows = []
    for layer in layers:
        cells = f"<td>{html.escape(layer.name)}</td><td>{shape_text(layer.shape)}</td>"
        if layer.skipped is None:
            cells += "".join(f"<td>{html.escape(metric_text(metric, layer))}</td>" for metric in SHOWN)
        else:
            cells += f'<td colspan="{len(SHOWN)}">skipped: {html.escape(layer.skipped)}</td>'
        rows.append(f"<tr>{cells}</tr>")
    caption = f"<caption>{html.escape(summary(layers))}</caption>"
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
