"""Two networks compared: which layers changed, and by how much."""

import os
from dataclasses import dataclass
from typing import Any, TextIO

from rmsgd.inspection.report.csv_table import write_csv
from rmsgd.inspection.report.report import Report
from rmsgd.inspection.report.series import by_comparable_name
from rmsgd.metrics import QUALITY, SCALARS, LayerMetrics, Metric, plain

COMPARED = (QUALITY, *(metric for metric in SCALARS if metric is not QUALITY))
"""The metrics of a comparison; layers are ordered by the change of the first."""


@dataclass(frozen=True)
class LayerChange:
    """One layer before and after; None where it is not there or was skipped."""

    name: str
    before: LayerMetrics | None
    after: LayerMetrics | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape, after the change if the layer is there, else before."""
        layer = self.after or self.before
        assert layer is not None
        return layer.shape

    def change(self, metric: Metric) -> float | None:
        """After minus before, in the metric's unit; None where either is missing."""
        if self.before is None or self.after is None:
            return None
        return float(getattr(self.after, metric.name)) - float(getattr(self.before, metric.name))


@dataclass(frozen=True)
class Comparison:
    """The reports of two networks whose layers have the same names."""

    sources: tuple[str, str]
    before: Report
    after: Report

    def changes(self) -> list[LayerChange]:
        """Every layer measured on either side: the largest change of quality first, unpaired ones last.

        Equal changes of quality are ordered by that of the stable rank, then of the condition number.
        Layers are matched by ``series.by_comparable_name``.
        """
        before, after = by_comparable_name(self.before), by_comparable_name(self.after)
        changes = [LayerChange(n, before.get(n), after.get(n)) for n in dict.fromkeys([*before, *after])]

        def size(change: LayerChange) -> list[float]:
            return [-1.0 if (d := change.change(metric)) is None else abs(d) for metric in COMPARED]

        return sorted(changes, key=size, reverse=True)

    def to_dict(self) -> dict[str, Any]:
        """``{"sources", "quality": [before, after], "layers": [...]}``, ready for JSON."""
        return {
            "sources": list(self.sources),
            "quality": [plain(self.before.quality), plain(self.after.quality)],
            "layers": [
                {
                    "name": change.name,
                    "shape": list(change.shape),
                    "before": None if change.before is None else change.before.to_dict(),
                    "after": None if change.after is None else change.after.to_dict(),
                    "change": {metric.name: change.change(metric) for metric in COMPARED},
                }
                for change in self.changes()
            ],
        }

    def to_csv(self, path: str | os.PathLike[str] | TextIO) -> None:
        """Write one row per layer: every metric before and after, and its change; empty where undefined."""
        rows = []
        for change in self.changes():
            row: dict[str, Any] = {"name": change.name, "shape": "x".join(map(str, change.shape))}
            for metric in COMPARED:
                for when, layer in (("before", change.before), ("after", change.after)):
                    row[f"{metric.name}_{when}"] = None if layer is None else getattr(layer, metric.name)
                row[f"{metric.name}_change"] = change.change(metric)
            rows.append(row)
        write_csv(path, rows)
