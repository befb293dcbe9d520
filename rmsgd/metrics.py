"""What a network looks like from its weights: metrics per layer, and the report that holds them."""

import csv
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TextIO

from rmsgd.backends.base import (
    CHANGED,
    CONDITION_NUMBER,
    MEASURED,
    NOISE_VARIANCE,
    RANK,
    STABLE_RANK,
    STATUS,
)
from rmsgd.layers import unfoldings
from rmsgd.reference import network_quality, quality


@dataclass(frozen=True)
class LayerMetrics:
    """One weight as EVBMF sees it.

    ``rank`` and ``noise_variance`` have one entry per mode; ``stable_rank`` (Eq. 2) and
    ``condition_number`` (Eq. 3) are the means over the modes and ``quality`` is
    ``arctan(stable_rank / condition_number)`` (Eq. 4). A skipped layer has no modes, NaN metrics and
    the reason in ``skipped``.
    """

    name: str
    shape: tuple[int, ...]
    modes: tuple[str, ...]
    rank: tuple[int, ...]
    noise_variance: tuple[float, ...]
    stable_rank: float
    condition_number: float
    quality: float
    skipped: str | None = None

    @classmethod
    def from_rows(cls, name: str, shape: tuple[int, ...], rows: Sequence[Sequence[float]]) -> "LayerMetrics":
        """A layer from its rows of a metrics table (``backends.base``), one per unfolding of its shape.

        An empty low rank has quality 0. A NaN or an Inf in the weight makes it a skipped layer, and so
        does a change of it while it was measured.
        """
        if any(row[STATUS] == CHANGED for row in rows):
            return cls.skip(name, shape, "changed before it was measured")
        if any(row[STATUS] != MEASURED for row in rows):
            return cls.skip(name, shape, "NaN or infinite entries")
        # A 1 x 1 kernel's two modes share one spectrum.
        modes = [(mode, row) for row, u in zip(rows, unfoldings(shape), strict=True) for mode in u.modes]
        s = sum(row[STABLE_RANK] for _, row in modes) / len(modes)
        kappa = sum(row[CONDITION_NUMBER] for _, row in modes) / len(modes)
        return cls(
            name,
            shape,
            tuple(mode for mode, _ in modes),
            tuple(int(row[RANK]) for _, row in modes),
            tuple(row[NOISE_VARIANCE] for _, row in modes),
            s,
            kappa,
            quality(s, kappa),
        )

    @classmethod
    def skip(cls, name: str, shape: tuple[int, ...], reason: str) -> "LayerMetrics":
        """A layer that was not measured."""
        return cls(name, shape, (), (), (), math.nan, math.nan, math.nan, reason)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them: lists for tuples, None for what is undefined."""

        def plain(value: Any) -> Any:
            if isinstance(value, float) and math.isnan(value):
                return None
            return list(value) if isinstance(value, tuple) else value

        return {key: plain(value) for key, value in vars(self).items()}


@dataclass(frozen=True)
class Report:
    """The metrics of a network's layers. In a notebook it shows itself as a table."""

    layers: tuple[LayerMetrics, ...]
    errors: tuple[str, ...] = ()
    """What could not be read, one line each: the layers are the rest."""

    @property
    def measured(self) -> tuple[LayerMetrics, ...]:
        """The layers that were not skipped."""
        return tuple(layer for layer in self.layers if layer.skipped is None)

    @property
    def quality(self) -> float:
        """Q of the network, ``||q||_2^2 / sqrt(layers)`` over the layers that were measured (Eq. 5)."""
        return network_quality([layer.quality for layer in self.measured])

    def to_dict(self) -> dict[str, Any]:
        """``{"quality", "layers": [fields]}``, ready for JSON; "errors" only where there are any."""
        content: dict[str, Any] = {
            "quality": self.quality,
            "layers": [layer.to_dict() for layer in self.layers],
        }
        if self.errors:
            content["errors"] = list(self.errors)
        return content

    def to_csv(self, path: str | os.PathLike[str] | TextIO) -> None:
        """Write one row per layer: the fields, tuples as "64x3x7x7" or "5;9", empty for undefined."""
        write_csv(path, [csv_row(layer) for layer in self.layers])

    def to_pandas(self) -> Any:
        """A pandas DataFrame with one row per layer and its name as index.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            message = "to_pandas() needs pandas: pip install pandas"
            raise ModuleNotFoundError(message, name="pandas") from error
        columns = [field.name for field in fields(LayerMetrics)]
        rows = [[getattr(layer, column) for column in columns] for layer in self.layers]
        return pandas.DataFrame(rows, columns=columns).set_index("name")

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw stable rank, condition number and quality of every measured layer to a file.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
            ValueError: no layer was measured.
        """
        from rmsgd.inspection.report.plots import plot_report

        plot_report(self, path)

    def _repr_html_(self) -> str:
        from rmsgd.inspection.report.tables import html_table

        return html_table(self)


def csv_row(layer: LayerMetrics) -> dict[str, Any]:
    """The fields as a row of text: what is undefined is empty."""
    row = layer.to_dict()
    for key, value in row.items():
        if isinstance(value, list):
            row[key] = ("x" if key == "shape" else ";").join(map(str, value))
    return row


def write_csv(path: str | os.PathLike[str] | TextIO, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows under a line of column names, to a path or to an open file."""
    if isinstance(path, str | os.PathLike):
        with open(path, "w", newline="", encoding="utf-8") as file:
            write_csv(file, rows)
        return
    columns = list(rows[0]) if rows else [field.name for field in fields(LayerMetrics)]
    writer = csv.DictWriter(path, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
