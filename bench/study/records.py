"""The records that runs have left, read back."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.grouping import grouped
from bench.study.config import RunConfig
from bench.study.run import METRICS

Floats = NDArray[np.float64]
TARGETS = {"test_accuracy": "test accuracy (%)", "gap": "generalisation gap (%)"}
"""What a network's metrics are held against: the keys of `Record.target`, and their names in figures."""


@dataclass(frozen=True)
class Record:
    """A run that has ended.

    Attributes:
        config: the configuration of the run.
        folder: the run's folder; None for one that was read from a table of records.
        diverged: whether its loss stopped being a number.
        epochs: one dictionary per epoch, the columns of `epochs.csv`.
        budget: seconds that it could train for; None where only epochs counted.
        revision: the revision of this software by which it was begun; None where that is not known.
        tabled: its layers as `layers` gives them, for one that was read from a table of records.

    """

    config: RunConfig
    folder: Path | None
    diverged: bool
    epochs: tuple[dict[str, float], ...]
    budget: float | None = None
    revision: str | None = None
    tabled: Mapping[str, Mapping[str, Floats]] = field(default_factory=dict, compare=False)

    @property
    def final(self) -> dict[str, float]:
        """The last epoch."""
        return self.epochs[-1]

    @property
    def gap(self) -> float:
        """Training minus test accuracy at the end, both of images as they are: the generalisation gap."""
        return self.final["train_accuracy"] - self.final["test_accuracy"]

    def target(self, name: str) -> float:
        """One of `TARGETS`, as a share."""
        return self.gap if name == "gap" else self.final[name]

    def column(self, name: str) -> Floats:
        """One quantity over the epochs."""
        return np.array([epoch[name] for epoch in self.epochs])

    @property
    def seconds(self) -> Floats:
        """Time trained at the end of every epoch: training and epoch ends."""
        return np.cumsum(self.column("seconds_training") + self.column("seconds_epoch_end"))

    @property
    def machine(self) -> dict[str, Any]:
        """What it was begun on; empty where only a table of records is left of it."""
        if self.folder is None:
            return {}
        return json.loads((self.folder / "environment.json").read_text(encoding="utf-8"))

    @cached_property
    def layers(self) -> Mapping[str, Mapping[str, Floats]]:
        """Layer name to metric to its values, one per epoch; empty where they were not kept."""
        if self.folder is None:
            return self.tabled
        path = self.folder / "layers.csv"
        if not path.exists():
            return {}
        with path.open(newline="", encoding="utf-8") as file:
            return by_layer(csv.DictReader(file))


def by_layer(rows: Iterable[Mapping[str, str]]) -> dict[str, dict[str, Floats]]:
    """Rows of one run, an epoch and a layer each, as `Record.layers`."""
    layers: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        known = layers.setdefault(row["layer"], {metric: [] for metric in METRICS})
        for metric in METRICS:
            known[metric].append(float(row[metric]))
    return {
        name: {metric: np.array(values) for metric, values in known.items()} for name, known in layers.items()
    }


def read(out: Path, configs: Iterable[RunConfig]) -> list[Record]:
    """The records of those runs that have ended, in the order given."""
    records = []
    for config in configs:
        folder = config.folder(out)
        path = folder / "result.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        with (folder / "epochs.csv").open(newline="", encoding="utf-8") as file:
            epochs = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
        records.append(
            Record(
                config,
                folder,
                diverged=result["status"] == "diverged",
                epochs=tuple(epochs),
                budget=result.get("budget_seconds"),
                revision=_begun_by(folder),
            )
        )
    return records


def _begun_by(folder: Path) -> str | None:
    path = folder / "environment.json"
    return json.loads(path.read_text(encoding="utf-8")).get("revision") if path.exists() else None


def finished(records: Sequence[Record]) -> list[Record]:
    """The records of runs that did not diverge."""
    return [record for record in records if not record.diverged]


def is_plain(record: Record) -> bool:
    """Whether nothing but the learning rate was set."""
    return dict(record.config.settings).keys() <= {"lr"}


def by_label(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Seeds of the same optimizer and settings together, in the order given."""
    return grouped(records, lambda record: record.config.label)


def by_cell(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The runs of the same network on the same data together, under the names of both."""
    return grouped(records, lambda record: f"{record.config.network}, {record.config.dataset}")
