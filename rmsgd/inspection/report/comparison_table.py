"""A comparison of two networks as a table for the terminal."""

from rich.console import Group, RenderableType
from rich.text import Text

from rmsgd.inspection.report.comparison import Comparison
from rmsgd.inspection.report.text import from_to, name_cell, shape_text, terminal_table


def comparison_table(comparison: Comparison) -> RenderableType:
    """A row per layer, what changed most first."""
    before, after = comparison.sources
    names = ("shape", "quality", "change", "stable rank", "condition")
    table = terminal_table(f"{before} -> {after}", "layer", names)
    for change in comparison.changes():
        if change.before is None or change.after is None:
            there = change.before or change.after
            where = "only in the first" if change.after is None else "only in the second"
            assert there is not None
            table.add_row(
                name_cell(change.name), shape_text(change.shape), f"{there.quality:.4f}", where, "", ""
            )
            continue
        table.add_row(
            name_cell(change.name),
            shape_text(change.shape),
            from_to(change.before.quality, change.after.quality),
            f"{change.change('quality'):+.4f}",
            from_to(change.before.stable_rank, change.after.stable_rank),
            from_to(change.before.condition_number, change.after.condition_number),
        )
    q = f"Q = {from_to(comparison.before.quality, comparison.after.quality)}"
    return Group(table, Text(q, style="bold"))
