"""Runs that fit into a time: how many epochs and seeds every optimizer gets."""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench import measure
from bench.errors import UsageError
from bench.study.config import RunConfig
from bench.study.run import Run
from bench.study.runner import Runner

ENOUGH_SEEDS = 3
"""The number of seeds that come before further epochs."""

RESERVE = 1.25
"""The time of a run over that of its steps, with evaluation, epoch ends, checkpoints and warm-up."""

WARM, TIMED = 5, 10
"""The steps before the clock runs, and the steps that are timed."""


@dataclass(frozen=True)
class Fit:
    """A number of epochs and of seeds, and the seconds that they are expected to take."""

    epochs: int
    seeds: int
    seconds: float

    def text(self) -> str:
        """The decision, for people."""
        return (
            f"{measure.count(self.epochs, 'epoch')} with {measure.count(self.seeds, 'seed')} of every "
            f"optimizer: about {self.seconds / 60:.1f} minutes"
        )

    def runs(self, configs: Sequence[RunConfig]) -> list[RunConfig]:
        """Those of `configs` that are kept, with their number of epochs, all of one seed before the next."""
        kept = dict.fromkeys(
            replace(config, epochs=self.epochs) for config in configs if config.seed < self.seeds
        )
        return sorted(kept, key=lambda config: config.seed)


def fitting(seconds_per_epoch: Sequence[float], seconds: float, most_epochs: int, most_seeds: int) -> Fit:
    """The epochs and seeds that fit.

    Three seeds come first, or as many as there are, with as many epochs as fit up to `most_epochs`, and then
    more seeds. If three seeds would have less than a fifth of `most_epochs`, there are fewer seeds.

    Args:
        seconds_per_epoch: the seconds of an epoch of every optimizer, with everything that a run takes.
        seconds: the available seconds.
        most_epochs, most_seeds: the largest numbers of epochs and seeds.

    Raises:
        UsageError: not even one epoch with one seed fits.

    """
    once = sum(seconds_per_epoch)
    for seeds in range(min(ENOUGH_SEEDS, most_seeds), 0, -1):
        epochs = min(int(seconds / (once * seeds)), most_epochs)
        if epochs >= max(1, most_epochs // 5) or (seeds == 1 and epochs >= 1):
            seeds = max(seeds, min(int(seconds / (once * epochs)), most_seeds))
            return Fit(epochs, seeds, once * epochs * seeds)
    raise UsageError(f"an epoch of every optimizer takes {once:.0f} s, and there are {seconds:.0f}")


def chosen(runner: Runner, configs: Sequence[RunConfig], seconds: float, path: Path) -> Fit:
    """The epochs and seeds that fit into `seconds`. They are decided once for these runs and kept in `path`.

    Raises:
        UsageError: nothing fits, or `path` is another file.

    """
    known, key = _read(path), _key(configs)
    if key not in known:
        alone = dict.fromkeys(replace(config, seed=0) for config in configs)
        taken = [RESERVE * _seconds_per_epoch(runner, config) for config in alone]
        most_seeds = 1 + max(config.seed for config in configs)
        found = fitting(taken, seconds, max(config.epochs for config in configs), most_seeds)
        known = {**known, key: {"epochs": found.epochs, "seeds": found.seeds, "seconds": found.seconds}}
        measure.write_json(path, known)
    return _fit(known[key])


def decided(configs: Sequence[RunConfig], path: Path) -> Fit:
    """What `chosen` decided for these runs before.

    Raises:
        UsageError: it did not.

    """
    known = _read(path)
    key = _key(configs)
    if key not in known:
        raise UsageError(f"{path} knows of no such runs: `study run --minutes` decides what is run")
    return _fit(known[key])


def _key(configs: Sequence[RunConfig]) -> str:
    alone = dict.fromkeys(replace(config, seed=0) for config in configs)
    return hashlib.sha256(json.dumps([config.to_dict() for config in alone]).encode()).hexdigest()[:16]


def _fit(content: Mapping[str, float]) -> Fit:
    return Fit(int(content["epochs"]), int(content["seeds"]), content["seconds"])


def _seconds_per_epoch(runner: Runner, config: RunConfig) -> float:
    with tempfile.TemporaryDirectory() as folder:
        run = Run(config, runner.source(config), Path(folder), runner.device)
        return run.steps * run.seconds_of_steps(TIMED, WARM)


def _read(path: Path) -> Mapping[str, dict[str, float]]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UsageError(f"{path} is not a file of `study run --minutes`: {error}") from error
