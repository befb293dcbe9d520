"""`python -m bench split`: how the epoch end scales over the processes of a job.

Two processes of one thread each, over gloo, time the same epoch end in turn: by the first alone while the
other waits, and shared (`process_group`). The time of each rank's part by itself, and the cost of the
exchange, are measured too. A model gives the times of more ranks, in units of one rank's time:

    time(R) = largest share of the matrices + exchange ceil(log2 R)

A rank's matrices are those that `rmsgd.optim.distributed.split` gives it. Its share is the sum of the times
that these took alone. The exchange is that of two ranks on this machine and grows as a tree does; it holds no
latency of a network connection. One rank factorises the slowest matrix, so the share of that matrix is the
limit.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.multiprocessing.spawn import spawn

from bench import output, readme
from bench.arguments import add_output, add_rounds
from bench.epoch_end import epoch_end, spectra
from bench.measure import Interleaved, interleave, machine, median, medians, ratio
from bench.networks import network, networks
from bench.weights import make_trained_like
from rmsgd.backends import backend_for
from rmsgd.backends.base import FIELDS
from rmsgd.optim.distributed import Ranks, split

MODELS = ("resnet18", "resnet50")
MEASURED_RANKS = 2
MODELLED_RANKS = (2, 8, 64, 512)
EXCHANGES = 20  # so many in a row, so that the barrier around them hardly counts


def _time_together(rank: int, folder: str, model: str, rounds: int) -> None:
    """Run one of two ranks, which writes its times in seconds into `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=MEASURED_RANKS
    )
    torch.manual_seed(0)
    module = network(model)
    make_trained_like(module)
    matrices = spectra(module)
    measure = backend_for(torch.device("cpu")).measure
    owners = split([unfolding.cost for _, unfolding in matrices], MEASURED_RANKS)
    mine = [matrix for matrix, owner in zip(matrices, owners, strict=True) if owner == rank]
    ranks = Ranks.of_group(dist.group.WORLD)
    table = torch.zeros(len(matrices), FIELDS, dtype=torch.float64)
    own_work: list[float] = []

    def own() -> None:
        start = time.perf_counter()
        measure(mine)
        own_work.append(time.perf_counter() - start)

    def exchange() -> None:
        for _ in range(EXCHANGES):
            ranks.check_agreement(["the same on every rank"], table.device)
            ranks.reduce(table, dist.ReduceOp.SUM)

    cases = {
        "one rank": epoch_end(module) if rank == 0 else lambda: None,
        "two ranks": epoch_end(module, process_group=dist.group.WORLD),
        "own work": own,
        "exchange": exchange,
    }
    # Both ranks draw the same order, and their clocks are read at a barrier.
    seconds = Interleaved(cases, synchronise=dist.barrier).run(rounds)
    timed = {case: values.tolist() for case, values in seconds.items()} | {"own work": own_work[1:]}
    if rank == 0:  # the other rank waits below
        single = {str(i): partial(measure, [matrix]) for i, matrix in enumerate(matrices)}
        timed["matrices"] = list(medians(interleave(single, rounds)).values())
    dist.barrier()
    torch.save(timed, f"{folder}/{rank}")
    dist.destroy_process_group()


def modelled(matrices: Sequence[float], costs: Sequence[int], exchange: float, ranks: int) -> float:
    """The modelled time of an epoch end on `ranks` ranks, over that on one.

    Args:
        matrices: the seconds that each matrix takes alone.
        costs: the optimizer's estimates for the same matrices, by which it divides them among ranks.
        exchange: the time of one exchange between two ranks, over the time of one rank.
        ranks: how many ranks share the work.

    """
    load = [0.0] * ranks
    for owner, seconds in zip(split(costs, ranks), matrices, strict=True):
        load[owner] += seconds
    return max(load) / sum(matrices) + exchange * math.ceil(math.log2(ranks))


def compare(model: str, rounds: int) -> dict[str, Any]:
    """One row: the times of one and of two ranks as measured, and of more ranks by the model."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_time_together, (folder, model, rounds), nprocs=MEASURED_RANKS)
        timed = [torch.load(f"{folder}/{rank}") for rank in range(MEASURED_RANKS)]
    seconds, matrices = timed[0], timed[0]["matrices"]
    one = median(seconds["one rank"]).median
    exchange = median(seconds["exchange"]).median / EXCHANGES
    costs = [unfolding.cost for _, unfolding in spectra(network(model))]
    return {
        "model": model,
        "spectra": len(matrices),
        "seconds": {
            "one rank": one,
            "two ranks": median(seconds["two ranks"]).median,
            "own work": [median(rank["own work"]).median for rank in timed],
            "exchange": exchange,
            "matrices": matrices,
        },
        "rounds": {case: seconds[case] for case in ("one rank", "two ranks")},
        "two_to_one": ratio(seconds["two ranks"], seconds["one rank"])._asdict(),
        "modelled_to_one": {
            str(ranks): modelled(matrices, costs, exchange / one, ranks) for ranks in MODELLED_RANKS
        },
        "limit_to_one": max(matrices) / sum(matrices),
    }


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows as a table."""
    result = Table(
        title="Epoch end shared by ranks of one thread (trained-like weights)",
        box=box.SIMPLE,
        pad_edge=False,
        collapse_padding=True,
    )
    result.add_column("network", no_wrap=True)
    for heading in readme.split_headings(rows):
        result.add_column(heading, justify="right")
    for row in rows:
        result.add_row(row["model"], *readme.split_cells(row))
    return result


def main(arguments: Sequence[str]) -> int:
    """Measures, prints the table, writes `split-cpu.json`; returns 0."""
    parser = argparse.ArgumentParser(
        prog="python -m bench split",
        description="Time the epoch end shared by two processes, and model it for "
        f"{', '.join(map(str, MODELLED_RANKS))}.",
    )
    parser.add_argument("--models", type=networks, default=MODELS, help=f"default: {','.join(MODELS)}")
    add_rounds(parser, 15)
    add_output(parser, "split")
    options = parser.parse_args(arguments)
    output.check(options.out, options.readme, ["split"])
    rows = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for name in progress.track(options.models, description="two ranks"):
            rows.append(compare(name, options.rounds))
    result = {"schema": 1, "machine": machine() | {"threads": 1}, "split": rows}
    console = Console()
    console.print(table(rows))
    output.finish(options.out / "split-cpu.json", result, console, page=options.readme)
    return 0
