"""What an epoch costs with each optimizer, part by part: the engine of `python -m bench epoch-time`.

This is the whole protocol:

1. Every optimizer has its own copy of the network, from the same seed. The batches are on the device, so that
   nothing is loaded or moved while the clock runs.
2. Two steps, an epoch end and an evaluation batch of each optimizer warm up and are not timed.
3. A round trains a few steps with every optimizer in turn, in an order drawn anew each round, then
   ends an epoch and evaluates one batch. So other work on the machine slows all of them alike.
4. Time is booked by parts: forward and backward (with SAM's second pass, which runs inside its step), the
   step itself, the epoch end, the evaluation. On CUDA the first two are read from events on the stream, so
   that nothing waits in between. The epoch end and the evaluation start and end with an idle device, so that
   their work on a side stream is counted.
5. The time of an epoch is composed: steps of an epoch x (forward and backward + step) + epoch end. It leaves
   out the evaluation, which is the same for all. An epoch end is part of it only for an optimizer that has
   one.
6. The report gives the median over rounds, with a 95 % interval from six rounds on. Ratios are taken within a
   round, and their median is reported. "Added" is the optimizer's own time (steps and epoch end) beyond the
   reference's, in per cent of the reference's epoch. It leaves out the forward and backward pass, which is
   the same computation for every optimizer with one pass, and with it most of the noise.
7. A clock around every round checks the parts: their sum has to be within 3 % of the whole.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import data, measure, models, peers
from bench.data.source import whole_batches
from bench.errors import is_out_of_memory
from bench.training import cross_entropy

SCHEMA = "rmsgd-bench-epoch-time/1"
# From the last side of a sample to the training and test samples of an epoch of synthetic data: those of
# CIFAR, of ImageNet, and the windows of 256 characters in a megabyte of text.
EPOCHS = {32: (50_000, 10_000), 224: (1_281_167, 50_000), 256: (3_921, 435)}
POOL = 4  # batches kept on the device and used in turn
LONG_ENOUGH = 0.3  # the least seconds that the steps of a round take


class DoesNotFitError(RuntimeError):
    """The device has not enough memory for this batch."""


@dataclass(frozen=True)
class Settings:
    """What is timed.

    Attributes:
        model: key of `bench.models.ARCHITECTURES`.
        data: "synthetic", "digits" or a folder.
        optimizers: keys of `bench.peers.PEERS`.
        batch: mini-batch size.
        rounds: interleaved rounds.
        device: torch device.
        width: factor on the network's channel counts.
        threads: the number of torch's threads on the CPU.

    """

    model: str
    data: str
    optimizers: tuple[str, ...]
    batch: int
    rounds: int
    device: str
    width: float
    threads: int


@dataclass(frozen=True)
class Workload:
    """Batches to train on, one to evaluate, and how many of them an epoch has."""

    batches: Sequence[tuple[Tensor, Tensor]]
    held_out: tuple[Tensor, Tensor]
    steps: int
    evaluations: int
    classes: int

    @property
    def channels(self) -> int | None:
        inputs = self.batches[0][0]
        return inputs.shape[1] if inputs.ndim == 4 else None


def workload(settings: Settings) -> Workload:
    """The data of `settings`; raises UsageError when model and data do not fit."""
    samples = None if settings.data == "digits" else POOL * settings.batch
    if settings.data == "synthetic":
        train, test = EPOCHS.get(models.architecture(settings.model).sample[-1], EPOCHS[32])
        whole_batches(train, settings.batch)  # checked before samples are made for the batch
    dataset = data.load(settings.data, settings.model, settings.device, samples)
    batches = list(islice(data.Batches(dataset.train, settings.batch, seed=0), POOL))
    count = min(settings.batch, len(dataset.test))
    held_out = (dataset.test.inputs[:count], dataset.test.targets[:count])
    if settings.data == "digits":
        train, test = len(dataset.train), len(dataset.test)
    elif settings.data != "synthetic":
        train, test = data.sizes(Path(settings.data))
    steps, evaluations = whole_batches(train, settings.batch), math.ceil(test / count)
    return Workload(batches, held_out, steps, evaluations, dataset.classes)


class Case:
    """One optimizer with a network of its own, and the times of its rounds.

    Attributes:
        seconds: from a part to its seconds in each round: those of one step for "forward_backward" and
            "step", of one epoch end for "epoch_end", of one batch for "evaluation". "parts" and "whole" are a
            round's training by the sum of its parts and by one clock around it.
        finite: whether the loss has stayed a number.

    """

    def __init__(self, settings: Settings, work: Workload, name: str) -> None:
        self.name = name
        self.finite = True
        self.seconds: dict[str, list[float]] = {
            part: [] for part in ("forward_backward", "step", "epoch_end", "evaluation", "parts", "whole")
        }
        self._device = torch.device(settings.device)
        self._work = work
        self._peer = peers.peer(name)
        torch.manual_seed(0)
        network = models.build(settings.model, work.classes, work.channels, settings.width)
        self._network = network.to(self._device)
        self._optimizer = peers.make(name, self._network.named_parameters(), steps=work.steps)
        self._batches = cycle(work.batches)

    def warm_up(self) -> float:
        """Runs everything once untimed; returns the seconds of one step."""
        self._steps(1)
        start = time.perf_counter()
        seconds = sum(self._steps(1).values())
        elapsed = time.perf_counter() - start
        self._end_epoch()
        self._evaluate()
        return min(seconds, elapsed)

    def round(self, steps: int) -> None:
        """Trains `steps` steps, ends an epoch, evaluates a batch, and books what each took."""
        start = self._now()
        parts = self._steps(steps)
        before_end = self._now()
        self._end_epoch()
        end = self._now()
        self._evaluate()
        after = self._now()
        book = {part: seconds / steps for part, seconds in parts.items()}
        book["epoch_end"] = end - before_end
        book["evaluation"] = after - end
        book["parts"] = sum(parts.values()) + end - before_end
        book["whole"] = end - start
        for part, seconds in book.items():
            self.seconds[part].append(seconds)

    def _steps(self, steps: int) -> dict[str, float]:
        self._network.train()
        parts = ("forward_backward", "step")
        kind = measure.EventClock if self._device.type == "cuda" else measure.HostClock
        clock = kind(self._device, parts)
        loss = torch.zeros(())
        for inputs, targets in islice(self._batches, steps):

            def gradients(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
                # This runs inside SAM's step: the time before this second pass belongs to the step.
                clock.stop("step")
                loss = cross_entropy(self._network(inputs), targets)
                if torch.is_grad_enabled():  # a line search asks for the loss alone
                    self._optimizer.zero_grad()
                    loss.backward()
                clock.stop("forward_backward")
                return loss

            loss = gradients()
            self._optimizer.step(*self._peer.step_arguments(gradients, loss))
            clock.stop("step")
        seconds = clock.seconds
        self.finite &= math.isfinite(loss.item())
        return seconds

    def _end_epoch(self) -> None:
        if hasattr(self._optimizer, "epoch_step"):
            self._optimizer.epoch_step()

    @torch.no_grad()
    def _evaluate(self) -> None:
        self._network.eval()
        inputs, targets = self._work.held_out
        cross_entropy(self._network(inputs), targets)

    def _now(self) -> float:
        measure.synchronise(self._device)
        return time.perf_counter()

    def memory(self) -> dict[str, float | None]:
        """MiB of the optimizer's state, and on CUDA the peak of one step beside the other cases."""
        state = sum(
            value.nbytes
            for optimizer in peers.parts(self._optimizer)
            for entry in optimizer.state.values()
            for value in entry.values()
            if isinstance(value, Tensor) and value.numel() > 1
        )
        peak = None
        if self._device.type == "cuda":
            own = state + sum(2 * parameter.nbytes for parameter in self._network.parameters())
            before = torch.cuda.memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._steps(1)
            peak = (torch.cuda.max_memory_allocated(self._device) - before + own) / 2**20
        return {"state_mib": state / 2**20, "peak_mib": peak}


def run(settings: Settings, on_round: Callable[[int], object] = lambda done: None) -> dict[str, Any]:
    """Times every optimizer and returns the result as plain values.

    Args:
        settings: what to time.
        on_round: called with the number of rounds done.

    Raises:
        UsageError: settings that make no sense, or that model, data or optimizer refuse.
        DoesNotFitError: out of memory; the message says which batch would fit.

    """
    work = workload(settings)
    with said_when_full(settings):
        cases = [Case(settings, work, name) for name in settings.optimizers]
        quickest = min(case.warm_up() for case in cases)
        steps = min(work.steps, max(1, math.ceil(LONG_ENOUGH / max(quickest, 1e-6))))
        order = np.random.default_rng(0)
        with measure.collector_paused():
            for done in range(settings.rounds):
                for index in order.permutation(len(cases)):
                    cases[index].round(steps)
                on_round(done + 1)
        memory = {case.name: case.memory() for case in cases}
    rows = summarise(settings, work, {case.name: case.seconds for case in cases})
    for row, case in zip(rows, cases, strict=True):
        row |= memory[case.name] | {"finite": case.finite}
    return {
        "schema": SCHEMA,
        "config": asdict(settings),
        "machine": measure.machine(),
        "epoch": {"steps": work.steps, "evaluation_batches": work.evaluations, "steps_per_round": steps},
        "reference": peers.reference(settings.optimizers),
        "optimizers": rows,
        "seconds_per_round": {case.name: case.seconds for case in cases},
    }


def summarise(
    settings: Settings, work: Workload, seconds: dict[str, dict[str, list[float]]]
) -> list[dict[str, Any]]:
    """Medians, epochs and ratios from the seconds of every round: a row per optimizer."""
    parts = {
        name: {part: np.array(values) for part, values in mine.items()} for name, mine in seconds.items()
    }
    own = {name: work.steps * mine["step"] + mine["epoch_end"] for name, mine in parts.items()}
    epochs = {name: work.steps * mine["forward_backward"] + own[name] for name, mine in parts.items()}
    reference = peers.reference(settings.optimizers)
    rows = []
    for name, mine in parts.items():
        added = 100 * (own[name] - own[reference]) / epochs[reference]
        rows.append(
            {
                "optimizer": name,
                "forward_backward": measure.median(mine["forward_backward"])._asdict(),
                "step": measure.median(mine["step"])._asdict(),
                "epoch_end": measure.median(mine["epoch_end"])._asdict(),
                "evaluation": measure.median(work.evaluations * mine["evaluation"])._asdict(),
                "epoch": measure.median(epochs[name])._asdict(),
                "ratio": measure.ratio(epochs[name], epochs[reference])._asdict(),
                "added_percent": measure.median(added)._asdict(),
                "parts_over_whole": float(np.median(mine["parts"] / mine["whole"])),
            }
        )
    return rows


@contextmanager
def said_when_full(settings: Settings) -> Iterator[None]:
    """Turns torch's out-of-memory errors into one that says which batch would fit."""
    try:
        yield
        return
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # This stands outside the handler, since the error's traceback holds the tensors that filled the device.
    fitting = largest_fitting_batch(settings)
    advice = f"batch {fitting} would fit" if fitting else "not even a batch of 1 would fit"
    names = ", ".join(settings.optimizers)
    raise DoesNotFitError(
        f"out of memory on {settings.device} with {settings.model}, batch {settings.batch} and a network "
        f"for each of {names}: {advice}"
    )


def largest_fitting_batch(settings: Settings) -> int:
    """The largest half, quarter, ... of the batch with which every case makes its first steps; 0 if none."""
    batch = settings.batch // 2
    while batch:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        smaller = replace(settings, batch=batch)
        try:
            work = workload(smaller)
            for case in [Case(smaller, work, name) for name in settings.optimizers]:
                case.warm_up()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        else:
            return batch
        batch //= 2
    return 0
