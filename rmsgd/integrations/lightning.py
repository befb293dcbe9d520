"""RMSGD under Lightning: a callback that calls ``epoch_step``."""

from typing import Any

from rmsgd.integrations import check_interval, log_dict, unwrap
from rmsgd.optim.optimizer import RMSGD

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback


class EpochStep(Callback):
    """Calls ``epoch_step`` of every RMSGD optimizer of the trainer at the end of each epoch.

    The call comes after the last optimizer step of the epoch and before its validation, so that every
    checkpoint holds it. A run that is resumed from a checkpoint takes no epoch end twice and misses none.
    Every rank makes the call: in a job of several processes give the optimizer a ``process_group`` to share
    the work.

    Args:
        every_n_steps: call after this number of optimizer steps instead of at epoch ends, as the trainer
            counts them (``trainer.global_step``), however many batches each accumulates.
        log: whether to give ``rmsgd.integrations.log_dict`` to the trainer's loggers after each call.

    Raises:
        ValueError: ``every_n_steps`` is not a positive whole number or None.
        TypeError: when training starts, if no optimizer of the trainer is an RMSGD.
    """

    def __init__(self, every_n_steps: int | None = None, log: bool = True) -> None:
        check_interval(every_n_steps)
        self.every_n_steps = every_n_steps
        self.log = log
        self._seen = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Look for the optimizers, and count the steps on from where a checkpoint left off."""
        self._seen = trainer.global_step
        if not _optimizers(trainer):
            for optimizer in trainer.optimizers or [None]:
                unwrap(optimizer)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Call ``epoch_step`` if this batch ends an epoch, or ``every_n_steps`` steps."""
        n, before, self._seen = self.every_n_steps, self._seen, trainer.global_step
        if trainer.is_last_batch if n is None else self._seen // n > before // n:
            for optimizer in _optimizers(trainer):
                optimizer.epoch_step()
                if self.log and trainer.loggers:
                    values = log_dict(optimizer)
                    for logger in trainer.loggers:
                        logger.log_metrics(values, step=trainer.global_step)


def _optimizers(trainer: Any) -> list[RMSGD]:
    found = []
    for optimizer in trainer.optimizers:
        try:
            found.append(unwrap(optimizer))
        except TypeError:
            continue  # a GAN's other network, say, may have an optimizer of another kind
    return found
