"""`python -m bench epoch-time`: arguments, table, JSON, CSV and bar chart of `bench.epoch_timing`."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench import arguments, epoch_timing, measure, output, plots, readme, terminal
from bench.epoch_timing import Settings
from bench.measure import Interval

DEFAULT_OPTIMIZERS = ("rmsgd", "sgd", "sgd-per-layer", "sam", "sgdp", "adamp", "adam")
TOLERANCE = 0.03  # the largest difference between a round's time and the sum of its parts, as a share of it


def main(given: Sequence[str]) -> int:
    """Times, prints the table, writes JSON, CSV and a bar chart.

    Returns:
        0, or 1 when the parts do not add up or memory does not suffice.

    """
    parser = _parser()
    options = parser.parse_args(given)
    if len(options.optimizers) > 1 and options.rounds < 2:
        parser.error("--rounds: a comparison needs at least 2")
    output.check(options.out, options.readme, ["epoch-time"])
    console = Console(stderr=True)
    with arguments.torch_threads(options.threads or torch.get_num_threads()) as threads:
        settings = Settings(
            options.model,
            options.data,
            options.optimizers,
            options.batch,
            options.rounds,
            options.device,
            options.width,
            threads,
        )
        arguments.check_device(settings.device)
        arguments.check_unique("optimizer", settings.optimizers)
        try:
            with Progress(console=console) as progress:
                task = progress.add_task("rounds", total=settings.rounds)
                result = epoch_timing.run(settings, lambda done: progress.update(task, completed=done))
        except epoch_timing.DoesNotFitError as error:
            terminal.say(str(error), console)
            return 1
    Console().print(table(result))
    _write(options.out, result, console)
    if options.readme:
        readme.rewrite(options.readme, {**result, "epoch-time": result["optimizers"]})
        console.print(f"wrote {options.readme}")
    return _complaints(result, console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench epoch-time",
        description="Time an epoch of one network with several optimizers, in interleaved rounds: forward "
        "and backward, step, epoch end, evaluation.",
        epilog=f"{arguments.KNOWN}  The protocol is at the top of bench/epoch_timing.py.",
    )
    add = parser.add_argument
    add("--model", default="resnet18", help="network (default: %(default)s)")
    add("--data", default="synthetic", help="synthetic, digits or a folder (default: %(default)s)")
    add(
        "--optimizers",
        type=arguments.names,
        default=",".join(DEFAULT_OPTIMIZERS),
        metavar="A,B,...",
        help="ratios are to sgd, or to the first without it (default: %(default)s)",
    )
    add("--batch", type=arguments.positive, default=128, help="mini-batch size (default: %(default)s)")
    add(
        "--rounds",
        type=arguments.positive,
        default=15,
        help="interleaved rounds; intervals need 6 (default: %(default)s)",
    )
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    add("--threads", type=arguments.positive, help="threads on the CPU (default: all cores)")
    add("--width", type=arguments.width, default=1.0, help="factor on channel counts (default: %(default)s)")
    add("--out", type=Path, default=Path(".out/epoch-time"), help="folder (default: %(default)s)")
    add("--readme", type=Path, help="rewrite the table of this file")
    return parser


def table(result: dict[str, Any]) -> Table:
    """A row per optimizer."""
    config, epoch, reference = result["config"], result["epoch"], result["reference"]
    rows = Table(
        title=f"{config['model']}, batch {config['batch']}, {config['data']}, {config['device']}: "
        f"an epoch of {measure.count(epoch['steps'], 'step')}",
        caption=f"Medians of {measure.count(config['rounds'], 'interleaved round')}, 95 % intervals. Added: "
        f"own time (steps and epoch end) beyond {reference}'s, in per cent of its epoch. Evaluation is not "
        "in the epoch.",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    rows.add_column("optimizer", no_wrap=True)
    for heading in (
        "fwd+bwd\n(ms)",
        "step\n(ms)",
        "epoch end\n(ms)",
        "eval.\n(s)",
        "epoch\n(s)",
        f"epoch\n({reference} = 1)",
        "added\n(%)",
    ):
        rows.add_column(heading, justify="right")  # it wraps on a narrow terminal, so that no number is cut
    for row in result["optimizers"]:
        is_reference = row["optimizer"] == reference
        rows.add_row(
            row["optimizer"],
            f"{1e3 * row['forward_backward']['median']:.2f}",
            f"{1e3 * row['step']['median']:.2f}",
            f"{1e3 * row['epoch_end']['median']:.1f}",
            f"{row['evaluation']['median']:.2f}",
            f"{row['epoch']['median']:.2f}",
            "1" if is_reference else Interval(**row["ratio"]).text(),
            "0" if is_reference else f"{row['added_percent']['median']:+.2f}",
        )
    return rows


def _write(out: Path, result: dict[str, Any], console: Console) -> None:
    stem = f"epoch-time-{result['config']['model']}-{torch.device(result['config']['device']).type}"
    written = [out / f"{stem}.json", out / f"{stem}.csv"]
    measure.write_json(written[0], result)
    write_csv(written[1], result["optimizers"])
    written += output.figures(lambda: [overhead_chart(out / f"{stem}.png", result)], console)
    output.say(written, console)


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes a line per optimizer, in seconds. An interval is three columns: `_median`, `_low`, `_high`."""
    flat = []
    for row in rows:
        line: dict[str, Any] = {}
        for key, value in row.items():
            if isinstance(value, dict):
                line |= {f"{key}_{part}": number for part, number in value.items()}
            else:
                line[key] = value
        flat.append(line)
    measure.write_csv(path, flat)


def overhead_chart(path: Path, result: dict[str, Any]) -> Path:
    """Draws an epoch's overhead over the reference's: of the whole, and of steps and epoch ends alone."""
    rows, config, reference = result["optimizers"], result["config"], result["reference"]

    def triple(interval: dict[str, float | None], scale: float, offset: float) -> tuple[float, float, float]:
        ends = (interval[part] for part in ("median", "low", "high"))
        # Few rounds give no interval, and its ends are then NaN.
        value, low, high = (math.nan if end is None else scale * end - offset for end in ends)
        return value, low, high

    return plots.overheads(
        path,
        [row["optimizer"] for row in rows],
        {
            "the whole epoch": [triple(row["ratio"], 100.0, 100.0) for row in rows],
            "steps and epoch ends alone": [triple(row["added_percent"], 1.0, 0.0) for row in rows],
        },
        reference=reference,
        xlabel=f"overhead over {reference} (% of its epoch, 95 % interval)",
        title=f"What an epoch costs beyond {reference}'s\n"
        f"({config['model']}, batch {config['batch']}, {config['data']}, {config['device']})",
    )


def _complaints(result: dict[str, Any], console: Console) -> int:
    status = 0
    for row in result["optimizers"]:
        off = row["parts_over_whole"] - 1
        if abs(off) > TOLERANCE:
            status = 1
            terminal.say(f"{row['optimizer']}: the parts are {off:+.1%} off the measured whole", console)
        if not row["finite"]:
            terminal.say(f"{row['optimizer']}: its loss is no longer a number; the times are valid", console)
    return status
