"""Training runs of the study in processes that can be killed. Imported by the children, too."""

import os
import signal
from dataclasses import asdict
from pathlib import Path

import torch
from clock import PATIENCE
from forked import context

from bench import atomic
from bench.data import Split, nats, registry
from bench.data.source import Augmentation, InMemory
from bench.study import nats_study
from bench.study.config import RunConfig
from bench.study.run import Run
from bench.study.runner import Place, Runner

TINY = RunConfig("resnet14-digits", "digits", "rmsgd", batch=64, epochs=2, width=0.5, keep_weights=True)
STEPS = 4
"""The number of steps in an epoch of `TINY`."""
CPU = torch.device("cpu")


def make(config: RunConfig, folder: Path, **options) -> Run:
    """A run on 260 digits that writes a checkpoint after every step."""
    source = registry.source(config.dataset, None, config.network, CPU)
    splits = [Split(part.inputs[:260], part.targets[:260]) for part in (source._train, source._test)]
    source = InMemory(*splits, source.classes, Augmentation(pad=1), source.several)
    return Run(config, source, folder, CPU, **{"checkpoint_seconds": 0.0, **options})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def child(settings: dict, folder: str, where: str, count: int, started) -> None:
    """Trains, and kills itself at the `count`-th "step" or "write" or "rename"; "" lives on."""
    torch.set_num_threads(1)
    passed = 0

    def dying(function, at):
        def wrapped(*arguments):
            nonlocal passed
            passed += at == where
            if passed == count and at == where:
                if at == "write":
                    # Half of the file is there, under whatever name the writer gave it.
                    os.truncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
                die()
            return function(*arguments)

        return wrapped

    atomic.os.fsync = dying(os.fsync, "write")
    atomic.os.replace = dying(os.replace, "rename")
    Run._take_step = dying(Run._take_step, "step")
    run = make(RunConfig.from_dict(settings), Path(folder))
    started.set()
    run.train()


def start(config: RunConfig, folder: Path, where: str = "", count: int = 0):
    """A child that trains; it has built its run when this returns."""
    started = context.Event()
    settings = {**asdict(config), "settings": dict(config.settings)}
    process = context.Process(target=child, args=(settings, str(folder), where, count, started))
    process.start()
    started.wait(PATIENCE)
    return process


def _measure_budget(settings: dict, out: str, together, found) -> None:
    torch.set_num_threads(1)
    runner = Runner(Place(Path(out)))
    together.wait(PATIENCE)
    found.put(runner.budget(RunConfig.from_dict(settings)))


def budgets(config: RunConfig, out: Path, count: int) -> list[float]:
    """The budgets of a run that `count` processes get when they ask at the same moment."""
    together, found = context.Barrier(count), context.Queue()
    arguments = (config.to_dict(), str(out), together, found)
    processes = [context.Process(target=_measure_budget, args=arguments) for _ in range(count)]
    for process in processes:
        process.start()
    told = [found.get(timeout=PATIENCE) for _ in processes]
    for process in processes:
        process.join(PATIENCE)
    return told


def _measure_nats(folder: str, table: str, last: int) -> None:
    torch.set_num_threads(1)
    read = nats.read
    nats.read = lambda path, *rest: die() if int(path.name.split(".")[0]) == last else read(path, *rest)
    nats_study.measure(Path(folder), Path(table), "cifar10")


def killed_measuring(folder: Path, table: Path, last: int) -> int | None:
    """Measures NATS-Bench's networks in a process that is killed when it comes to `last`; its exit code."""
    process = context.Process(target=_measure_nats, args=(str(folder), str(table), last))
    process.start()
    process.join(PATIENCE)
    return process.exitcode
