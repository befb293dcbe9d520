"""The paper's published numbers and claims, and inconsistencies in it, from `published.toml`."""

import math
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("published.toml")


class Value(NamedTuple):
    """Mean and standard deviation over seeds, in per cent; the deviation is NaN where none is given."""

    mean: float
    std: float

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if math.isnan(self.std) else f"{self.mean:.2f} ± {self.std:.2f}"


class Key(NamedTuple):
    """One cell of a table. `epoch` is 0 where the table reports the end of the training."""

    table: str
    dataset: str
    network: str
    optimizer: str
    epoch: int = 0


@dataclass(frozen=True)
class Published:
    """Numbers by cell, and by place what was claimed (experiment id, text) and noted (place, text)."""

    values: dict[Key, Value]
    top5: dict[Key, float]
    claims: tuple[tuple[str, str], ...]
    notes: tuple[tuple[str, str], ...]

    def value(self, table: str, dataset: str, network: str, optimizer: str, epoch: int = 0) -> Value | None:
        """The number of a cell; None where the paper has none. All of RMSGD's rules share its column."""
        column = "rmsgd" if optimizer.startswith("rmsgd") else optimizer
        return self.values.get(Key(table, dataset, network, column, epoch))


@cache
def load() -> Published:
    """Everything in `published.toml`; what is nan there (not in the paper's text) is left out."""
    with FILE.open("rb") as file:
        content = tomllib.load(file)
    values, top5 = {}, {}
    for table in content["table"]:
        for row in table["rows"]:
            for index, column in enumerate(table["columns"]):
                key = Key(table["id"], row["dataset"], row["network"], column, row.get("epoch", 0))
                mean = row["mean"][index]
                if not math.isnan(mean):
                    values[key] = Value(mean, row["std"][index] if "std" in row else math.nan)
                if not math.isnan(row.get("top5", [math.nan] * (index + 1))[index]):
                    top5[key] = row["top5"][index]
    claims = tuple((entry["id"], entry["text"]) for entry in content["claim"])
    return Published(
        values, top5, claims, tuple((entry["place"], entry["text"]) for entry in content["note"])
    )
