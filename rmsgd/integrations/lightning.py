"""RMSGD and LayerRates under Lightning: a callback that ends epochs."""

from typing import Any

from rmsgd.integrations import check_interval, end_epoch, log_dict, rates_of
from rmsgd.optim.layer_rates import LayerRates
from rmsgd.optim.optimizer import RMSGD

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback


class EpochStep(Callback):
    """Ends epochs for every RMSGD optimizer of the trainer, and for every optimizer with ``LayerRates``.

    It calls ``epoch_step``, or ``step`` of the LayerRates, which it finds by the optimizer: nothing has to be
    passed. The call comes after the last optimizer step of the epoch and before its validation, so that every
    checkpoint holds it. A run that is resumed from a checkpoint takes no epoch end twice and misses none. The
    checkpoint holds the state of a LayerRates as this callback's state.
    Every rank makes the call: in a job of several processes give the optimizer or the LayerRates a
    ``process_group`` to share the work.

    Args:
        every_n_steps: call after this number of optimizer steps instead of at epoch ends, as the trainer
            counts them (``trainer.global_step``), however many batches each accumulates.
        log: whether to give ``rmsgd.integrations.log_dict`` to the trainer's loggers after each call.

    Raises:
        ValueError: ``every_n_steps`` is not a positive whole number or None; or, when training starts, the
            state in a checkpoint does not fit the LayerRates.
        TypeError: when training starts, if no optimizer of the trainer is an RMSGD or has a LayerRates.
    """

    def __init__(self, every_n_steps: int | None = None, log: bool = True) -> None:
        check_interval(every_n_steps)
        self.every_n_steps = every_n_steps
        self.log = log
        self._seen = 0
        self._rates: dict[int, RMSGD | LayerRates] = {}
        self._restored: dict[int, Any] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget a checkpoint that something else than a fit has read."""
        self._restored = {}

    def state_dict(self) -> dict[str, Any]:
        """The states of all LayerRates, by the places of their optimizers. RMSGD is in its own state."""
        rates = {i: found for i, found in self._rates.items() if isinstance(found, LayerRates)}
        return {"rates": {i: found.state_dict() for i, found in rates.items()}} if rates else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until training starts: there are no optimizers before."""
        self._restored = state_dict["rates"]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Look for the optimizers, and go on from where a checkpoint left off."""
        self._seen = trainer.global_step
        self._rates = _found(trainer.optimizers)
        if not self._rates:
            for optimizer in trainer.optimizers or [None]:
                rates_of(optimizer)
        restored, self._restored = self._restored, {}
        for i, rates in self._rates.items():
            if isinstance(rates, LayerRates) and i in restored:
                rates.load_state_dict(restored[i])

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End an epoch if this batch ends one, or ``every_n_steps`` steps."""
        n, before, self._seen = self.every_n_steps, self._seen, trainer.global_step
        if trainer.is_last_batch if n is None else self._seen // n > before // n:
            for rates in self._rates.values():
                end_epoch(rates)
                if self.log and trainer.loggers:
                    values = log_dict(rates)
                    for logger in trainer.loggers:
                        logger.log_metrics(values, step=trainer.global_step)


def _found(optimizers: list[Any]) -> dict[int, RMSGD | LayerRates]:
    """What moves the rates of the optimizers, by their places."""
    found = {}
    for i, optimizer in enumerate(optimizers):
        try:
            found[i] = rates_of(optimizer)
        except TypeError:
            continue  # a GAN's other network, say, may have an optimizer of another kind
    return found
