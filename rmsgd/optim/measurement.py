"""What one epoch end measured: the metrics of every matrix or layer, and the layers they belong to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from rmsgd.backends.base import MEASURED, STATUS
from rmsgd.layers import unfoldings
from rmsgd.metrics import LayerMetrics
from rmsgd.tails import ALPHA, TAIL_STATUS, LayerTail, Slices


@dataclass(frozen=True)
class Measurement:
    """The metrics of the layers of one device, which are read from it only when they are needed.

    ``metrics`` is the backend's table, float64 (matrices, FIELDS). A layer's rows are those of the unfoldings
    of its shape, one layer after the other.
    """

    positions: Sequence[int]
    """Where the layers stand among all parameters."""
    names: Sequence[str]
    shapes: Sequence[tuple[int, ...]]
    metrics: Tensor
    join: Callable[[], None]
    """Makes torch's stream wait for the metrics; it is called before they are read."""

    def _rows(self) -> list[list[list[float]]]:
        self.join()
        rows = iter(self.metrics.tolist())
        return [[next(rows) for _ in unfoldings(shape)] for shape in self.shapes]

    def not_finite(self) -> list[str]:
        """Names of the layers whose weights hold a NaN or an Inf."""
        return [
            name
            for name, rows in zip(self.names, self._rows(), strict=True)
            if any(row[STATUS] != MEASURED for row in rows)
        ]

    def layers(self) -> dict[int, LayerMetrics]:
        """The layers' metrics by their positions."""
        layers = zip(self.positions, self.names, self.shapes, self._rows(), strict=True)
        return {i: LayerMetrics.from_rows(name, shape, rows) for i, name, shape, rows in layers}


@dataclass(frozen=True)
class TailMeasurement:
    """The tail exponents of the layers of one device; ``metrics`` is their table, (layers, 2) on the host."""

    positions: Sequence[int]
    """Where the layers stand among all parameters."""
    names: Sequence[str]
    shapes: Sequence[tuple[int, ...]]
    metrics: Tensor

    def not_finite(self) -> list[str]:
        """Names of the layers whose weights hold a NaN or an Inf."""
        return [layer.name for layer in self.layers().values() if layer.skipped is not None]

    def layers(self) -> dict[int, LayerTail]:
        """The layers' tails by their positions."""
        layers = zip(self.positions, self.names, self.shapes, self.metrics.tolist(), strict=True)
        return {i: _tail(name, shape, row) for i, name, shape, row in layers}


def _tail(name: str, shape: tuple[int, ...], row: Sequence[float]) -> LayerTail:
    skipped = None if row[TAIL_STATUS] == MEASURED else "NaN or infinite entries"
    return LayerTail(name, shape, Slices.of(shape).values, row[ALPHA], skipped)
