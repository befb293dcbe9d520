"""The step of a whole network, beside the forms of torch's SGD and the plain loop."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from rich import box
from rich.progress import Progress
from rich.table import Table

from bench import peers, readme
from bench.errors import UnavailableError
from bench.measure import interleave, medians, ratio
from bench.networks import network
from rmsgd.extras import install_command

MODELS = ("resnet18", "resnet34", "resnet50", "resnet101", "mobilenetv2", "vit-b16")
PEERS = ("rmsgd", "sgd-fused", "sgd-foreach", "sgd-single", "sgd-per-layer")
RELEASE = "rmsgd-1.0.2"
FLOOR = "plain loop"


def plain_loop(elements: int) -> Callable[[], object]:
    """The momentum update as a plain loop over one array, which moves `costs.STEP_BYTES` per element.

    It is compiled by numba and runs on as many threads as torch uses.
    """
    try:
        import numba
    except ImportError as error:
        raise UnavailableError(f"the plain loop needs numba: {install_command('bench')}") from error

    @numba.njit(parallel=True, fastmath=True)
    def update(w, g, v):  # type: ignore[no-untyped-def]
        momentum, eta = np.float32(0.9), np.float32(1e-6)
        for i in numba.prange(w.size):
            v[i] = momentum * v[i] - eta * g[i]
            w[i] += v[i]

    numba.set_num_threads(torch.get_num_threads())
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(elements, dtype=np.float32) for _ in range(3)]
    return lambda: update(*arrays)


def case(name: str, model: str) -> Callable[[], object]:
    """The step of one optimizer for a network of its own, whose gradients are there already."""
    trained = network(model)
    optimizer = peers.make(name, trained.named_parameters(), lr=1e-6)
    for p in trained.parameters():
        p.grad = torch.randn_like(p)
    step: Callable[[], object] = optimizer.step
    return step


def measure(
    progress: Progress, models: Sequence[str] | None, rounds: int, *, quick: bool
) -> list[dict[str, Any]]:
    """One row per model: the median seconds of every case, and their ratios to fused SGD."""
    rows = []
    for model in progress.track(models or MODELS, description="step"):
        torch.manual_seed(0)
        names = [*PEERS] if quick else [*PEERS, RELEASE]
        cases = {name: case(name, model) for name in names}
        sizes = [p.numel() for p in network(model).parameters()]
        cases[FLOOR] = plain_loop(sum(sizes))
        seconds = interleave(cases, rounds, min_seconds=0.02, warmup=2)
        rows.append(
            {
                "model": model,
                "parameters": sum(sizes),
                "tensors": len(sizes),
                "seconds": medians(seconds),
                "to_sgd_fused": {
                    name: ratio(times, seconds["sgd-fused"])._asdict() for name, times in seconds.items()
                },
                "bandwidth_of_floor": ratio(seconds[FLOOR], seconds["rmsgd"])._asdict(),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows as a table: milliseconds, and below them the ratio to fused SGD."""
    result = Table(
        title="One step: ms, and below it the ratio to torch's fused SGD",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    result.add_column("network", no_wrap=True)
    for heading in (*rows[0]["seconds"], "floor's speed"):
        result.add_column(heading.replace("-", "-\n").replace(" ", "\n"), justify="right")
    for row in rows:
        cells = (cell.replace(" (", "\n(") for cell in readme.step_cells(row))
        result.add_row(row["model"], *cells)
    return result
