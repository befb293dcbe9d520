"""RMSGD under the Hugging Face Trainer: a callback that calls ``epoch_step``."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from rmsgd.integrations import check_interval, log_dict, unwrap


class EpochStep(TrainerCallback):
    """Calls ``epoch_step`` of the trainer's RMSGD optimizer at the end of each epoch.

    The call comes right after the last optimizer step of the epoch, so that every checkpoint holds it. A run
    that is resumed from a checkpoint takes no epoch end twice and misses none. Data without a length end an
    epoch when they are used up. Every rank makes the call: in a job of several processes give the optimizer a
    ``process_group`` to share the work.

    Args:
        every_n_steps: call after this number of optimizer steps (``state.global_step``) instead of at epoch
            ends.
        log: called with ``rmsgd.integrations.log_dict`` after each call, for example ``trainer.log``.

    Raises:
        ValueError: ``every_n_steps`` is not a positive whole number or None.
        TypeError: when training starts, if the trainer's optimizer is not an RMSGD.
    """

    def __init__(
        self, every_n_steps: int | None = None, log: Callable[[dict[str, float]], object] | None = None
    ) -> None:
        check_interval(every_n_steps)
        self.every_n_steps = every_n_steps
        self.log = log
        self._ended = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the optimizer, and count the steps on from where a checkpoint left off."""
        unwrap(kwargs["optimizer"])
        self._ended = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call ``epoch_step`` if this optimizer step ends an epoch, or ``every_n_steps`` steps."""
        n = self.every_n_steps
        if state.epoch == int(state.epoch) if n is None else state.global_step % n == 0:
            self._end(state, kwargs["optimizer"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call ``epoch_step`` where the data had no length that would have told the epoch's last step."""
        used_up = self._ended != state.global_step and not control.should_training_stop
        if self.every_n_steps is None and used_up:
            self._end(state, kwargs["optimizer"])

    def _end(self, state: Any, optimizer: Any) -> None:
        self._ended = state.global_step
        unwrap(optimizer).epoch_step()
        if self.log is not None:
            self.log(log_dict(optimizer))
