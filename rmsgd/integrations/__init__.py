"""RMSGD and LayerRates inside other training loops: callbacks that end epochs, and their numbers for a log.

``rmsgd.integrations.lightning.EpochStep`` and ``rmsgd.integrations.transformers.EpochStep`` are callbacks
of Lightning and of the Hugging Face Trainer. They find the RMSGD or the LayerRates of the trainer's
optimizer. ``rmsgd.integrations.timm.register`` makes "rmsgd" an optimizer of timm. Each module needs its
framework; ``import rmsgd`` needs none of them.
"""

from collections.abc import Iterator
from typing import Any

from rmsgd.metrics import AT_EPOCH_ENDS, NETWORK_QUALITY
from rmsgd.optim.applied_lr import owner_of
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
    for inner in _chain(optimizer):
        if isinstance(inner, RMSGD):
            return inner
    raise TypeError(f"an rmsgd.RMSGD optimizer is needed, got {_types(optimizer)}")


def rates_of(optimizer: Any) -> RMSGD | LayerRates:
    """Return what moves the rates of an optimizer, which may be wrapped as ``unwrap`` says.

    That is the RMSGD in it, or the ``LayerRates`` that was made of it or of one of its wrappers. A
    ``LayerRates`` itself is returned as it is.

    Raises:
        TypeError: there is neither; the message names the types that were found.
    """
    for inner in _chain(optimizer):
        rates = inner if isinstance(inner, RMSGD | LayerRates) else owner_of(inner)
        if rates is not None:
            return rates  # type: ignore[no-any-return]
    raise TypeError(
        f"an rmsgd.RMSGD optimizer or one with rmsgd.LayerRates is needed, got {_types(optimizer)}"
    )


def end_epoch(rates: RMSGD | LayerRates) -> None:
    """Measure every layer and move its rate."""
    if isinstance(rates, LayerRates):
        rates.step()
    else:
        rates.epoch_step()


def _chain(optimizer: Any) -> Iterator[Any]:
    """An optimizer, what it wraps, what that wraps, and so on."""
    while optimizer is not None:
        yield optimizer
        if isinstance(optimizer, LayerRates):
            return
        optimizer = next(filter(None, (getattr(optimizer, name, None) for name in _WRAPPED_AS)), None)


def _types(optimizer: Any) -> str:
    return " around ".join(type(inner).__qualname__ for inner in _chain(optimizer)) or "NoneType"


def log_dict(optimizer: Any) -> dict[str, float]:
    """Return learning rates and metrics of every layer as one flat dict, which any tracker takes.

    ``optimizer`` is one in which ``rates_of`` finds an RMSGD or a ``LayerRates``, or is a ``LayerRates``. If
    that reports tail exponents, the dict has ``alpha/NAME`` instead of the metrics.

    It has the key ``learning_rate/NAME`` for every parameter. From the first epoch end on it also has
    ``stable_rank/NAME``, ``condition_number/NAME`` and ``quality/NAME`` for every measured layer (one for
    each of ``rmsgd.metrics.AT_EPOCH_ENDS``), and ``quality``, Q of the network, if a layer was measured. On a
    GPU this waits for the last measurement, so call it after an epoch end, not at every step.

    Returns:
        Names to floats: rates as they are applied, metrics in the ranges that ``rmsgd.metrics`` declares.

    Raises:
        TypeError: there is neither.
    """
    inner = rates_of(optimizer)
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
