"""Grid search over the initial learning rate, judged by images that are held out of the training set."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from bench import measure, peers
from bench.errors import UsageError
from bench.study.config import RunConfig
from bench.study.experiments import scaled_rate
from bench.study.records import Record, finished

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""The factors on each optimizer's own rate."""


def grid(configs: Sequence[RunConfig], factors: Sequence[float] = FACTORS) -> list[RunConfig]:
    """The runs of the search: each of `configs`, which set no rate, with every rate, on a held-out part.

    An optimizer that searches its rate itself (SLS) has nothing to search.
    """
    return [
        replace(config.with_settings({"lr": lr}), holdout=True)
        for config in configs
        for lr in (scaled_rate(config.optimizer, factor) for factor in factors)
        if lr is not None
    ]


LADDER = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
FIRST = (0.3, 1.0, 3.0)
"""The factors that `search` may try, and those that it tries first."""

Look = Callable[[Sequence[RunConfig]], Sequence[Record]]
"""Finds the records of those runs that have ended."""

Judge = Callable[[RunConfig], float | None]
"""The result of a run of the search: its accuracy, -inf where it diverged, None where it has not ended."""


@dataclass(frozen=True)
class Found:
    """The result of a search over the rates of one optimizer with one schedule.

    Attributes:
        best: the run with the best rate; None while runs are missing.
        missing: the runs to be made next.
        tried: rate to accuracy, of the runs that have ended.

    """

    best: RunConfig | None
    missing: tuple[RunConfig, ...]
    tried: dict[float, float]

    @property
    def at_the_edge(self) -> bool:
        """Whether a better rate may lie beyond those tried."""
        rate = self.best and self.best.lr
        return rate in (min(self.tried), max(self.tried)) if self.tried else False


def search(config: RunConfig, judge: Judge) -> Found:
    """The best rate for one optimizer with one schedule, by its accuracy on held-out images.

    It tries three rates first, and as long as the best is the lowest or the highest, one more beyond it.
    """
    tried = list(FIRST)
    while True:
        runs = {factor: grid([config], [factor])[0] for factor in tried}
        judged = {factor: judge(run) for factor, run in runs.items()}
        known = {runs[factor].lr: value for factor, value in judged.items() if value is not None}
        if missing := tuple(runs[factor] for factor, value in judged.items() if value is None):
            return Found(None, missing, known)
        chosen = max(tried, key=lambda factor: (judged[factor], -abs(math.log(factor))))
        place = LADDER.index(chosen)
        beyond = place - 1 if chosen == min(tried) else place + 1 if chosen == max(tried) else -1
        if not 0 <= beyond < len(LADDER):
            return Found(runs[chosen], (), known)
        tried.append(LADDER[beyond])


def searched(configs: Iterable[RunConfig], look: Look) -> dict[str, Found]:
    """What the search came to for each of `configs`, by variant, as far as the runs of it have ended."""

    def judge(config: RunConfig) -> float | None:
        records = look([config])
        if not records:
            return None
        return -math.inf if records[0].diverged else records[0].final["test_accuracy"]

    return {config.variant: search(config, judge) for config in configs}


def tried(found: Found) -> list[RunConfig]:
    """The runs of a search that has ended."""
    return [] if found.best is None else [found.best.with_settings({"lr": rate}) for rate in found.tried]


def rates(found: Mapping[str, Found]) -> dict[str, float]:
    """Variant to its best rate, where the search has ended."""
    return {name: entry.best.lr for name, entry in found.items() if entry.best}


def search_table(found: Mapping[str, Found]) -> Table:
    """Accuracy of every rate that a search tried."""
    shown = {
        name: {
            "lr": entry.best.lr,
            "at_the_edge": entry.at_the_edge,
            "accuracy": {rate: 100 * value for rate, value in sorted(entry.tried.items())},
        }
        for name, entry in found.items()
        if entry.best
    }
    return table(shown)


def best(records: Sequence[Record], factors: Sequence[float] = FACTORS) -> dict[str, dict[str, Any]]:
    """Optimizer to its best rate, by mean accuracy on the held-out part.

    A rate that diverged with any seed is out. Also whether the best is at the edge of the grid, where a
    better one may lie outside, and the accuracy of every rate, in per cent.
    """
    found = {}
    for name in dict.fromkeys(record.config.optimizer for record in records):
        mine = [record for record in records if record.config.optimizer == name]
        accuracy = {}
        for lr in sorted({record.config.lr for record in mine}):
            seeds = [record for record in mine if record.config.lr == lr]
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
    """The run with the tuned rate of its optimizer, or of that with its schedule, where it sets none."""
    own = peers.peer(config.optimizer).settings.get("lr")
    rate = rates.get(config.variant, rates.get(config.optimizer, own))
    return config if "lr" in dict(config.settings) or rate == own else config.with_settings({"lr": rate})
