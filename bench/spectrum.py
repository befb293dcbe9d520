"""`python -m bench spectrum`: one matrix of each size, part by part, against torch's own routines.

The work of the compiled core on a weight (Gram matrix, tridiagonal form, eigenvalues, EVBMF) is compared with
routines that could be called instead: `torch.mm` for the whole Gram product, `torch.linalg.eigvalsh` of it,
and `torch.linalg.svdvals` of the weight. Small matrices come as a batch on either side, as many as a network
has of them, so that the overhead of a call does not count. The core's own clock times its parts. A part stays
a kernel of rmsgd as long as it is the quicker one here.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from bench import output, plots
from bench.arguments import add_rounds, integers, some_of
from bench.costs import gram_multiplications
from bench.measure import Interleaved, machine, median, ratio
from rmsgd import backends
from rmsgd.backends.native import PARTS, NativeBackend
from rmsgd.layers import unfoldings

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
LARGEST_FP64 = 2048
ASPECT = 2
LARGEST_SVD = 1024  # an SVD of larger matrices takes minutes
LARGE_ROUNDS = 2  # a round of larger matrices takes half a minute
PEERS = ("mm", "eigvalsh", "svdvals")


def matrices(size: int, count: int, dtype: torch.dtype) -> Tensor:
    """(count, size, ASPECT size): noise and a low-rank part of decaying strength."""
    generator = torch.Generator().manual_seed(size)
    columns, rank = ASPECT * size, max(1, size // 8)
    left, right = (torch.randn(count, n, rank, generator=generator) for n in (size, columns))
    strength = 4 * torch.arange(1, rank + 1) ** -0.7 / math.sqrt(size)
    return (torch.randn(count, size, columns, generator=generator) + (left * strength) @ right.mT).to(dtype)


def compare(native: NativeBackend, size: int, dtype: str, rounds: int) -> dict[str, Any]:
    """One row: seconds of every case for one matrix, and how the core's time is divided among its parts."""
    count = max(1, min(64, 2048 // size))
    weights = matrices(size, count, DTYPES[dtype])
    (unfolding,) = unfoldings(weights.shape[1:])
    listed = [(weight, unfolding) for weight in weights]
    gram = weights @ weights.mT
    parts = np.zeros(len(PARTS))

    def ours() -> None:
        parts.__iadd__(native.seconds_by_part(listed))

    cases: dict[str, Callable[[], object]] = {
        "rmsgd": ours,
        "mm": lambda: torch.matmul(weights, weights.mT, out=gram),
        "eigvalsh": lambda: torch.linalg.eigvalsh(gram),
    }
    if size <= LARGEST_SVD:
        cases["svdvals"] = lambda: torch.linalg.svdvals(weights)
    seconds = Interleaved(cases, min_seconds=0.02).run(rounds if size <= LARGEST_SVD else LARGE_ROUNDS)
    shares = dict(zip(PARTS, parts / parts.sum(), strict=True))
    per_part = {
        "mm": shares["gram"],
        "eigvalsh": shares["tridiagonal"] + shares["eigenvalues"],
        "svdvals": 1.0,
    }
    return {
        "size": size,
        "columns": ASPECT * size,
        "dtype": dtype,
        "matrices": count,
        "L2M": gram_multiplications(unfolding),
        "seconds": {case: median(times).median / count for case, times in seconds.items()},
        "shares": shares,
        "evbmf_to_spectrum": shares["evbmf"] / (1.0 - shares["evbmf"]),
        "faster": {
            case: ratio(seconds[case], seconds["rmsgd"] * per_part[case])._asdict()
            for case in PEERS
            if case in seconds
        },
    }


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows as a table."""
    result = Table(
        title=f"An n x {ASPECT}n matrix: ms, their division, and how many times as long torch takes\n"
        "(mm for the Gram matrix, eigvalsh for tridiagonal form and eigenvalues, svdvals for all)",
        box=box.SIMPLE,
        pad_edge=False,
        collapse_padding=True,
    )
    for heading in ("n", "ms", "gram", "tri-\ndiagonal", "eigen-\nvalues", "evbmf", *PEERS):
        result.add_column(heading, justify="left" if heading == "n" else "right", no_wrap=True)
    for row in rows:
        result.add_row(
            f"{row['size']} {row['dtype']}",
            f"{row['seconds']['rmsgd'] * 1e3:.3f}",
            *(f"{row['shares'][part]:.0%}" for part in PARTS),
            *(f"{row['faster'][case]['median']:.1f}" if case in row["faster"] else "" for case in PEERS),
        )
    return result


def plot(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draws seconds per matrix over L^2 M, for fp32 where it was measured."""
    shown = [row for row in rows if row["dtype"] == rows[0]["dtype"]]

    def series(seconds: Callable[[dict[str, float]], float]) -> list[float]:
        return [seconds(row["seconds"]) for row in shown]

    return plots.proportions(
        path,
        [row["L2M"] for row in shown],
        {
            "rmsgd: spectrum and EVBMF": series(lambda s: s["rmsgd"]),
            "torch: Gram product and eigvalsh": series(lambda s: s["mm"] + s["eigvalsh"]),
            "torch: svdvals": series(lambda s: s.get("svdvals", math.nan)),
        },
        names=[str(row["size"]) for row in shown],
        xlabel="L² M",
        ylabel="time for one matrix (s)",
        title=f"Spectrum of an L x {ASPECT}L matrix, {shown[0]['dtype']}",
    )


def main(arguments: Sequence[str]) -> int:
    """Compares, prints the table, writes `spectrum-cpu.json` and the plot; returns 0."""
    parser = argparse.ArgumentParser(
        prog="python -m bench spectrum",
        description="Time the spectrum of one matrix of each size, part by part, against torch's routines.",
    )
    parser.add_argument("--out", type=Path, default=Path(".out/spectrum"), help="folder for JSON and plot")
    parser.add_argument(
        "--sizes",
        type=integers,
        default=SIZES,
        help=f"comma-separated smaller sides, in fp64 up to {LARGEST_FP64} "
        f"(default: {','.join(map(str, SIZES))})",
    )
    parser.add_argument(
        "--dtypes", type=some_of("dtype", DTYPES), default=tuple(DTYPES), help=f"default: {','.join(DTYPES)}"
    )
    add_rounds(parser, 7)
    options = parser.parse_args(arguments)
    if min(options.sizes) < 2:
        parser.error("--sizes: a spectrum needs at least 2 rows")
    combinations = [
        (size, dtype)
        for dtype in options.dtypes
        for size in options.sizes
        if dtype == "fp32" or size <= LARGEST_FP64
    ]
    if not combinations:
        parser.error(f"--sizes: fp64 is timed up to {LARGEST_FP64}")
    output.check(options.out)
    native = backends.backend_for(torch.device("cpu"))
    if not isinstance(native, NativeBackend):
        parser.error(f"this times the compiled core, but {native.name} runs here; `rmsgd doctor` says why")

    rows = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for size, dtype in progress.track(combinations, description="spectra"):
            rows.append(compare(native, size, dtype, options.rounds))
    console = Console()
    console.print(table(rows))
    output.finish(
        options.out / "spectrum-cpu.json",
        {"schema": 1, "machine": machine(), "spectrum": rows},
        console,
        draw=lambda: [plot(rows, options.out / "spectrum-cpu.png")],
    )
    return 0
