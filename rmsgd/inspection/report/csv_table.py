"""Layers as rows of a CSV table."""

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TextIO

from rmsgd.metrics import LayerMetrics

COLUMNS = [field.name for field in fields(LayerMetrics)]


def layer_row(layer: LayerMetrics) -> dict[str, Any]:
    """The fields as a row of text, in which an undefined number is empty."""
    row = layer.to_dict()
    for key, value in row.items():
        if isinstance(value, list):
            row[key] = ("x" if key == "shape" else ";").join(map(str, value))
    return row


def write_csv(
    path: str | os.PathLike[str] | TextIO, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()
) -> None:
    """Write rows under a line of column names, to a path or to an open file.

    ``columns`` are by default those of the first row. Without rows they must be given.
    """
    if isinstance(path, str | os.PathLike):
        with open(path, "w", newline="", encoding="utf-8") as file:
            write_csv(file, rows, columns)
        return
    writer = csv.DictWriter(path, list(rows[0]) if rows else columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
