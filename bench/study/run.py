"""One run, resumable at any moment to the result it would have had anyway."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rmsgd
from bench import atomic, measure, models, peers
from bench.data.source import Source, mix
from bench.errors import UsageError
from bench.locks import locked
from bench.study import randomness, schedules
from bench.study.config import RunConfig
from bench.study.network_metrics import LABELS, network_metrics
from bench.study.run_folder import status
from bench.training import cross_entropy
from rmsgd.metrics import AT_EPOCH_ENDS

FORMAT = 1
PHASES = ("training", "epoch_end", "evaluation", "checkpoint")
METRICS = (*(metric.name for metric in AT_EPOCH_ENDS), "rate")
KEPT = 6
"""The number of epochs whose weights a run keeps, if it keeps any, besides the initial ones."""

Told = Callable[[str, float], object]
"""Called with the run's current work and the share of it that is done, in [0, 1]."""


class Run:
    """Training of one network by one optimizer, kept in one folder.

    The folder holds `config.json`, `environment.json`, `epochs.csv`, `checkpoint.pt` and, when the run
    has ended, `layers.csv` and `result.json`. Everything random depends on the seed, the epoch and the
    position in it, or is part of the checkpoint: a run that was killed goes on as if it had not been.
    On a GPU that takes `torch.use_deterministic_algorithms` too.

    Args:
        config: the configuration of the run.
        source: the data; `config.augment`, `cutout` and `holdout` are applied to it.
        folder: the folder of this run, which is made if it is missing.
        device: the device that computes.
        budget: seconds of training and epoch ends that may be spent; None: only epochs count.
        checkpoint_seconds: time between checkpoints within an epoch; there is one at each epoch end.

    Raises:
        UsageError: the data does not suit the network, or a setting that the optimizer refuses.

    """

    def __init__(
        self,
        config: RunConfig,
        source: Source,
        folder: Path,
        device: torch.device,
        *,
        budget: float | None = None,
        checkpoint_seconds: float = 300.0,
    ) -> None:
        self.config, self.folder = config, folder
        self._device, self._budget, self._interval = device, budget, checkpoint_seconds
        if config.images is not None or config.judged is not None:
            source = source.limited(config.images, config.judged, config.holdout)
        elif config.holdout:
            source = source.with_holdout()
        self._source = source.varied(config.augment, config.cutout)
        self._steps = source.batches(config.batch)
        self._epoch, self._step = 0, 0
        self._loss = torch.zeros((), device=device)
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._epochs: list[dict[str, Any]] = []
        self._layers: list[Tensor] = []
        self._layer_names: list[str] = []
        self._diverged = False
        self._build()

    def _build(self) -> None:
        config = self.config
        torch.manual_seed(mix(config.seed))
        known = models.architecture(config.network)
        if not known.accepts(self._source.sample):
            raise UsageError(
                f"{config.network} reads {known.sample}, {config.dataset} has {self._source.sample}"
            )
        network = models.build(config.network, self._source.classes, self._source.sample[0], config.width)
        self._network = network.to(self._device)
        if config.channels_last:
            self._network = self._network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._peer = peers.peer(config.optimizer)
        self._optimizer = make_optimizer(config, network, self._steps)
        self._schedule, self._every_step = schedules.make(config, self._optimizer, self._steps)
        self._measures = hasattr(self._optimizer, "epoch_step")

    # -- training ------------------------------------------------------------------------------------

    def train(self, tell: Told = lambda text, share: None) -> str:
        """Trains to the end, from the checkpoint where there is one.

        Returns:
            "complete", or "diverged" when the loss stopped being a number.

        Raises:
            BusyError: another process is training this run.
            OSError: a checkpoint could not be written. The one before is intact.

        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder):
            atomic.sweep(self.folder)
            finished = self.folder / "result.json"
            if finished.exists():
                return status(self.folder)
            if (self.folder / "checkpoint.pt").exists():
                self._restore()
            else:
                measure.write_json(self.folder / "config.json", self.config.to_dict())
                measure.write_json(self.folder / "environment.json", measure.machine())
                if self.config.keep_weights:
                    self._keep()
            while not self._finished():
                self._train_epoch(tell)
            self._conclude()
        return status(self.folder)

    def seconds_of_steps(self, count: int, warm: int) -> float:
        """Seconds of a step, the median of `count` after `warm`: the run is of no use afterwards."""
        self._network.train()
        taken = []
        for index in range(warm + count):
            inputs, targets = next(self._source.epoch(self.config.batch, 0, index, 0))
            measure.synchronise(self._device)
            begun = time.perf_counter()
            self._take_step(inputs, targets)
            measure.synchronise(self._device)
            taken.append(time.perf_counter() - begun)
        return float(np.median(taken[warm:]))

    @property
    def steps(self) -> int:
        """The number of steps in an epoch."""
        return self._steps

    def epoch_seconds(self) -> list[float]:
        """Training and epoch end of every epoch so far: the time that is the optimizer's."""
        return [epoch["seconds_training"] + epoch["seconds_epoch_end"] for epoch in self._epochs]

    def _finished(self) -> bool:
        done = len(self._epochs)
        if self._diverged or done >= self.config.epochs:
            return True
        if self._budget is None or done == 0:
            return False
        # An epoch that would end after the budget is not begun.
        taken = self.epoch_seconds()
        return sum(taken) + float(np.median(taken)) > self._budget

    def _train_epoch(self, tell: Told) -> None:
        clock = measure.HostClock(self._device, PHASES)
        before = dict(self._seconds)

        def book(phase: str) -> None:
            clock.stop(phase)
            self._seconds[phase] = before[phase] + clock.seconds[phase]

        if self._step == 0:
            randomness.begin(mix(self.config.seed, self._epoch))
        self._network.train()
        saved = time.monotonic()
        rates = self._rates()
        batches = self._source.epoch(self.config.batch, self.config.seed, self._epoch, self._step)
        for inputs, targets in batches:
            self._loss += self._take_step(inputs, targets)
            self._step += 1
            if self._step == self._steps:
                rates = self._rates()
            if self._every_step and self._schedule is not None:
                self._schedule.step()
            if self._is_measurement():
                book("training")
                self._optimizer.epoch_step()  # type: ignore[attr-defined]
                book("epoch_end")
            if self._step < self._steps and time.monotonic() - saved >= self._interval:
                book("training")
                if not math.isfinite(self._loss.item()):
                    break
                self._save()
                book("checkpoint")
                saved = time.monotonic()
            tell(self.config.label, (self._epoch + self._step / self._steps) / self.config.epochs)
        train_loss = self._loss.item() / max(self._step, 1)
        book("training")
        if math.isfinite(train_loss):
            if self._measures and self.config.measurements is None:
                self._optimizer.epoch_step()  # type: ignore[attr-defined]
            if not self._every_step and self._schedule is not None:
                self._schedule.step()
            book("epoch_end")
        measured = self._measure() if math.isfinite(train_loss) else {}
        self._diverged = not math.isfinite(measured.get("test_loss", math.nan))
        book("evaluation")
        self._epochs.append(
            {
                "epoch": self._epoch + 1,
                "train_loss": train_loss,
                **{key: measured.get(key, math.nan) for key in MEASURED},
                "learning_rate": float(np.mean(list(rates.values()))),
                **{f"seconds_{phase}": seconds for phase, seconds in self._seconds.items()},
            }
        )
        self._add_layers(rates)
        self._epoch, self._step = self._epoch + 1, 0
        self._loss.zero_()
        self._seconds = dict.fromkeys(PHASES, 0.0)
        if self.config.keep_weights and self._epoch in kept_epochs(self.config.epochs):
            self._keep()
        self._save()
        measure.write_csv(self.folder / "epochs.csv", self._epochs)

    def _is_measurement(self) -> bool:
        """Whether one of the run's measurements, at equal distances, follows the step just taken."""
        count = self.config.measurements
        if count is None or not self._measures:
            return False
        done, total = self._epoch * self._steps + self._step, self.config.epochs * self._steps
        return done * count // total > (done - 1) * count // total

    def _take_step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self._peer.take_step(self._optimizer, lambda: self._criterion(self._logits(inputs), targets))

    def _logits(self, inputs: Tensor) -> Tensor:
        if self.config.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            logits: Tensor = self._network(inputs)
        return logits.float()

    def _criterion(self, logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        if not self._source.several:
            return cross_entropy(logits, targets, reduction)
        loss = F.binary_cross_entropy_with_logits(logits, targets, reduction=reduction)
        return loss / logits.shape[1] if reduction == "sum" else loss

    def _rates(self) -> dict[str, float]:
        """Parameter name to the rate applied at the end of the epoch."""
        if hasattr(self._optimizer, "learning_rates"):
            return {name: float(rate) for name, rate in self._optimizer.learning_rates().items()}
        rate = float(self._optimizer.param_groups[0]["lr"])
        return dict.fromkeys((name for name, _ in self._network.named_parameters()), rate)

    # -- measuring -----------------------------------------------------------------------------------

    @torch.no_grad()
    def _measure(self) -> dict[str, float]:
        self._network.eval()
        test_loss, test_accuracy, test_top5 = self._evaluate(self._source.test())
        _, train_accuracy, _ = self._evaluate(self._source.train_sample())
        # The same metrics for every optimizer; the rules of RMSGD that the authors released report others.
        self._report = rmsgd.probe(self._network)
        return {
            "train_accuracy": train_accuracy,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "test_top5": test_top5,
            **network_metrics(self._report),
        }

    def _evaluate(self, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[float, float, float]:
        """Mean loss, accuracy and top-5 accuracy; with several labels, the accuracy is class-wise."""
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        correct, among_five = torch.zeros_like(loss), torch.zeros_like(loss)
        count = 0
        for inputs, targets in batches:
            logits = self._logits(inputs)
            loss += self._criterion(logits, targets, "sum")
            if self._source.several:
                correct += ((logits > 0) == (targets > 0.5)).double().mean(1).sum()
            else:
                best = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
                correct += best[:, 0].sum()
                among_five += best.any(1).sum()
            count += len(targets)
        top5 = math.nan if self._source.several else among_five.item() / count
        return loss.item() / count, correct.item() / count, top5

    def _add_layers(self, rates: dict[str, float]) -> None:
        if self._diverged:
            return
        layers = self._report.measured
        self._layer_names = [layer.name for layer in layers]
        rows = [
            [*(getattr(layer, metric.name) for metric in AT_EPOCH_ENDS), rates[layer.name]]
            for layer in layers
        ]
        self._layers.append(torch.tensor(rows, dtype=torch.float64))

    # -- keeping -------------------------------------------------------------------------------------

    def _save(self) -> None:
        content = {
            "format": FORMAT,
            "config": self.config.to_dict(),
            "model": self._network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in peers.parts(self._optimizer)],
            "schedule": None if self._schedule is None else self._schedule.state_dict(),
            "epoch": self._epoch,
            "step": self._step,
            "loss": self._loss,
            "seconds": self._seconds,
            "random": randomness.states(self._device),
            "epochs": self._epochs,
            "layers": self._layers,
            "layer_names": self._layer_names,
            "diverged": self._diverged,
        }
        atomic.save(self.folder / "checkpoint.pt", content)

    def _restore(self) -> None:
        path = self.folder / "checkpoint.pt"
        saved = torch.load(path, map_location=self._device, weights_only=True)
        if saved.get("format") != FORMAT or RunConfig.from_dict(saved["config"]) != self.config:
            raise UsageError(f"{path} is of another run or version: remove {self.folder} to begin anew")
        self._network.load_state_dict(saved["model"])
        for optimizer, state in zip(peers.parts(self._optimizer), saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
            optimizer.param_groups = self._optimizer.param_groups  # one inside shares them
        if self._schedule is not None:
            self._schedule.load_state_dict(saved["schedule"])
        self._epoch, self._step = saved["epoch"], saved["step"]
        self._loss, self._seconds = saved["loss"], saved["seconds"]
        self._epochs, self._layer_names = saved["epochs"], saved["layer_names"]
        self._layers = [layer.cpu() for layer in saved["layers"]]
        self._diverged = saved["diverged"]
        randomness.restore(saved["random"])

    def _keep(self) -> None:
        folder = self.folder / "weights"
        folder.mkdir(exist_ok=True)
        atomic.save(folder / f"epoch_{self._epoch:03d}.pt", self._network.state_dict())

    def _conclude(self) -> None:
        rows = [
            {"epoch": epoch, "layer": name, **dict(zip(METRICS, values, strict=True))}
            for epoch, layers in enumerate(self._layers, 1)
            for name, values in zip(self._layer_names, layers.tolist(), strict=True)
        ]
        measure.write_csv(self.folder / "epochs.csv", self._epochs)
        if rows:
            measure.write_csv(self.folder / "layers.csv", rows)
        measure.write_json(
            self.folder / "result.json",
            {
                "status": "diverged" if self._diverged else "complete",
                "epochs": len(self._epochs),
                "budget_seconds": self._budget,
                "final": self._epochs[-1],
            },
        )


def make_optimizer(config: RunConfig, network: nn.Module, batches: int) -> torch.optim.Optimizer:
    """The run's optimizer; UsageError for a setting that it does not have or refuses."""
    return peers.make(config.optimizer, network.named_parameters(), steps=batches, **dict(config.settings))


MEASURED = (
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "test_top5",
    *LABELS,
)
"""What an epoch's record holds of the network at its end."""


def kept_epochs(epochs: int) -> set[int]:
    """The epochs whose weights are kept: early ones closer together, the last among them."""
    return {round(epoch) for epoch in np.geomspace(1, epochs, min(KEPT, epochs))}
