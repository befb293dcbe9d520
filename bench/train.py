"""`python -m bench train`: arguments, progress, table, result file and figures."""

import argparse
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bench import arguments, measure, output, peers, plots, terminal, training
from bench.training import Run, Settings
from rmsgd.plots import layer_curves

DEFAULTS = Settings()


def main(given: Sequence[str]) -> int:
    """Runs the command.

    Returns:
        0 when every optimizer finished with at least one seed, 1 when one diverged with all seeds.

    """
    parser = _parser()
    options = parser.parse_args(given)
    if options.data == "digits":
        arguments.refuse(parser, options, ["samples"], "is for other data: the digits are always all there")
    settings = Settings(
        options.model,
        options.data,
        options.optimizers,
        options.seeds,
        options.epochs,
        options.batch,
        options.width,
        options.samples,
        options.device,
        arguments.overrides(options.set),
    )
    output.check(options.out)
    console = Console(stderr=True)
    # Batches of digits are so small that a second thread costs as much as it gains on idle cores, and many
    # times more on busy ones.
    threads = options.threads or (1 if options.data == "digits" else torch.get_num_threads())
    with arguments.torch_threads(threads):
        runs = _train(settings, console, options.out / "data")
        output.finish(
            options.out / "result.json",
            training.result(settings, runs),
            console,
            draw=lambda: figures(options.out, settings, runs),
        )
    summary = training.summary(settings, runs)
    Console().print(table(settings, summary))
    lost = [name for name, entry in summary.items() if entry["diverged"] == entry["runs"]]
    if lost:
        terminal.say(f"diverged with every seed: {', '.join(lost)}", console)
    return 1 if lost else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench train",
        description="Trains one network with several optimizers and seeds, in interleaved epochs, and writes "
        "a table, result.json and figures.",
        epilog=arguments.KNOWN,
    )
    add = parser.add_argument
    add("--model", default=DEFAULTS.model, help="network (default: %(default)s)")
    add(
        "--data",
        default=DEFAULTS.data,
        help="digits, synthetic, a folder of images or a zip of class folders (default: %(default)s)",
    )
    add(
        "--optimizers",
        type=arguments.names,
        default=",".join(DEFAULTS.optimizers),
        metavar="A,B,...",
        help="compared in this order; ratios are to sgd, or to the first without it (default: %(default)s)",
    )
    add(
        "--seeds",
        type=arguments.integers,
        default=",".join(map(str, DEFAULTS.seeds)),
        metavar="N,M,...",
        help="a run of every optimizer for each (default: %(default)s)",
    )
    add(
        "--epochs",
        type=arguments.positive,
        default=DEFAULTS.epochs,
        help="passes over the data (default: %(default)s)",
    )
    add(
        "--batch",
        type=arguments.positive,
        default=DEFAULTS.batch,
        help="mini-batch size (default: %(default)s)",
    )
    add(
        "--width",
        type=arguments.width,
        default=DEFAULTS.width,
        help="factor on channel counts (default: %(default)s)",
    )
    add(
        "--samples", type=int, help="synthetic training samples (default: 2048), or the most read of a folder"
    )
    add("--device", default=DEFAULTS.device, help="cpu, cuda or cuda:N (default: %(default)s)")
    add(
        "--threads",
        type=arguments.positive,
        help="threads on the CPU (default: 1 for digits, else all cores)",
    )
    arguments.add_settings(parser)
    add(
        "--out",
        type=Path,
        default=Path(".out/train"),
        help="folder for result.json and the figures (default: %(default)s)",
    )
    return parser


def _train(settings: Settings, console: Console, cache: Path) -> list[Run]:
    total = len(settings.optimizers) * len(settings.seeds) * settings.epochs
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeRemainingColumn(),
    )
    read = training.dataset(settings, cache)  # decoding images shows a progress bar of its own
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting", total=total)

        def on_epoch(run: Run) -> None:
            accuracy = run.epochs[-1].test_accuracy
            said = f"{run.optimizer_name}, seed {run.seed}: {accuracy:.1%}"
            if run.diverged:
                said = f"{run.optimizer_name}, seed {run.seed}: diverged"
                terminal.say(f"{said} in epoch {len(run.epochs)}; the others go on", progress.console)
                progress.advance(task, settings.epochs - len(run.epochs))
            progress.update(task, advance=1, description=said)

        return training.train(settings, on_epoch, read)


def table(settings: Settings, summary: dict[str, dict[str, Any]]) -> Table:
    """The summary as one table: a row per optimizer."""
    reference = peers.reference(settings.optimizers)
    epochs, seeds = measure.count(settings.epochs, "epoch"), measure.count(len(settings.seeds), "seed")
    title = f"{settings.model} on {settings.data}, {epochs}, {seeds}"
    caption = (
        f"Seconds: medians per epoch. Epoch time: training and epoch end over {reference}'s in the same "
        f"epochs, with its 95 % interval; evaluation is left out. {training.note(settings)}"
    )
    rows = Table(title=title, caption=caption, box=SIMPLE_HEAD, show_edge=False, padding=0)
    rows.add_column("optimizer", no_wrap=True)
    for column in (
        "test accuracy\n(%)",
        "training\n(s)",
        "epoch end\n(s)",
        "evaluation\n(s)",
        f"epoch time\n({reference} = 1)",
    ):
        rows.add_column(column, justify="right")  # it wraps on a narrow terminal, so that no number is cut
    for name, entry in summary.items():
        seconds = [_number(entry["seconds"][phase], ".3f") for phase in training.PHASES]
        ratio = entry["epoch_time_ratio"]
        relative = measure.Interval(**ratio).text() if ratio else "-"
        rows.add_row(name, _accuracy(entry), *seconds, "1" if name == reference else relative)
    return rows


def _accuracy(entry: dict[str, Any]) -> str:
    mean, deviation = entry["test_accuracy_mean"], entry["test_accuracy_std"]
    parts = [] if mean is None else [f"{100 * mean:.2f}"]
    if deviation is not None:
        parts.append(f"± {100 * deviation:.2f}")
    if entry["diverged"]:
        parts.append(f"({entry['diverged']} of {entry['runs']} diverged)")
    return " ".join(parts)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def figures(folder: Path, settings: Settings, runs: Sequence[Run]) -> list[Path]:
    """Draws the results of the runs into `folder` and returns the files.

    For every optimizer that measures its layers there is a figure of each layer's learning rate and one of
    its stable rank (means over seeds). One figure of all optimizers shows test accuracy over training time.
    """
    subject = f"{settings.model}, {settings.data}"
    written = []
    for name in settings.optimizers:
        probed = [run for run in runs if run.optimizer_name == name and run.epochs[0].stable_rank]
        for quantity, label in (("learning_rates", "learning rate"), ("stable_rank", "stable rank")):
            if probed:
                path = folder / f"{name}-{quantity.replace('_', '-')}.png"
                title = f"The {label} of each layer moves by itself under {name}\n({subject})"
                layer_curves(path, layer_means(probed, quantity), ylabel=label, title=title)
                written.append(path)
    over_time = plots.bands_over_time(
        folder / "accuracy-over-time.png",
        {
            name: accuracy_over_time([run for run in runs if run.optimizer_name == name], settings.epochs)
            for name in settings.optimizers
        },
        ylabel="test accuracy (%)",
        xlabel="wall-clock time of training, evaluation left out (s)\n"
        + textwrap.fill(training.note(settings), 95),
        title=f"{subject}: test accuracy over training time\n"
        f"mean of {measure.count(len(settings.seeds), 'seed')}, band from the lowest to the highest",
    )
    return [*written, over_time]


def layer_means(runs: Sequence[Run], quantity: str) -> dict[str, list[float]]:
    """From a measured layer to its means over the seeds, one for each epoch that all seeds reached."""
    length = min(len(run.epochs) for run in runs)
    layers = list(runs[0].epochs[0].stable_rank or ())

    def value(run: Run, epoch: int, layer: str) -> float:
        return (getattr(run.epochs[epoch], quantity) or {}).get(layer, math.nan)

    return {
        layer: [fmean(value(run, epoch, layer) for run in runs) for epoch in range(length)]
        for layer in layers
    }


def accuracy_over_time(runs: Sequence[Run], epochs: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds trained so far and test accuracy in per cent, both (seeds, epochs); NaN after a run's end."""
    times = np.full((len(runs), epochs), np.nan)
    accuracies = times.copy()
    for index, run in enumerate(runs):
        times[index, : len(run.epochs)] = np.cumsum([training.epoch_time(epoch) for epoch in run.epochs])
        accuracies[index, : len(run.epochs)] = [100 * epoch.test_accuracy for epoch in run.epochs]
    return times, accuracies
