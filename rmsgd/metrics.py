"""What a network looks like from its weights: metrics per layer, and the report that holds them."""

import math
from dataclasses import dataclass
from typing import Any

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
    def from_modes(
        cls,
        name: str,
        shape: tuple[int, ...],
        modes: tuple[str, ...],
        rank: tuple[int, ...],
        noise_variance: tuple[float, ...],
        stable_rank: tuple[float, ...],
        condition_number: tuple[float, ...],
    ) -> "LayerMetrics":
        """A measured layer from its per-mode values; an empty low rank has quality 0."""
        s = sum(stable_rank) / len(modes)
        kappa = sum(condition_number) / len(modes)
        return cls(name, shape, modes, rank, noise_variance, s, kappa, quality(s, kappa))

    @classmethod
    def skip(cls, name: str, shape: tuple[int, ...], reason: str) -> "LayerMetrics":
        """A layer that was not measured."""
        return cls(name, shape, (), (), (), math.nan, math.nan, math.nan, reason)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them: lists for tuples, None for what is undefined."""
        return {
            key: list(value)
            if isinstance(value, tuple)
            else None
            if isinstance(value, float) and math.isnan(value)
            else value
            for key, value in vars(self).items()
        }


@dataclass(frozen=True)
class Report:
    """The metrics of a network's layers."""

    layers: tuple[LayerMetrics, ...]

    @property
    def quality(self) -> float:
        """Q of the network, ``||q||_2^2 / sqrt(layers)`` over the layers that were measured (Eq. 5)."""
        return network_quality([layer.quality for layer in self.layers if layer.skipped is None])

    def to_dict(self) -> dict[str, Any]:
        """``{"quality", "layers": [fields]}``, ready for JSON."""
        return {"quality": self.quality, "layers": [layer.to_dict() for layer in self.layers]}
