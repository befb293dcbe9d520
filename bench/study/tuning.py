"""Grid search over the initial learning rate, judged by images that are held out of the training set."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from bench import measure, peers
from bench.errors import UsageError
from bench.study.config import RunConfig, sorted_settings
from bench.study.experiments import scaled_rate
from bench.study.records import Record, finished

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Of each optimizer's own rate."""


def grid(configs: Sequence[RunConfig], factors: Sequence[float] = FACTORS) -> list[RunConfig]:
    """The runs of the search: each of `configs`, which set no rate, with every rate, on a held-out part.

    An optimizer that searches its rate itself (SLS) has nothing to search.
    """
    return [
        replace(config, holdout=True, settings=sorted_settings({**dict(config.settings), "lr": lr}))
        for config in configs
        for lr in (scaled_rate(config.optimizer, factor) for factor in factors)
        if lr is not None
    ]


def best(records: Sequence[Record], factors: Sequence[float] = FACTORS) -> dict[str, dict[str, Any]]:
    """Optimizer to its best rate, by mean accuracy on the held-out part.

    A rate that diverged with any seed is out. Also whether the best is at the edge of the grid, where a
    better one may lie outside, and the accuracy of every rate, in per cent.
    """
    found = {}
    for name in dict.fromkeys(record.config.optimizer for record in records):
        mine = [record for record in records if record.config.optimizer == name]
        accuracy = {}
        for lr in sorted({dict(record.config.settings)["lr"] for record in mine}):
            seeds = [record for record in mine if dict(record.config.settings)["lr"] == lr]
            if len(finished(seeds)) == len(seeds):
                accuracy[lr] = 100 * float(np.mean([seed.final["test_accuracy"] for seed in seeds]))
        if accuracy:
            chosen = max(accuracy, key=lambda lr: accuracy[lr])
            found[name] = {
                "lr": chosen,
                "at_the_edge": chosen in (scaled_rate(name, min(factors)), scaled_rate(name, max(factors))),
                "accuracy": accuracy,
            }
    return found


def table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Accuracy of every rate, the best one marked."""
    rows = Table(
        title="accuracy on the held-out part (%) by learning rate",
        caption="*: the best. edge: it is the grid's first or last; a better one may lie outside.",
        box=SIMPLE_HEAD,
        show_edge=False,
    )
    rows.add_column("optimizer", no_wrap=True)
    rows.add_column("rate: accuracy")
    rows.add_column("")
    for name, entry in found.items():
        cells = [
            f"{rate:g}: {accuracy:.1f}{'*' if rate == entry['lr'] else ''}"
            for rate, accuracy in entry["accuracy"].items()
        ]
        rows.add_row(name, "  ".join(cells), "edge" if entry["at_the_edge"] else "")
    return rows


def write(
    path: Path,
    found: Mapping[str, Mapping[str, Any]],
    tuned_on: RunConfig,
    together: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Keeps the rates for `study run --rates`, what they were tuned on, and what goes together there."""
    measure.write_json(
        path, {"tuned_on": tuned_on.to_dict(), "optimizers": dict(found), "correlations": list(together)}
    )


def read(path: Path) -> dict[str, float]:
    """Optimizer to rate; UsageError for a file that `write` did not write."""
    try:
        optimizers = json.loads(path.read_text(encoding="utf-8"))["optimizers"]
        return {name: float(entry["lr"]) for name, entry in optimizers.items()}
    except FileNotFoundError:
        raise UsageError(f"{path} is missing: `study tune` writes it") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} holds no rates as `study tune` writes them ({error})") from error


def with_rates(config: RunConfig, rates: Mapping[str, float]) -> RunConfig:
    """The run with its optimizer's tuned rate, where there is one and the run sets none."""
    settings = dict(config.settings)
    rate = rates.get(config.optimizer, peers.peer(config.optimizer).settings.get("lr"))
    if "lr" in settings or rate == peers.peer(config.optimizer).settings.get("lr"):
        return config
    return replace(config, settings=sorted_settings({**settings, "lr": rate}))
