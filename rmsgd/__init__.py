"""RMSGD for PyTorch: per-layer learning rates from the stable rank of the weights."""

from rmsgd._version import __version__
from rmsgd.inspection.probe import probe
from rmsgd.inspection.report.report import Report
from rmsgd.inspection.spectra import Spectrum, spectra
from rmsgd.lowrank import LowRank, evbmf
from rmsgd.metrics import LayerMetrics
from rmsgd.optim.groups import layer_groups
from rmsgd.optim.layer_rates import LayerRates
from rmsgd.optim.optimizer import RMSGD

__all__ = [
    "RMSGD",
    "LayerMetrics",
    "LayerRates",
    "LowRank",
    "Report",
    "Spectrum",
    "__version__",
    "evbmf",
    "layer_groups",
    "probe",
    "spectra",
]
