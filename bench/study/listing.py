"""`study list`: every experiment with its published numbers."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.study import published
from bench.study.experiments import EXPERIMENTS, OWN, Experiment, experiment


def show(names: Sequence[str], console: Console) -> None:
    """Prints a line for each experiment, or everything about those that are named."""
    if not names:
        console.print(overview())
        console.print("In full: study list table1a. What is odd in the paper: study list notes.")
        return
    for name in names:
        for table in details(name):
            console.print(table)
        for place, text in published.load().claims:
            if place == name:
                console.print(f"claimed: {text}")


def show_notes(console: Console) -> None:
    """Prints the inconsistencies."""
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    table.add_column("place")
    table.add_column("what is odd")
    for note in published.load().notes:
        table.add_row(*note)
    console.print(table)


def overview() -> Table:
    """One row per experiment."""
    table = Table(
        box=SIMPLE_HEAD,
        show_edge=False,
        caption="Cells: networks x data sets x optimizers. Runs: of one seed, sweeps included.",
    )
    for column in ("id", "what it shows", "data"):
        table.add_column(column, no_wrap=column == "id")
    for column in ("cells", "runs", "published\nnumbers"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, known in (EXPERIMENTS | OWN).items():
        numbers = sum(key.table == name for key in published.load().values)
        cells = " x ".join(str(len(_used(known, field))) for field in ("networks", "datasets", "optimizers"))
        data = ", ".join(_used(known, "datasets"))
        table.add_row(name, known.title, data, cells, str(len(known.runs())), str(numbers or "-"))
    return table


def details(name: str) -> list[Table]:
    """The published numbers of one experiment, or its runs where the paper gives no number."""
    known = experiment(name)
    if not any(key.table == name for key in published.load().values):
        return [_runs(name, known)]
    tables = []
    for dataset in _used(known, "datasets"):
        columns = [column for column in _used(known, "optimizers") if not column.startswith("rmsgd-")]
        table = Table(title=f"{name}, {dataset}: {known.title}", box=SIMPLE_HEAD, show_edge=False)
        table.add_column("network", no_wrap=True)
        for column in columns:
            table.add_column(column, justify="right")
        for network in _used(known, "networks"):
            for epoch in known.epochs or (0,):
                cells = [published.load().value(name, dataset, network, column, epoch) for column in columns]
                label = f"{network}, epoch {epoch}" if epoch else network
                table.add_row(label, *("not in the text" if cell is None else str(cell) for cell in cells))
        tables.append(table)
    return tables


def as_dict() -> dict[str, Any]:
    """Everything `list` knows, ready for JSON."""
    known = published.load()
    return {
        "experiments": {
            name: {"title": entry.title, "runs": [run.to_dict() for run in entry.runs()]}
            for name, entry in EXPERIMENTS.items()
        },
        "published": [
            {**key._asdict(), **value._asdict(), "top5": known.top5.get(key)}
            for key, value in known.values.items()
        ],
        "claims": [{"experiment": name, "text": text} for name, text in known.claims],
        "notes": [{"place": place, "text": text} for place, text in known.notes],
    }


def _runs(name: str, known: Experiment) -> Table:
    table = Table(title=f"{name}: {known.title}", box=SIMPLE_HEAD, show_edge=False)
    for column in ("networks", "data", "optimizers", "swept", "epochs"):
        table.add_column(column)
    for grid in known.grids:
        swept = f"{grid.sweep}: {', '.join(f'{value:g}' for value in grid.values)}" if grid.sweep else ""
        lists = (", ".join(values) for values in (grid.networks, grid.datasets, grid.optimizers))
        table.add_row(*lists, swept, str(grid.common.get("epochs", 250)))
    return table


def _used(known: Experiment, field: str) -> list[str]:
    return list(dict.fromkeys(name for grid in known.grids for name in getattr(grid, field)))
