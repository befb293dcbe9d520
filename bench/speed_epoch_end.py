"""The epoch end of a whole network, beside rmsgd 1.0.2 and whole Gram products."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.progress import Progress
from rich.table import Table
from torch import nn
from torch.nn import Parameter

from bench import peers, plots, readme
from bench.costs import gram_multiplications
from bench.epoch_end import STAGES, epoch_end, gram_products, spectra
from bench.measure import Interleaved, median, medians, ratio
from bench.networks import network
from bench.weights import make_trained_like
from rmsgd import backends
from rmsgd.backends.base import STAGE

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
MODELS = (*RESNETS, "mobilenetv2", "vit-b16", "linear-4096")
WITHOUT_RELEASE = ("vit-b16", "linear-4096")  # rmsgd 1.0.2 takes minutes per call
RELEASE_ROUNDS = 6  # an interval needs at least as many


def measure(
    progress: Progress, models: Sequence[str] | None, rounds: int, *, quick: bool
) -> list[dict[str, Any]]:
    """One row per model: seconds and ratios, and how many spectra each stage of the guard took."""
    rows = []
    for name in progress.track(models or MODELS, description="epoch end"):
        torch.manual_seed(0)
        initial, trained = network(name), network(name)
        make_trained_like(trained)
        cases = {
            "rmsgd": epoch_end(trained),
            "rmsgd, initial": epoch_end(initial),
            "gram": gram_products(trained),
        }
        seconds = Interleaved(cases, min_seconds=0.05).run(rounds)
        row: dict[str, Any] = {
            "model": name,
            "spectra": len(spectra(trained)),
            "sum_L2M": sum(gram_multiplications(u) for _, u in spectra(trained)),
            "stages": stages(trained),
            "stages_initial": stages(initial),
            "seconds": medians(seconds),
            "to_gram": ratio(seconds["rmsgd"], seconds["gram"])._asdict(),
            "to_gram_initial": ratio(seconds["rmsgd, initial"], seconds["gram"])._asdict(),
        }
        if not quick and name not in WITHOUT_RELEASE:
            copies = [(n, Parameter(p.detach().clone())) for n, p in trained.named_parameters()]
            release: Any = peers.make("rmsgd-1.0.2", copies, linear=True)
            pair = {"rmsgd": cases["rmsgd"], "rmsgd-1.0.2": release.epoch_step}
            seconds = Interleaved(pair).run(RELEASE_ROUNDS)
            row["seconds"]["rmsgd-1.0.2"] = median(seconds["rmsgd-1.0.2"]).median
            row["faster_than_release"] = ratio(seconds["rmsgd-1.0.2"], seconds["rmsgd"])._asdict()
        rows.append(row)
    return rows


def stages(model: nn.Module) -> dict[str, int]:
    """How many matrices each stage of the accuracy guard decided, on the model's device."""
    matrices = spectra(model)
    taken = backends.backend_for(matrices[0][0].device).measure(matrices)[:, STAGE].tolist()
    return {name: taken.count(stage) for stage, name in enumerate(STAGES)}


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows as a table."""
    result = Table(
        title="One epoch end (trained-like weights, all convolutions and linear layers)",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    headings = (
        "network", "spectra", "ms", "/ Gram\nproducts", "initial\nweights", "rmsgd\n1.0.2 (s)",
        "times\nfaster", "Gram fp32 /\nfp64 / SVD",
    )  # fmt: skip
    for heading in headings:
        first = heading == "network"
        result.add_column(heading, justify="left" if first else "right", no_wrap=first)
    for row in rows:
        result.add_row(row["model"], *readme.epoch_end_cells(row))
    return result


def plot(rows: list[dict[str, Any]], path: Path) -> Path:
    """Draws seconds over the sum of L^2 M. Along a line of slope 1 the cost grows as the products do."""
    return plots.proportions(
        path,
        [row["sum_L2M"] for row in rows],
        {
            "epoch end": [row["seconds"]["rmsgd"] for row in rows],
            "Gram products": [row["seconds"]["gram"] for row in rows],
        },
        names=[row["model"] for row in rows],
        xlabel="sum of L² M over the spectra",
        ylabel="time (s)",
        title="Cost of an epoch end",
    )
