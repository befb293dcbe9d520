"""RMSGD at its defaults compared with SGD with momentum at the same learning rate, on small tasks.

The default rule promises to be safe: in the mean over seeds it is nowhere more than 1 % of held-out accuracy
or .05 nats of training loss behind, with rates that move. Layers are measured once per epoch, and 100 times
in the run of a GPT. All optimizers start from the same weights and see the same batches, so differences are
paired by seed.
"""

import argparse
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table
from torch import nn
from torch.optim import Optimizer

import rmsgd
from bench import arguments, output, readme, terminal
from bench.locks import BusyError, locked
from bench.measure import machine
from bench.names import look_up
from bench.same_lr import images, language
from bench.same_lr.outcomes import Key, Outcomes
from bench.same_lr.training import MakeOptimizer, Outcome
from bench.study.statistics import paired


@dataclass(frozen=True)
class Task:
    """A small task.

    Attributes:
        run: trains it once, from a seed and with an optimizer.
        seeds: runs of RMSGD and SGD, unless others are asked for.

    """

    run: Callable[[int, MakeOptimizer], Outcome]
    seeds: int = 5


TASKS: Mapping[str, Task] = {
    "teacher-2": Task(partial(images.teacher, 2), seeds=10),
    "teacher-10": Task(partial(images.teacher, 10), seeds=10),
    "teacher-100": Task(partial(images.teacher, 100), seeds=10),
    "teacher-1000": Task(partial(images.teacher, 1000)),
    "digits": Task(images.digits, seeds=40),
    "gpt": Task(language.gpt, seeds=15),
    "lora": Task(language.lora, seeds=15),
}
CIFAR10, CIFAR10_SEEDS = "cifar10", 25


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _rmsgd(rule: str, model: nn.Module, lr: float) -> Optimizer:
    return rmsgd.RMSGD(_trainable(model), lr=lr, rule=rule)


def _sgd(model: nn.Module, lr: float) -> Optimizer:
    return torch.optim.SGD([p for _, p in _trainable(model)], lr=lr, momentum=0.9)


OPTIMIZERS: Mapping[str, MakeOptimizer] = {
    "sgd": _sgd,
    "rmsgd": partial(_rmsgd, "bounded"),
    "rmsgd-paper": partial(_rmsgd, "paper"),
}
MOST_SEEDS = {"rmsgd-paper": 2}
"""The letter is there to be seen, not to be told from SGD."""


def runs(tasks: Iterable[str], seeds: Mapping[str, int]) -> list[Key]:
    """What is to be trained, seeds outermost, so that what has ended early is of all tasks."""
    return [
        (task, seed, optimizer)
        for seed in range(max(seeds.values()))
        for task in tasks
        for optimizer in OPTIMIZERS
        if seed < min(seeds[task], MOST_SEEDS.get(optimizer, seeds[task]))
    ]


def train(tasks: Mapping[str, Task], key: Key) -> Outcome:
    """Trains one of `runs`."""
    task, seed, optimizer = key
    with warnings.catch_warnings():
        # The letter's rates grow tenfold; the table shows what becomes of it.
        warnings.simplefilter("ignore", UserWarning)
        return tasks[task].run(seed, OPTIMIZERS[optimizer])


def compare(name: str, seeds: int, known: Outcomes) -> dict[str, Any]:
    """One task: every optimizer's means over its seeds, and the differences to SGD's with 95 % intervals."""
    row: dict[str, Any] = {"task": name, "seeds": seeds, "runs": {}}
    for optimizer in OPTIMIZERS:
        mine = range(min(seeds, MOST_SEEDS.get(optimizer, seeds)))
        outcomes = [known[name, seed, optimizer] for seed in mine]
        columns = {key: [getattr(one, key) for one in outcomes] for key in Outcome._fields}
        row["runs"][optimizer] = columns
        row[optimizer] = {key: sum(values) / len(values) for key, values in columns.items()}
        for key in ("loss", "accuracy", "last_loss", "last_accuracy"):
            behind = paired(columns[key], row["runs"]["sgd"][key][: len(mine)])
            row[optimizer][f"{key}_difference"] = [behind.mean, behind.low, behind.high]
    return row


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows as a table for the terminal."""
    title = "Held-out accuracy, %, and training loss, nats, at the same learning rate"
    return terminal.table(title, readme.SAME_LR_HEADINGS, map(readme.same_lr_cells, rows))


def main(given: Sequence[str]) -> int:
    """Trains, prints the table, writes `same-lr.json`.

    Returns:
        0; 1 when another process writes to the same folder; 130 when interrupted. What has ended is kept.

    """
    parser = argparse.ArgumentParser(
        prog="python -m bench same-lr",
        description="Hold RMSGD's default rule, and the letter of Algorithm 1, against SGD with momentum at "
        "the same learning rate on small tasks. A run that has ended is kept in --out and not repeated.",
    )
    parser.add_argument(
        "--seeds",
        type=arguments.positive,
        help="runs of each with RMSGD and SGD (default: "
        + ", ".join(f"{name} {task.seeds}" for name, task in TASKS.items())
        + f", {CIFAR10} {CIFAR10_SEEDS})",
    )
    parser.add_argument("--data", type=Path, help=f"zip of CIFAR-10's class folders: adds the task {CIFAR10}")
    parser.add_argument(
        "--tasks",
        type=arguments.names,
        help=f"comma-separated: {', '.join([*TASKS, CIFAR10])} (default: all)",
    )
    arguments.add_output(parser, "same-lr")
    options = parser.parse_args(given)
    tasks = dict(TASKS)
    if options.data is not None:
        tasks[CIFAR10] = Task(partial(images.cifar10, options.data), seeds=CIFAR10_SEEDS)
    if options.tasks is not None:
        if CIFAR10 in options.tasks and CIFAR10 not in tasks:
            parser.error(f"--tasks {CIFAR10} needs --data")
        if CIFAR10 not in options.tasks:
            arguments.refuse(parser, options, ["data"], f"is for the task {CIFAR10}, and --tasks has others")
        tasks = {name: look_up("task", name, tasks) for name in options.tasks}
    if options.seeds == 1:
        parser.error("--seeds: at least two are needed for an interval")
    output.check(options.out, options.readme, ["same-lr"])
    seeds = {name: options.seeds or task.seeds for name, task in tasks.items()}
    console = Console()
    try:
        with locked(options.out), Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress:
            known = Outcomes(options.out)
            for key in progress.track(runs(tasks, seeds), description="training"):
                if key not in known:
                    known.add(key, train(tasks, key))
    except BusyError as error:
        terminal.say(str(error), console)
        return 1
    except KeyboardInterrupt:
        terminal.say("interrupted: the same command goes on after the last run that ended", console)
        return 130
    rows = [compare(name, seeds[name], known) for name in tasks]
    result = {"schema": 2, "machine": machine(), "revisions": known.revisions(), "same-lr": rows}
    terminal.show(table(rows), console)
    output.finish(options.out / "same-lr.json", result, console, page=options.readme)
    return 0
