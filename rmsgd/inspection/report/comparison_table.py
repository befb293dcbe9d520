"""A comparison of two networks as a table for the terminal."""

from rich.console import Group, RenderableType
from rich.text import Text

from rmsgd.inspection.report.comparison import COMPARED, Comparison
from rmsgd.inspection.report.text import from_to, metric_text, name_cell, shape_text, terminal_table
from rmsgd.metrics import NETWORK_QUALITY


def comparison_table(comparison: Comparison) -> RenderableType:
    """A table with a row per layer, the largest change first."""
    before, after = comparison.sources
    first, *others = COMPARED
    names = ("shape", first.heading, "change", *(metric.heading for metric in others))
    table = terminal_table(f"{before} -> {after}", "layer", names)
    for change in comparison.changes():
        cells: list[Text | str] = [name_cell(change.name), shape_text(change.shape)]
        if change.before is None or change.after is None:
            there = change.before or change.after
            assert there is not None
            where = "only in the first" if change.after is None else "only in the second"
            table.add_row(*cells, metric_text(first, there), where, *("" for _ in others))
            continue
        pairs = [from_to(m, getattr(change.before, m.name), getattr(change.after, m.name)) for m in COMPARED]
        table.add_row(*cells, pairs[0], f"{change.change(first):+{first.format}}", *pairs[1:])
    q = from_to(NETWORK_QUALITY, comparison.before.quality, comparison.after.quality)
    return Group(table, Text(f"{NETWORK_QUALITY.symbol} = {q}", style="bold"))
