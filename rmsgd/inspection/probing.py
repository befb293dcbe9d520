"""Measuring the metrics of every layer of a model or a checkpoint from its weights alone."""

from collections import Counter
from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from rmsgd.backends.base import MEASURED, STAGE, STATUS
from rmsgd.backends.spectra import measure_spectra
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

    @cached_property
    def stages(self) -> Counter[int]:
        """How many matrices so far took which ``backends.base.STAGE``: a Gram matrix in fp32 or fp64, or an
        SVD.
        """
        return Counter()

    def measured(self, layers: Sequence[StoredTensor], weights: Sequence[Tensor]) -> Sequence[LayerMetrics]:
        """See ``Measuring``."""
        matrices = [(weight, unfolding) for weight in weights for unfolding in unfoldings(weight.shape)]
        table, gammas = measure_spectra(matrices, "half")
        self.stages.update(int(row[STAGE]) for row in table.tolist() if row[STATUS] == MEASURED)
        found = iter(zip(table.tolist(), (gamma.cpu().numpy() for gamma in gammas), strict=True))
        results = []
        for layer, weight in zip(layers, weights, strict=True):
            rows, spectra = zip(*(next(found) for _ in unfoldings(weight.shape)), strict=True)
            results.append(LayerMetrics.from_rows(layer.name, layer.shape, rows, spectra))
        return results

    def skipped(self, layer: StoredTensor, reason: str) -> LayerMetrics:
        """See ``Measuring``."""
        return LayerMetrics.skip(layer.name, layer.shape, reason)
