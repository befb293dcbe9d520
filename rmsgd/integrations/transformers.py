"""RMSGD and LayerRates under the Hugging Face Trainer: a callback that ends epochs."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from rmsgd.integrations import check_interval, end_epoch, log_dict, rates_of
from rmsgd.optim.layer_rates import LayerRates
from rmsgd.optim.optimizer import RMSGD

_STATE = "layer_rates"
"""The attribute in a checkpoint that holds the state of a LayerRates."""


class EpochStep(TrainerCallback, ExportableState):
    """Ends epochs for the trainer's RMSGD optimizer, or for its optimizer with ``LayerRates``.

    It calls ``epoch_step``, or ``step`` of the LayerRates, which it finds by the optimizer: nothing has to be
    passed. The call comes right after the last optimizer step of the epoch, so that every checkpoint holds
    it. A run that is resumed from a checkpoint takes no epoch end twice and misses none. The state of a
    LayerRates is in ``trainer_state.json``. Data without a length end an epoch when they are used up. Every
    rank makes the call: in a job of several processes give the optimizer or the LayerRates a
    ``process_group`` to share the work.

    The Trainer makes the callback anew, without its ``log``, when a run is resumed with
    ``restore_callback_states_from_checkpoint=True``. Nothing here needs that.

    Args:
        every_n_steps: call after this number of optimizer steps (``state.global_step``) instead of at epoch
            ends.
        log: called with ``rmsgd.integrations.log_dict`` after each call, for example ``trainer.log``.

    Raises:
        ValueError: ``every_n_steps`` is not a positive whole number or None; or, when training starts, the
            state in a checkpoint does not fit the LayerRates.
        TypeError: when training starts, if the trainer's optimizer is not an RMSGD and has no LayerRates.
    """

    def __init__(
        self, every_n_steps: int | None = None, log: Callable[[dict[str, float]], object] | None = None
    ) -> None:
        check_interval(every_n_steps)
        self.every_n_steps = every_n_steps
        self.log = log
        self._ended = 0
        self._rates: RMSGD | LayerRates | None = None

    def state(self) -> dict[str, Any]:
        """What the Trainer saves: plain numbers and strings."""
        found = self._rates.state_dict() if isinstance(self._rates, LayerRates) else None
        return {"args": {"every_n_steps": self.every_n_steps}, "attributes": {_STATE: found}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the optimizer, and go on from where a checkpoint left off."""
        self._rates = rates_of(kwargs["optimizer"])
        self._ended = state.global_step
        # A checkpoint of a run without this callback has no entry, and the Trainer needs one to save.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        latest = saved[-1] if isinstance(saved, list) else saved
        found = latest.get("attributes", {}).get(_STATE)
        if state.global_step and found is not None and isinstance(self._rates, LayerRates):
            self._rates.load_state_dict(found)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End an epoch if this optimizer step ends one, or ``every_n_steps`` steps."""
        n = self.every_n_steps
        if state.epoch == int(state.epoch) if n is None else state.global_step % n == 0:
            self._end(state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End an epoch where the data had no length that would have told its last step."""
        used_up = self._ended != state.global_step and not control.should_training_stop
        if self.every_n_steps is None and used_up:
            self._end(state)

    def _end(self, state: Any) -> None:
        self._ended = state.global_step
        assert self._rates is not None, "on_train_begin comes first"
        end_epoch(self._rates)
        if self.log is not None:
            self.log(log_dict(self._rates))
