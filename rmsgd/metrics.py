"""What a network looks like from its weights: the metrics of its layers, and Q of them all."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rmsgd import reference
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
            reference.quality(s, kappa),
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


def measured(layers: Sequence[LayerMetrics]) -> tuple[LayerMetrics, ...]:
    """The layers that were not skipped."""
    return tuple(layer for layer in layers if layer.skipped is None)


def network_quality(layers: Sequence[LayerMetrics]) -> float:
    """Q of a network, ``||q||_2^2 / sqrt(layers)`` over the layers that were measured (Eq. 5)."""
    return reference.network_quality([layer.quality for layer in measured(layers)])
