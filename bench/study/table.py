"""Records of many runs as two tables that are small enough to be kept with the code.

`NAME.csv` has a row for every run and epoch, `NAME-layers.csv` one for every epoch and layer of a few runs.
A report needs nothing but these tables.
"""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import measure
from bench.errors import UsageError
from bench.grouping import grouped
from bench.study.config import RunConfig
from bench.study.records import Record, by_layer
from bench.study.run import METRICS

RUN = ("optimizer", "settings", "seed", "run", "status")
"""What is the same in all rows of a run: `settings` and `run`, the other fields that it sets, are JSON."""

REVISION = "revision"
"""The column of `Record.revision`, which older tables do not have."""

DIGITS = 8


def write(path: Path, records: Sequence[Record], in_full: Sequence[Record] = ()) -> list[Path]:
    """Writes the tables and returns their files.

    Args:
        path: the path of the first table.
        records: the records that it holds.
        in_full: the records whose layers the second table holds.

    """
    rows = [
        {**_run(record), REVISION: record.revision or ""}
        | {name: _short(value) for name, value in epoch.items()}
        for record in records
        for epoch in record.epochs
    ]
    measure.write_csv(path, rows)
    layers = [
        {**_run(record), "epoch": epoch + 1, "layer": layer}
        | {metric: _short(values[metric][epoch]) for metric in METRICS}
        for record in in_full
        for layer, values in record.layers.items()
        for epoch in range(len(record.epochs))
    ]
    measure.write_csv(_layers_path(path), layers)
    return [path, _layers_path(path)]


def read(path: Path) -> dict[RunConfig, Record]:
    """The records of a table that `write` wrote.

    Raises:
        UsageError: it is no such table.
        OSError: it cannot be read.

    """
    try:
        epochs = _grouped(path)
        if not epochs:
            raise ValueError("it has no row")
        layers = _grouped(_layers_path(path)) if _layers_path(path).exists() else {}
        found = {}
        for key, rows in epochs.items():
            config = _config(key)
            found[config] = Record(
                config,
                None,
                rows[0]["status"] == "diverged",
                tuple(
                    {name: float(value) for name, value in row.items() if name not in (*RUN, REVISION)}
                    for row in rows
                ),
                revision=rows[0].get(REVISION) or None,
                tabled=by_layer(layers.get(key, ())),
            )
        return found
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise UsageError(
            f"{path} is not a table of records as `study report --save-records` writes it ({error})"
        ) from error


def _layers_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}-layers{path.suffix}")


def _run(record: Record) -> dict[str, Any]:
    content = record.config.to_dict()
    default = RunConfig(record.config.network, record.config.dataset, record.config.optimizer).to_dict()
    named = ("optimizer", "settings", "seed")
    other = {
        name: value
        for name, value in content.items()
        if name in ("network", "dataset") or (name not in named and default.get(name, ...) != value)
    }
    return {
        "optimizer": record.config.optimizer,
        "settings": json.dumps(content["settings"]),
        "seed": record.config.seed,
        "run": json.dumps(other),
        "status": "diverged" if record.diverged else "complete",
    }


def _config(key: tuple[str, ...]) -> RunConfig:
    optimizer, settings, seed, other, _ = key
    content = {**json.loads(other), "settings": json.loads(settings)}
    return RunConfig.from_dict({**content, "optimizer": optimizer, "seed": int(seed)})


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _grouped(path: Path) -> dict[tuple[str, ...], list[Mapping[str, str]]]:
    """The rows of each run, by what is the same in all of them."""
    with path.open(newline="", encoding="utf-8") as file:
        return grouped(_rows(csv.DictReader(file)), lambda row: tuple(row[name] for name in RUN))


def _rows(rows: Iterable[Mapping[str, str]]) -> Iterable[Mapping[str, str]]:
    """Those rows; ValueError for one that was cut."""
    for row in rows:
        if None in row.values() or None in row:
            raise ValueError("a row has another number of values than there are columns")
        yield row
