"""Tables and lines on terminals of any width."""

from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table whose first column names the rows; the others are aligned as numbers are, to the right."""
    result = Table(title=title)
    for place, heading in enumerate(headings):
        result.add_column(heading, justify="right" if place else "left")
    for row in rows:
        result.add_row(*row)
    return result


def say(text: str, console: Console) -> None:
    """Prints a line as it is: not broken, and what looks like Rich's markup, as in a path, is no markup."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def show(table: Table, console: Console) -> None:
    """Prints a table if all of its words fit, else a block of lines for each row, so that no word is cut.

    A block begins with the cell of the first column, and the others follow on lines of their own.
    """
    for column in table.columns:
        texts = [str(cell) for cell in (column.header, *column.cells)]
        words = texts if column.no_wrap else [word for text in texts for word in text.split()]
        column.min_width = max(map(cell_len, words), default=0)
    if Measurement.get(console, console.options.update(max_width=10**6), table).minimum <= console.width:
        console.print(table)
        return
    for first, *others in zip(*(column.cells for column in table.columns), strict=True):
        console.print(first, markup=False, highlight=False)
        for column, cell in zip(table.columns[1:], others, strict=True):
            if cell:
                console.print(f"  {column.header}: {cell}", markup=False, highlight=False)
