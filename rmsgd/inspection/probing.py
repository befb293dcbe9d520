"""Measuring the metrics of every layer of a model or a checkpoint from its weights alone."""

from collections.abc import Sequence

from torch import Tensor

from rmsgd.backends import backend_for
from rmsgd.inspection.measuring import Measuring
from rmsgd.inspection.reading.stored import StoredTensor
from rmsgd.layers import unfoldings
from rmsgd.metrics import LayerMetrics


class Probing(Measuring[LayerMetrics]):
    """A probe under way, for callers that show progress or may be interrupted; see ``probe.probe``."""

    @property
    def layers(self) -> tuple[LayerMetrics, ...]:
        """The layers done so far, in the order of the source."""
        return self.results

    def measured(self, layers: Sequence[StoredTensor], weights: Sequence[Tensor]) -> Sequence[LayerMetrics]:
        """See ``Measuring``."""
        matrices = [(weight, unfolding) for weight in weights for unfolding in unfoldings(weight.shape)]
        rows = iter(backend_for(weights[0].device).measure(matrices).tolist())
        return [
            LayerMetrics.from_rows(layer.name, layer.shape, [next(rows) for _ in unfoldings(weight.shape)])
            for layer, weight in zip(layers, weights, strict=True)
        ]

    def skipped(self, layer: StoredTensor, reason: str) -> LayerMetrics:
        """See ``Measuring``."""
        return LayerMetrics.skip(layer.name, layer.shape, reason)
