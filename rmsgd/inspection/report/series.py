"""The reports of a series of checkpoints: a network at several points of its training."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from rmsgd.inspection.reading.natural_order import natural_order
from rmsgd.inspection.report.csv_table import layer_row, write_csv
from rmsgd.inspection.report.report import Report
from rmsgd.metrics import LayerMetrics


@dataclass(frozen=True)
class Series:
    """Reports in the order of training."""

    sources: tuple[str, ...]
    """A name for each report, such as a path or an epoch."""
    reports: tuple[Report, ...]

    def by_layer(self) -> dict[str, list[LayerMetrics | None]]:
        """Each layer that was measured at least once, in the order of the network, over the checkpoints.

        Layers are matched by ``by_comparable_name``.
        """
        layers: dict[str, list[LayerMetrics | None]] = {}
        for index, report in enumerate(self.reports):
            for name, layer in by_comparable_name(report).items():
                layers.setdefault(name, [None] * len(self.reports))[index] = layer
        return layers

    def values(self, field: str) -> NDArray[np.float64]:
        """One metric ("quality", "stable_rank", "condition_number"), float64 (layers, checkpoints).

        It is NaN where a layer was not measured.
        """
        rows = self.by_layer().values()
        table = [[np.nan if layer is None else getattr(layer, field) for layer in row] for row in rows]
        return np.array(table, dtype=np.float64).reshape(len(rows), len(self.reports))

    def to_dict(self) -> dict[str, Any]:
        """``{"series": [{"source", then the report's own keys}]}``, ready for JSON."""
        pairs = zip(self.sources, self.reports, strict=True)
        return {"series": [{"source": source, **report.to_dict()} for source, report in pairs]}

    def to_csv(self, path: str | os.PathLike[str] | TextIO) -> None:
        """Write one row per checkpoint and layer: its source, then the columns of ``Report.to_csv``."""
        pairs = zip(self.sources, self.reports, strict=True)
        write_csv(
            path, [{"source": source, **layer_row(x)} for source, report in pairs for x in report.layers]
        )


def comparable_name(name: str) -> str:
    """A layer's name without the parts that DistributedDataParallel and torch.compile add to it."""
    return re.sub(r"^(module\.)+", "", re.sub(r"(^|(?<=\.))_orig_mod\.", "", name))


def by_comparable_name(report: Report) -> dict[str, LayerMetrics]:
    """The measured layers by ``comparable_name``, or by their own name where two would share that."""
    names = [comparable_name(layer.name) for layer in report.measured]
    shared = {name for name, count in Counter(names).items() if count > 1}
    return {
        layer.name if name in shared else name: layer
        for name, layer in zip(names, report.measured, strict=True)
    }


def in_order_of_training(paths: Sequence[str]) -> list[str]:
    """Paths in natural order, epoch 2 before epoch 10, if a shell's wildcard gave them; else as they are."""
    return sorted(paths, key=natural_order) if list(paths) == sorted(paths) else list(paths)
