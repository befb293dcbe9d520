"""Many runs, one after the other. Finished ones are skipped; one that diverges or fails stops no other."""

import json
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import atomic, measure
from bench.data import registry
from bench.data.source import Source
from bench.errors import UsageError
from bench.locks import BusyError, locked
from bench.study.config import RunConfig
from bench.study.records import Record, read
from bench.study.run import Run, Told, make_optimizer
from bench.study.run_folder import status

ENDED = ("complete", "diverged")
ERROR = "error.txt"
"""In the folder of a run that failed: the traceback."""

CPU = torch.device("cpu")
BUDGET_EPOCHS = 4
"""Epochs of SGD that are timed for a budget; the first, which pays for warming up, is not counted."""


@dataclass(frozen=True)
class Place:
    """The places where runs read, compute and write.

    Attributes:
        out: the folder that holds a folder per run.
        data: the path of the data sets; None for those that are built in.
        device: the device that computes.
        checkpoint_seconds: see `bench.study.run.Run`.

    """

    out: Path
    data: Path | None = None
    device: torch.device = CPU
    checkpoint_seconds: float = 300.0


class Runner:
    """Trains runs at one place, reading each data set once."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._sources: dict[tuple[str, tuple[int, ...]], Source] = {}

    def train(self, config: RunConfig, tell: Told = lambda text, share: None) -> str:
        """Trains one run to its end.

        Returns:
            "complete", "diverged", "busy" when another process is at it, or "failed" when an optimizer or a
            network raised an error. `error.txt` in the run's folder then shows it, and the same command
            goes on from the last checkpoint.

        Raises:
            DatasetError: the data is not there, or not what it should be.
            UsageError: a setting that data, network or optimizer refuse.
            OSError: a checkpoint could not be written. The one before is intact.

        """
        folder = config.folder(self._place.out)
        done = status(folder)
        if done in ENDED:
            return done
        source = self.source(config)
        try:
            budget = self.budget(config, tell) if config.budget else None
            how = Run(
                config,
                source,
                folder,
                self._place.device,
                budget=budget,
                checkpoint_seconds=self._place.checkpoint_seconds,
            ).train(tell)
        except BusyError:
            return "busy"
        except (UsageError, OSError):
            raise
        except Exception:  # of an optimizer, a network or torch
            folder.mkdir(parents=True, exist_ok=True)
            atomic.write(folder / ERROR, traceback.format_exc().encode())
            return "failed"
        (folder / ERROR).unlink(missing_ok=True)
        return how

    def records(self, configs: Sequence[RunConfig]) -> list[Record]:
        """The records of those runs that have ended."""
        return read(self._place.out, configs)

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return self._place.device

    def prepare(self, config: RunConfig) -> None:
        """Reads the data of a run that has not ended."""
        if status(config.folder(self._place.out)) not in ENDED:
            self.source(config)

    def source(self, config: RunConfig) -> Source:
        """The data of a run."""
        from bench.models import architecture

        key = (config.dataset, architecture(config.network).sample)
        if key not in self._sources:
            self._sources[key] = registry.source(
                config.dataset, self._place.data, config.network, self._place.device, self._place.out / "data"
            )
        return self._sources[key]

    def budget(self, config: RunConfig, tell: Told = lambda text, share: None) -> float:
        """Seconds that SGD needs for `config.epochs` epochs of the same cell.

        They are measured once: of the processes that share the folder, one measures and the others wait.
        Seconds are those of training and epoch ends; evaluation and checkpoints are not the optimizer's.

        Raises:
            UsageError: they were measured on another device, or with another number of threads.

        """
        cell = replace(config, optimizer="sgd", settings=(), seed=0, budget=False, keep_weights=False)
        name = "-".join(cell.folder(Path()).parts)
        path = self._place.out / "budgets" / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            tell("timing SGD", 0.0)
            # One at a time: the runs of a cell share one budget, and what is timed is not slowed by another.
            with locked(path.parent, wait=True):
                if not path.exists():
                    measure.write_json(path, self._timed(cell, tell))
        found = json.loads(path.read_text(encoding="utf-8"))
        here = device_name(self._place.device)
        if found.get("device", here) != here:
            raise UsageError(
                f"{path} was measured on {found['device']}, and this is {here}: epochs take other times. "
                "Keep these runs in another folder (--out)"
            )
        return found["seconds_per_epoch"] * config.epochs

    def _timed(self, cell: RunConfig, tell: Told) -> dict[str, Any]:
        """The seconds of an epoch of `cell`, and what they were measured with."""
        with tempfile.TemporaryDirectory() as folder:
            short = replace(cell, epochs=BUDGET_EPOCHS)
            run = Run(short, self.source(cell), Path(folder), self._place.device)
            run.train(lambda text, share: tell("timing SGD", 0.0))
        seconds = run.epoch_seconds()
        timed = seconds[1:] or seconds  # it may have diverged in the first epoch
        return {
            "seconds_per_epoch": float(np.median(timed)),
            "timed": timed,
            "cell": cell.to_dict(),
            "device": device_name(self._place.device),
            "machine": measure.machine(),
        }


def device_name(device: torch.device) -> str:
    """The name of the device, with everything that decides how long computations take."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    machine = measure.machine()
    return f"{machine['cpu']}, {machine['threads']} threads"


def train_all(
    runner: Runner,
    configs: Sequence[RunConfig],
    tell: Callable[[RunConfig, str, float], object] = lambda config, text, share: None,
    ended: Callable[[RunConfig, str], object] = lambda config, how: None,
) -> dict[RunConfig, str]:
    """Trains all runs and returns how each ended, as `Runner.train` says it."""
    for config in dict.fromkeys(replace(config, network="", dataset="", seed=0) for config in configs):
        make_optimizer(config, torch.nn.Linear(2, 2), 1)  # a wrong setting, before hours of others
    ends: dict[RunConfig, str] = {}
    for config in configs:
        ends[config] = runner.train(config, partial(tell, config))
        ended(config, ends[config])
    return ends
