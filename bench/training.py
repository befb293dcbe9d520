"""Training several optimizers side by side: the engine behind `python -m bench train`.

Every optimizer starts from the same weights and sees the same batches. Their epochs are interleaved
(A's first, B's first, A's second, ...) in an order drawn anew each epoch, so that a busy machine
slows all of them alike and does not change the ratio of their epoch times.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import arguments, data, measure, models, peers
from bench.errors import UsageError

SCHEMA = "rmsgd-bench-train/1"
PHASES = ("training", "epoch_end", "evaluation")


@dataclass(frozen=True)
class Settings:
    """What is trained, on what, and how.

    Attributes:
        model: key of `bench.models.ARCHITECTURES`.
        data: one of `bench.data.registry.TRAINED`, or a folder or archive that the registry recognises.
        optimizers: keys of `bench.peers.PEERS`.
        seeds: there is one run per seed and optimizer; a seed fixes initial weights and batches.
        epochs: passes over the training set.
        batch: mini-batch size.
        width: factor on the network's channel counts.
        samples: size of a synthetic training set (None: 2048), or the most images read from a folder (None:
            all).
        device: torch device.
        overrides: from an optimizer's name to settings that replace its authors'.

    """

    model: str = "resnet14-digits"
    data: str = "digits"
    optimizers: tuple[str, ...] = ("rmsgd", "sgd", "sam")
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 12
    batch: int = 64
    width: float = 1.0
    samples: int | None = None
    device: str = "cpu"
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def check(self) -> None:
        """Raises UsageError, which names the field, for a wrong value before anything is built."""
        models.architecture(self.model)
        arguments.check_unique("optimizer", self.optimizers)
        arguments.check_unique("seed", self.seeds)
        for name in (*self.optimizers, *self.overrides):
            peers.peer(name)
        arguments.check_taking_part(self.overrides, self.optimizers)
        if not all(0 <= seed < 2**63 for seed in self.seeds):
            raise UsageError(f"seeds must lie between 0 and 2^63, got {', '.join(map(str, self.seeds))}")
        arguments.check_device(self.device)


@dataclass
class Epoch:
    """One epoch of one run.

    Attributes:
        epoch: counted from 1.
        train_loss: mean over the batches.
        test_loss: mean over the test set, at the end of the epoch.
        test_accuracy: fraction of the test set, at the end of the epoch.
        seconds: from a phase (training, epoch_end, evaluation) to its seconds.
        learning_rates: from a parameter's name to the rate applied during this epoch.
        stable_rank: from a measured parameter's name to its stable rank at the end of the epoch (RMSGD only).
        quality: Q of the network at the end of the epoch (RMSGD only).

    """

    epoch: int
    train_loss: float
    test_loss: float
    test_accuracy: float
    seconds: dict[str, float]
    learning_rates: dict[str, float]
    stable_rank: dict[str, float] | None
    quality: float | None


class Run:
    """One optimizer and one seed.

    Attributes:
        optimizer_name: key of `bench.peers.PEERS`.
        seed: the seed of the initial weights and of the batches.
        epochs: the results of the epochs so far.
        diverged: whether the loss has stopped being a number; no further epoch is run then.

    """

    def __init__(self, settings: Settings, dataset: data.Dataset, optimizer_name: str, seed: int) -> None:
        self.optimizer_name, self.seed = optimizer_name, seed
        self.epochs: list[Epoch] = []
        self.diverged = False
        self._dataset = dataset
        self._peer = peers.peer(optimizer_name)
        self._device = torch.device(settings.device)
        torch.manual_seed(seed)
        channels = dataset.sample[0] if len(dataset.sample) == 3 else None
        network = models.build(settings.model, dataset.classes, channels, settings.width)
        self._network = network.to(self._device)
        self._batches = data.Batches(dataset.train, settings.batch, seed)
        self._optimizer = peers.make(
            optimizer_name,
            self._network.named_parameters(),
            steps=len(self._batches),
            **settings.overrides.get(optimizer_name, {}),
        )
        self._schedule = peers.schedule(optimizer_name, self._optimizer, settings.epochs)

    def train_epoch(self) -> Epoch:
        """Trains for one epoch, evaluates, and appends the results to `epochs`."""
        number = len(self.epochs) + 1
        # Dropout draws from the global generator, which all runs share. Without this, other runs in the
        # interleaving would change the result of this one.
        torch.manual_seed((1_000_003 * self.seed + number) % 2**63)
        rates = self._learning_rates()
        clock = measure.HostClock(self._device, PHASES)
        train_loss = self._train()
        clock.stop("training")
        probed = None
        test_loss = test_accuracy = math.nan
        if math.isfinite(train_loss):
            self._end_epoch()
            clock.stop("epoch_end")
            test_loss, test_accuracy = self._evaluate()
            clock.stop("evaluation")
            probed = self._optimizer.report() if hasattr(self._optimizer, "report") else None
        self.diverged = not math.isfinite(test_loss)
        epoch = Epoch(
            number,
            train_loss,
            test_loss,
            test_accuracy,
            clock.seconds,
            rates,
            {layer.name: layer.stable_rank for layer in probed.layers} if probed else None,
            probed.quality if probed else None,
        )
        self.epochs.append(epoch)
        return epoch

    def _train(self) -> float:
        self._network.train()
        total = torch.zeros((), device=self._device)
        for inputs, targets in self._batches:

            def loss(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
                return cross_entropy(self._network(inputs), targets)

            # The loss is read once per epoch, since a copy to the host at every step would stall a GPU.
            total += self._peer.take_step(self._optimizer, loss)
        return total.item() / len(self._batches)

    def _end_epoch(self) -> None:
        if hasattr(self._optimizer, "epoch_step"):
            self._optimizer.epoch_step()
        if self._schedule is not None:
            self._schedule.step()

    @torch.no_grad()
    def _evaluate(self, chunk: int = 512) -> tuple[float, float]:
        self._network.eval()
        test = self._dataset.test
        loss = torch.zeros((), device=self._device)
        correct = torch.zeros((), dtype=torch.int64, device=self._device)
        for inputs, targets in zip(test.inputs.split(chunk), test.targets.split(chunk), strict=True):
            logits = self._network(inputs)
            loss += cross_entropy(logits, targets, reduction="sum")
            correct += (logits.argmax(-1) == targets).sum()
        return loss.item() / test.targets.numel(), correct.item() / test.targets.numel()

    def _learning_rates(self) -> dict[str, float]:
        if hasattr(self._optimizer, "learning_rates"):
            return {name: float(rate) for name, rate in self._optimizer.learning_rates().items()}
        groups = self._optimizer.param_groups
        return {f"group {index}": float(group["lr"]) for index, group in enumerate(groups)}


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy of logits (..., classes) with targets (...), for images and tokens alike."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction)


def dataset(settings: Settings, cache: Path | None = None) -> data.Dataset:
    """The data that the runs are trained on; `cache` is that of `bench.data.load`.

    Raises:
        UsageError: a setting makes no sense, or the data is missing or not what it should be.

    """
    settings.check()
    return data.load(settings.data, settings.model, settings.device, settings.samples, cache)


def prepare(settings: Settings, read: data.Dataset | None = None) -> list[list[Run]]:
    """Builds every run without training it: a list per seed, in the order of the optimizers.

    Args:
        settings: what is to be trained.
        read: the data, if `dataset` has read it already.

    Raises:
        UsageError: a setting makes no sense, or model, data or optimizer refuse it.

    """
    settings.check()
    known = read or dataset(settings)
    return [[Run(settings, known, name, seed) for name in settings.optimizers] for seed in settings.seeds]


def train(
    settings: Settings,
    on_epoch: Callable[[Run], object] = lambda run: None,
    read: data.Dataset | None = None,
) -> list[Run]:
    """Trains every optimizer with every seed, epochs interleaved within a seed.

    Args:
        settings: what to train.
        on_epoch: called after every epoch with the run that it belongs to.
        read: the data, if `dataset` has read it already.

    Returns:
        The runs, by seed and then in the order of `settings.optimizers`. A run whose loss stops being a
        number ends there and is marked as diverged; the others go on.

    Raises:
        UsageError: a setting makes no sense, or model, data or optimizer refuse it.

    """
    seeds = prepare(settings, read)
    order = np.random.default_rng(0)
    for runs in seeds:
        for _ in range(settings.epochs):
            for index in order.permutation(len(runs)):
                if not runs[index].diverged:
                    runs[index].train_epoch()
                    on_epoch(runs[index])
    return [run for runs in seeds for run in runs]


def result(settings: Settings, runs: Sequence[Run]) -> dict[str, Any]:
    """Everything about the runs as plain values, ready for `measure.write_json`."""
    used = {name: peers.peer(name) for name in settings.optimizers}
    return {
        "schema": SCHEMA,
        "config": asdict(settings),
        "machine": measure.machine(),
        "optimizers": {
            name: {
                "settings": {**known.settings, **settings.overrides.get(name, {})},
                "halved_every_tenth": known.scheduled,
                "note": known.note,
            }
            for name, known in used.items()
        },
        "summary": summary(settings, runs),
        "runs": [
            {
                "optimizer": run.optimizer_name,
                "seed": run.seed,
                "diverged": run.diverged,
                "epochs": [asdict(epoch) for epoch in run.epochs],
            }
            for run in runs
        ],
    }


def summary(settings: Settings, runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """One entry per optimizer: accuracy over seeds, seconds per epoch, epoch time over SGD's.

    The accuracy is that of the last epoch, over the seeds that did not diverge. Seconds are medians over
    epochs and seeds. The first epoch of a run, which includes the warm-up, counts only when there is no
    other. Epoch time is training plus epoch end, without the evaluation, which is not the optimizer's work.
    """
    reference = peers.reference(settings.optimizers)
    by_name = {name: [run for run in runs if run.optimizer_name == name] for name in settings.optimizers}
    entries = {}
    for name, mine in by_name.items():
        final = [run.epochs[-1].test_accuracy for run in mine if not run.diverged]
        timed = [epoch.seconds for run in mine for epoch in warm_epochs(run)]
        pairs = list(paired_epochs(mine, by_name[reference]))
        entries[name] = {
            "runs": len(mine),
            "diverged": sum(run.diverged for run in mine),
            "test_accuracy_mean": float(np.mean(final)) if final else None,
            "test_accuracy_std": float(np.std(final, ddof=1)) if len(final) > 1 else None,
            "seconds": {
                phase: float(np.median([seconds[phase] for seconds in timed])) if timed else None
                for phase in PHASES
            },
            "reference": reference,
            "epoch_time_ratio": measure.ratio(*zip(*pairs, strict=True))._asdict() if pairs else None,
        }
    return entries


def note(settings: Settings) -> str:
    """A sentence on the settings of the training: what was tuned, and how the rates move.

    The settings of `bench.peers` are those that the optimizers' authors use on CIFAR-10. None is tuned here.
    """
    kinds: dict[str, list[str]] = {}
    for name in settings.optimizers:
        known = peers.peer(name)
        rate = {**known.settings, **settings.overrides.get(name, {})}.get("lr")
        moved = "halved after each tenth of the run" if known.scheduled else "no schedule"
        kinds.setdefault(moved, []).append(f"{name} {rate:g}" if isinstance(rate, int | float) else name)
    rates = "; ".join(f"{', '.join(names)} ({moved})" for moved, names in kinds.items())
    tuned = "Nothing was tuned on these data"
    if settings.overrides:
        given = ", ".join(f"{name}.{key}" for name, mine in settings.overrides.items() for key in mine)
        tuned += f"; given by hand: {given}"
    return f"Learning rates as their authors set them for CIFAR-10: {rates}. {tuned}."


def warm_epochs(run: Run) -> list[Epoch]:
    """The epochs of a run whose time counts: complete ones, and the first only when there is no other."""
    complete = [epoch for epoch in run.epochs if math.isfinite(epoch.test_loss)]
    return complete[1:] or complete


def paired_epochs(runs: Sequence[Run], references: Sequence[Run]) -> Iterator[tuple[float, float]]:
    """Epoch times, in seconds, of two optimizers in the same epochs of the same seeds."""
    for run, reference in zip(runs, references, strict=True):
        theirs = {epoch.epoch: epoch_time(epoch) for epoch in warm_epochs(reference)}
        for epoch in warm_epochs(run):
            if epoch.epoch in theirs:
                yield epoch_time(epoch), theirs[epoch.epoch]


def epoch_time(epoch: Epoch) -> float:
    """Seconds of training and epoch end."""
    return epoch.seconds["training"] + epoch.seconds["epoch_end"]
