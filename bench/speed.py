"""`python -m bench speed`: what a step and an epoch end cost on this machine, beside the peers.

Everything that is compared is timed in turn in the same run (`bench.measure`). The epoch end is timed as
`epoch_step(); learning_rates()`, so that no work is left running when the clock is read, on weights as
training leaves them and on initial ones. The lower bound of the step is a plain loop over one array with the
same traffic. The epoch end is compared with `torch.mm` of every unfolding with its transpose, in both modes,
with which a straightforward implementation begins. An epoch end can be quicker than these products, and that
of rmsgd is on most networks: half of a symmetric product is enough, and the modes of a 1x1 convolution share
one.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench import output, peers, speed_epoch_end, speed_step
from bench.arguments import add_output, add_rounds
from bench.measure import machine
from bench.networks import networks

SECTIONS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "step": speed_step.measure,
    "epoch-end": speed_epoch_end.measure,
}
TABLES: dict[str, Callable[[list[dict[str, Any]]], Table]] = {
    "step": speed_step.table,
    "epoch-end": speed_epoch_end.table,
}


def main(arguments: Sequence[str]) -> int:
    """Measures, prints the tables, writes `speed-cpu.json` and the plot; returns 0."""
    parser = argparse.ArgumentParser(
        prog="python -m bench speed",
        description="Time the step and the epoch end against torch's SGD and rmsgd 1.0.2.",
    )
    parser.add_argument("--section", choices=sorted(SECTIONS), action="append", help="only this one")
    parser.add_argument("--models", type=networks, help="comma-separated; default: all of the section")
    add_rounds(parser, 15)
    parser.add_argument("--quick", action="store_true", help="leave out rmsgd 1.0.2, which takes minutes")
    add_output(parser, "speed", "JSON and plot")
    options = parser.parse_args(arguments)

    sections = options.section or SECTIONS
    output.check(options.out, options.readme, sections)
    if not options.quick:
        peers.load_rmsgd_1_0_2()

    console = Console()
    result: dict[str, Any] = {"schema": 1, "machine": machine()}
    for section in sections:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            rows = SECTIONS[section](progress, options.models, options.rounds, quick=options.quick)
        result[section] = rows
        console.print(TABLES[section](rows))

    def draw() -> list[Path]:
        ends = result.get("epoch-end")
        return [speed_epoch_end.plot(ends, options.out / "epoch-end-cost.png")] if ends else []

    output.finish(options.out / "speed-cpu.json", result, console, page=options.readme, draw=draw)
    return 0
