"""Figure 2 (b): the metrics of NATS-Bench's networks against the accuracies that its authors measured."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

import rmsgd
from bench import atomic
from bench.data import nats
from bench.data.source import DatasetError
from bench.locks import locked
from bench.measure import count
from bench.plots import save
from bench.study.network_metrics import LABELS, network_metrics
from bench.study.records import TARGETS
from bench.study.statistics import correlation
from rmsgd.plots import PALETTE, blank, plain

COLUMNS = ("index", "epochs", "seed", *LABELS, "train_accuracy", "test_accuracy")


def measure(
    folder: Path,
    table: Path,
    dataset: str,
    most: int | None = None,
    tell: Callable[[int, int], object] = lambda done, of: None,
) -> list[dict[str, float]]:
    """Measures the architectures in `folder`, appending to the CSV file `table`; those in it are skipped.

    Args:
        folder: the folder of NATS-Bench's files.
        table: the CSV file, written after every architecture, so that a run that was stopped goes on there.
        dataset: the data set that the networks were trained on.
        most: the most architectures to measure; None: all.
        tell: called with the number that is done, and the number in all.

    Raises:
        DatasetError: there is no architecture, one cannot be read, or `table` is another table.
        BusyError: another process measures into the same table.

    """
    files = nats.files(folder)[:most]
    table.parent.mkdir(parents=True, exist_ok=True)
    with locked(table.parent, name=f".{table.name}.lock"):
        rows = _read(table)
        done = {int(row["index"]) for row in rows}
        rewritten = False
        for count, path in enumerate(files, 1):
            if int(path.name.split(".")[0]) not in done:
                mine = [_row(trained) for trained in nats.read(path, dataset)]
                rows += mine
                if rewritten:
                    with table.open("a", encoding="utf-8") as file:
                        file.write(_lines(mine))
                else:
                    # The table is written anew without the rows that `_read` left out. Until there are new
                    # rows nothing is lost.
                    atomic.write(table, (",".join(COLUMNS) + "\n" + _lines(rows)).encode())
                    rewritten = True
            tell(count, len(files))
    return rows


def _lines(rows: Sequence[dict[str, float]]) -> str:
    """Rows as lines of the table."""
    return "".join(",".join(str(row[name]) for name in COLUMNS) + "\n" for row in rows)


def _row(trained: nats.Trained) -> dict[str, float]:
    report = rmsgd.probe(trained.weights)
    return {
        "index": trained.index,
        "epochs": trained.epochs,
        "seed": trained.seed,
        **network_metrics(report),
        "train_accuracy": trained.train_accuracy,
        "test_accuracy": trained.test_accuracy,
    }


def _read(table: Path) -> list[dict[str, float]]:
    if not table.exists():
        return []
    text = table.read_text(encoding="utf-8")
    lines = text[: text.rfind("\n") + 1].splitlines()  # a line that was cut has no end
    try:
        found = [{name: float(row[name]) for name in COLUMNS} for row in csv.DictReader(lines)]
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(
            f"{table} is not a table of `study nats`: {type(error).__name__}: {error}"
        ) from error
    for row in found:
        row.update({name: int(row[name]) for name in ("index", "epochs", "seed")})
    # The last architecture may lack rows when the process was stopped: it is measured again.
    last = found[-1]["index"] if found else None
    return [row for row in found if row["index"] != last]


def correlations(rows: Sequence[dict[str, float]]) -> list[dict[str, Any]]:
    """PLCC and ROCC of every metric with test accuracy and gap, for each number of epochs trained."""
    found = []
    for epochs in sorted({row["epochs"] for row in rows}):
        mine = [row for row in rows if row["epochs"] == epochs]
        for metric in LABELS:
            for target in TARGETS:
                result = correlation([row[metric] for row in mine], [value(row, target) for row in mine])
                if result is not None:
                    found.append({"epochs": epochs, "metric": metric, "against": target, **result._asdict()})
    return found


def value(row: dict[str, float], target: str) -> float:
    """One of `TARGETS`, as a share."""
    return row["train_accuracy"] - row["test_accuracy"] if target == "gap" else row[target]


def table(entries: Sequence[dict[str, Any]]) -> Table:
    """The correlations."""
    rows = Table(title="NATS-Bench: what goes together", box=SIMPLE_HEAD, show_edge=False)
    for column in ("epochs trained", "metric", "against"):
        rows.add_column(column)
    for column in ("networks", "PLCC", "ROCC"):
        rows.add_column(column, justify="right")
    for entry in entries:
        names = (str(entry["epochs"]), entry["metric"], entry["against"], str(entry["n"]))
        rows.add_row(*names, f"{entry['plcc']:+.2f}", f"{entry['rocc']:+.2f}")
    return rows


def draw(rows: Sequence[dict[str, float]], path: Path) -> Path:
    """Q against test accuracy and gap: a row of panels for each number of epochs trained."""
    lengths = sorted({row["epochs"] for row in rows})
    figure = blank(8.4, 3.2 * len(lengths))
    panels = figure.subplots(len(lengths), 2, squeeze=False)
    for line, epochs in zip(panels, lengths, strict=True):
        mine = [row for row in rows if row["epochs"] == epochs]
        for axes, (target, label) in zip(line, TARGETS.items(), strict=True):
            q, heights = [row["Q"] for row in mine], [100 * value(row, target) for row in mine]
            axes.plot(q, heights, ".", color=PALETTE[0], markersize=3, alpha=0.5, rasterized=True)
            found = correlation(q, heights)
            trained = count(int(epochs), "epoch")
            axes.set_title(f"{trained}: {found}" if found else trained, fontsize=9)
            plain(axes, "Q", label)
    return save(figure, path)
