"""RMSGD at its defaults compared with SGD with momentum at the same learning rate, on small tasks.

The default rule promises to be safe: in the mean over seeds it is nowhere more than 1 % of held-out accuracy
or .05 nats of training loss behind, with rates that move. Layers are measured once per epoch, and 100 times
in the run of a GPT. Both optimizers start from the same weights and see the same batches, so differences are
paired by seed.
"""

import argparse
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn
from torch.optim import Optimizer

import rmsgd
from bench import arguments, output, readme, terminal
from bench.measure import machine
from bench.names import look_up
from bench.same_lr import images, language
from bench.same_lr.training import MakeOptimizer, Outcome
from bench.study.statistics import paired

Task = Callable[[int, MakeOptimizer], Outcome]

TASKS: Mapping[str, Task] = {
    "teacher-2": partial(images.teacher, 2),
    "teacher-10": partial(images.teacher, 10),
    "teacher-100": partial(images.teacher, 100),
    "teacher-1000": partial(images.teacher, 1000),
    "digits": images.digits,
    "gpt": language.gpt,
    "lora": language.lora,
}
CIFAR10 = "cifar10"


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


def compare(name: str, task: Task, seeds: Sequence[int], advance: Callable[[], object]) -> dict[str, Any]:
    """One task: every optimizer's means over the seeds, and RMSGD's minus SGD's with a 95 % interval."""
    runs: dict[str, list[Outcome]] = {optimizer: [] for optimizer in OPTIMIZERS}
    for seed in seeds:
        for optimizer, make in OPTIMIZERS.items():
            with warnings.catch_warnings():
                # The letter's rates grow tenfold; the table shows what becomes of it.
                warnings.simplefilter("ignore", UserWarning)
                runs[optimizer].append(task(seed, make))
            advance()
    row: dict[str, Any] = {"task": name, "seeds": len(seeds), "runs": {}}
    for optimizer, outcomes in runs.items():
        columns = {key: [getattr(one, key) for one in outcomes] for key in Outcome._fields}
        row["runs"][optimizer] = columns
        row[optimizer] = {key: sum(values) / len(values) for key, values in columns.items()}
        for key in ("loss", "accuracy"):
            behind = paired(columns[key], row["runs"]["sgd"][key])
            row[optimizer][f"{key}_difference"] = [behind.mean, behind.low, behind.high]
    return row


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows as a table for the terminal."""
    result = Table(title="Held-out accuracy, %, and training loss, nats, at the same learning rate")
    for heading in readme.SAME_LR_HEADINGS:
        result.add_column(heading, justify="left" if heading == readme.SAME_LR_HEADINGS[0] else "right")
    for row in rows:
        result.add_row(*readme.same_lr_cells(row))
    return result


def main(given: Sequence[str]) -> int:
    """Trains, prints the table, writes `same-lr.json`; returns 0."""
    parser = argparse.ArgumentParser(
        prog="python -m bench same-lr",
        description="Hold RMSGD's default rule, and the letter of Algorithm 1, against SGD with momentum at "
        "the same learning rate on small tasks.",
    )
    parser.add_argument("--out", type=Path, default=Path(".out/same-lr"), help="folder for the JSON")
    parser.add_argument("--seeds", type=arguments.positive, default=5, help="runs of each (default: 5)")
    parser.add_argument("--data", type=Path, help=f"zip of CIFAR-10's class folders: adds the task {CIFAR10}")
    parser.add_argument(
        "--tasks",
        type=arguments.names,
        help=f"comma-separated: {', '.join([*TASKS, CIFAR10])} (default: all)",
    )
    parser.add_argument("--readme", type=Path, help="rewrite the table of this file")
    options = parser.parse_args(given)
    tasks = dict(TASKS)
    if options.data is not None:
        tasks[CIFAR10] = partial(images.cifar10, options.data)
    if options.tasks is not None:
        if CIFAR10 in options.tasks and CIFAR10 not in tasks:
            parser.error(f"--tasks {CIFAR10} needs --data")
        tasks = {name: look_up("task", name, tasks) for name in options.tasks}
    if options.seeds < 2:
        parser.error("--seeds: at least two are needed for an interval")
    output.check(options.out, options.readme, ["same-lr"])
    with Progress() as progress:
        bar = progress.add_task("training", total=len(tasks) * options.seeds * len(OPTIMIZERS))
        rows = [
            compare(name, task, range(options.seeds), partial(progress.advance, bar))
            for name, task in tasks.items()
        ]
    result = {"schema": 1, "machine": machine(), "same-lr": rows}
    console = Console()
    terminal.show(table(rows), console)
    output.finish(options.out / "same-lr.json", result, console, page=options.readme)
    return 0
