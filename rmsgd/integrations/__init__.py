"""RMSGD inside other training loops: callbacks that call ``epoch_step``, and its numbers for a log.

``rmsgd.integrations.lightning.EpochStep`` and ``rmsgd.integrations.transformers.EpochStep`` are callbacks
of Lightning and of the Hugging Face Trainer; ``rmsgd.integrations.timm.register`` makes "rmsgd" an
optimizer of timm. Each module needs its framework; ``import rmsgd`` needs none of them.
"""

from typing import Any

from rmsgd.metrics import AT_EPOCH_ENDS, NETWORK_QUALITY
from rmsgd.optim.layer_rates import LayerRates
from rmsgd.optim.optimizer import RMSGD
from rmsgd.tails import TailReport

_WRAPPED_AS = ("optimizer", "optim")
"""The wrapped optimizer's attribute: in Accelerate, Lightning and DeepSpeed; in ZeroRedundancyOptimizer."""


def unwrap(optimizer: Any) -> RMSGD:
    """Return the RMSGD inside an optimizer that Accelerate, Lightning, DeepSpeed or ZeRO may have wrapped.

    Raises:
        TypeError: there is none; the message names the types that were found.
    """
    types = []
    while not isinstance(optimizer, RMSGD):
        types.append(type(optimizer).__qualname__)
        if optimizer is None:
            raise TypeError(f"an rmsgd.RMSGD optimizer is needed, got {' around '.join(types[:-1] or types)}")
        optimizer = next(filter(None, (getattr(optimizer, name, None) for name in _WRAPPED_AS)), None)
    return optimizer


def log_dict(optimizer: Any) -> dict[str, float]:
    """Return learning rates and metrics of every layer as one flat dict, which any tracker takes.

    ``optimizer`` holds an RMSGD or is a ``LayerRates``. If the latter reports tail exponents, the dict has
    ``alpha/NAME`` instead of the metrics.

    It has the key ``learning_rate/NAME`` for every parameter. From the first ``epoch_step`` on it also has
    ``stable_rank/NAME``, ``condition_number/NAME`` and ``quality/NAME`` for every measured layer (one for
    each of ``rmsgd.metrics.AT_EPOCH_ENDS``), and ``quality``, Q of the network, if a layer was measured. On a
    GPU this waits for the last ``epoch_step``, so call it after an epoch end, not at every step.

    Returns:
        Names to floats: rates as they are applied, metrics in the ranges that ``rmsgd.metrics`` declares.

    Raises:
        TypeError: there is no RMSGD in ``optimizer``, and it is not a LayerRates.
    """
    inner = optimizer if isinstance(optimizer, LayerRates) else unwrap(optimizer)
    values = {f"learning_rate/{name}": rate for name, rate in inner.learning_rates().items()}
    if inner._rates.measured:
        report = inner.report()
        if isinstance(report, TailReport):
            return values | {f"alpha/{layer.name}": layer.alpha for layer in report.measured}
        for metric in AT_EPOCH_ENDS:
            values |= {f"{metric.name}/{x.name}": getattr(x, metric.name) for x in report.measured}
        if report.measured:
            values[NETWORK_QUALITY.name] = report.quality
    return values


def check_interval(every_n_steps: int | None) -> None:
    """Raise ValueError for a number of steps that is neither a positive whole number nor None."""
    if every_n_steps is not None and not (isinstance(every_n_steps, int) and every_n_steps > 0):
        raise ValueError(f"every_n_steps must be a positive whole number or None, got {every_n_steps!r}")
