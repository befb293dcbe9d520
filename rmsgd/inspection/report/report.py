"""The report of one network: its layers' metrics and Q, and every form in which they are shown."""

import os
from dataclasses import dataclass
from typing import Any, TextIO

from rmsgd.inspection.report.csv_table import COLUMNS, layer_row, write_csv
from rmsgd.inspection.report.layer_bars import draw_layers
from rmsgd.inspection.report.layer_table import html_table
from rmsgd.metrics import LayerMetrics, measured, network_quality, plain


@dataclass(frozen=True)
class Report:
    """The metrics of a network's layers, in the units and ranges of ``rmsgd.metrics.METRICS``.

    In a notebook a report shows itself as a table.
    """

    layers: tuple[LayerMetrics, ...]
    errors: tuple[str, ...] = ()
    """Parts of the source that could not be read, one line each. ``layers`` has the rest."""
    notes: tuple[str, ...] = ()
    """Notes on the source, one line each, such as which of its networks was measured."""

    @property
    def measured(self) -> tuple[LayerMetrics, ...]:
        """The layers that were not skipped."""
        return measured(self.layers)

    @property
    def quality(self) -> float:
        """Q of the network, ``||q||_2^2 / sqrt(layers)`` over the layers that were measured (Eq. 5).

        It lies in 0 to pi^2/4 sqrt(layers), and is NaN where no layer was measured.
        """
        return network_quality(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return ``{"quality", "layers": [fields]}`` for JSON, with "errors" and "notes" if there are any.

        Undefined numbers are None, among them the quality of a network of which no layer was measured.
        """
        content: dict[str, Any] = {
            "quality": plain(self.quality),
            "layers": [layer.to_dict() for layer in self.layers],
        }
        if self.errors:
            content["errors"] = list(self.errors)
        if self.notes:
            content["notes"] = list(self.notes)
        return content

    def to_csv(self, path: str | os.PathLike[str] | TextIO) -> None:
        """Write one row per layer: the fields, tuples as "64x3x7x7" or "5;9", undefined numbers as "".

        Raises:
            OSError: the file cannot be written.
        """
        write_csv(path, [layer_row(layer) for layer in self.layers], COLUMNS)

    def to_pandas(self) -> Any:
        """Return a pandas DataFrame with one row per layer, its name as index, and a column per field.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            message = "to_pandas() needs pandas: pip install pandas"
            raise ModuleNotFoundError(message, name="pandas") from error
        rows = [[getattr(layer, column) for column in COLUMNS] for layer in self.layers]
        return pandas.DataFrame(rows, columns=COLUMNS).set_index("name")

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the metrics of every measured layer, those of ``metrics.SCALARS``, to a file.

        The suffix of ``path`` decides the format. The axes carry the units and ranges.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
            ValueError: no layer was measured, or the suffix names no format of figures.
        """
        draw_layers(self.layers, path)

    def _repr_html_(self) -> str:
        return html_table(self.layers)
