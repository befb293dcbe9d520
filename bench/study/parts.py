"""The report of an experiment that has parts, such as cifar10-small: its figures and tables."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
from rich.table import Table

from bench import peers
from bench.grouping import grouped
from bench.measure import count
from bench.study import report, tuning
from bench.study.config import RunConfig
from bench.study.network_metrics import LABELS
from bench.study.records import TARGETS, Record, finished
from bench.study.statistics import bootstrapped, mean_interval

Groups = dict[str, list[Record]]
"""Label to the runs of its seeds."""

NOTE = (
    "±: half of the 95 % interval of the mean (Student's t). Gap: training minus test accuracy. "
    "Rank, cond.: mean stable rank and condition of the layers."
)
REFERENCES = ("rmsgd constant", "rmsgd cosine", "sgd cosine")
"""The rows of the main part that all others are compared with, a family of tests each."""


def by_configuration(records: Sequence[Record]) -> Groups:
    """Seeds of the same configuration together, under labels that say what tells the configurations apart.

    That is the optimizer and its schedule, and, of the other fields and settings, those that differ among
    the runs of the same optimizer and schedule. A learning rate that each optimizer has one of is left out.
    """
    alone = dict.fromkeys(replace(record.config, seed=0) for record in records)
    by_variant = grouped(alone, lambda config: config.variant)
    labels = {config: _label(config, by_variant[config.variant]) for config in alone}
    return grouped(records, lambda record: labels[replace(record.config, seed=0)])


def _label(config: RunConfig, like: Sequence[RunConfig]) -> str:
    described = [_description(other) for other in like]
    mine = _description(config)
    told = [text for name, text in mine.items() if text and len({other.get(name) for other in described}) > 1]
    return ", ".join((config.variant, *told))


def _description(config: RunConfig) -> dict[str, str]:
    """What may tell a run from others of the same optimizer and schedule."""
    own = peers.peer(config.optimizer).settings
    settings = {**own, **dict(config.settings)}
    measured = config.measurements or config.epochs
    return {
        "epochs": count(config.epochs, "epoch"),
        "measurements": f"{measured} measurements" if config.optimizer.startswith("rmsgd") else "",
        "batch": f"batch {config.batch}",
        **{name: f"{name} {value:g}" for name, value in settings.items() if _plain(value)},
    }


def _plain(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def setting(config: RunConfig, name: str) -> float:
    """A setting of a run's optimizer, its own where the run sets none."""
    return float({**peers.peer(config.optimizer).settings, **dict(config.settings)}[name])


def with_own_runs(parts: Mapping[str, Sequence[Record]]) -> dict[str, Sequence[Record]]:
    """The parts that have ended runs which no part before them has: the others would show nothing new."""
    seen: set[RunConfig] = set()
    kept = {}
    for part, records in parts.items():
        configs = {record.config for record in records}
        if configs - seen:
            kept[part] = records
        seen |= configs
    return kept


# -- data ----------------------------------------------------------------------------------------------


def rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row for each configuration: accuracies in per cent over its seeds, and other results."""
    return [_row(label, mine) for label, mine in by_configuration(records).items()]


def _row(label: str, mine: Sequence[Record]) -> dict[str, Any]:
    good = finished(mine)
    test = 100 * np.array([record.final["test_accuracy"] for record in good])
    config = mine[0].config
    return {
        "label": label,
        "optimizer": config.optimizer,
        "schedule": config.schedule,
        "lr": setting(config, "lr"),
        "beta": setting(config, "beta") if config.optimizer.startswith("rmsgd") else None,
        "measurements": config.measurements or config.epochs,
        "batch": config.batch,
        "epochs": config.epochs,
        "seeds": len(mine),
        "diverged": len(mine) - len(good),
        "test_accuracy": report.mean(test),
        "deviation": report.deviation(test),
        "interval": list(mean_interval(test)),
        "train_accuracy": 100 * report.mean([record.final["train_accuracy"] for record in good]),
        "gap": 100 * report.mean([record.gap for record in good]),
        **{metric: report.mean([record.final[metric] for record in good]) for metric in LABELS},
    }


def comparisons(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Every reference that there is against all other configurations, seed by seed."""
    groups = by_configuration(records)
    return [entry for name in REFERENCES if name in groups for entry in report.against(name, groups)]


def rules_rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table "cifar10-rules" from what `tables` gives: SGD, and each rule minus SGD."""
    main = content["main"]
    minus = {entry["other"]: entry for entry in main["comparisons"] if entry["reference"] == "sgd cosine"}
    return [{**cell, "difference": minus.get(cell["label"])} for cell in main["cells"]]


def relations(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Q, stable rank and condition against test accuracy and gap, with 95 % bootstrap intervals.

    Over all runs (configurations are drawn, with all their seeds), across configurations (a point each, the
    mean of its seeds), and within optimizers: over the runs of each that has at least eight, and over all
    runs with each optimizer's means taken away.
    """
    good = finished(records)
    groups = by_configuration(good)
    label_of = {record.config: label for label, mine in groups.items() for record in mine}
    found = []

    def add(name: str, mine: Sequence[Record], clusters: Sequence[object], centred: bool = False) -> None:
        for metric in LABELS:
            for target in TARGETS:
                result = bootstrapped(
                    [record.final[metric] for record in mine],
                    [record.target(target) for record in mine],
                    clusters,
                    centred,
                )
                if result is not None:
                    entry = {"over": name, "n": len(mine), "metric": metric, "against": target}
                    found.append({**entry, **{kind: list(values) for kind, values in result.items()}})

    add("all runs", good, [label_of[record.config] for record in good])
    means = [_mean_record(mine) for mine in groups.values()]
    add("means of the configurations", means, list(groups))
    add(
        "within optimizers",
        good,
        [record.config.optimizer for record in good],
        centred=True,
    )
    for name, mine in grouped(good, lambda record: record.config.optimizer).items():
        if len(mine) >= 8:
            add(name, mine, range(len(mine)))
    return found


def _mean_record(mine: Sequence[Record]) -> Record:
    names = ("test_accuracy", "train_accuracy", *LABELS)
    final = {name: report.mean([record.final[name] for record in mine]) for name in names}
    return replace(mine[0], epochs=(final,))


def best(records: Sequence[Record], optimizer: str) -> Record | None:
    """The run of an optimizer with the best test accuracy."""
    mine = [record for record in finished(records) if record.config.optimizer == optimizer]
    return max(mine, key=lambda record: record.final["test_accuracy"], default=None)


# -- tables --------------------------------------------------------------------------------------------


def size(config: RunConfig) -> str:
    """How large a run is, in words: what stands wherever its figures do."""
    images = "all training images" if config.images is None else f"{config.images:,} training images"
    judged = "the whole test set" if config.judged is None else f"{config.judged:,} test images"
    return f"{config.network} on {config.dataset}, {images}, {count(config.epochs, 'epoch')}, {judged}"


def accuracy_table(title: str, entries: Sequence[Mapping[str, Any]], caption: str) -> Table:
    """Test accuracy of every configuration, the best first."""
    columns = ("lr", "seeds", "test (%)", "gap", "Q", "rank", "cond.")
    table = report.new_table(title, "optimizer", columns, caption)
    table.columns[0].min_width = 20
    for entry in sorted(entries, key=lambda entry: -np.nan_to_num(entry["test_accuracy"])):
        half = (entry["interval"][1] - entry["interval"][0]) / 2
        table.add_row(
            entry["label"] + (f" ({entry['diverged']} diverged)" if entry["diverged"] else ""),
            f"{entry['lr']:g}",
            str(entry["seeds"]),
            f"{entry['test_accuracy']:.2f}" + ("" if np.isnan(half) else f" ± {half:.2f}"),
            f"{entry['gap']:.2f}",
            f"{entry['Q']:.2f}",
            f"{entry['stable_rank']:.3f}",
            f"{entry['condition_number']:.2f}",
        )
    return table


def comparison_tables(entries: Sequence[Mapping[str, Any]]) -> list[Table]:
    """A table for each family, with the smallest difference that it could have seen."""
    tables = []
    for reference in dict.fromkeys(entry["reference"] for entry in entries):
        family = [dict(entry) for entry in entries if entry["reference"] == reference]
        table = report.comparison_table(family)
        seen = [entry["detectable"] for entry in family if np.isfinite(entry["detectable"])]
        if seen:
            table.caption = (
                f"{table.caption} Smallest difference that a single test of so many pairs sees with a "
                f"probability of 80 %: {median(seen):.1f} (median of the rows), before correction."
            )
        tables.append(table)
    return tables


def tables(
    parts: Mapping[str, Sequence[Record]],
    search: Mapping[str, tuning.Found],
    searched: Sequence[Record] = (),
) -> tuple[dict[str, Any], list[Table]]:
    """What the parts came to, as data and as tables.

    Args:
        parts: part to its runs that have ended.
        search: variant to what the search over its rates came to.
        searched: its runs, which count where networks are compared, not optimizers: they are judged by
            held-out images.

    """
    content: dict[str, Any] = {}
    shown: list[Table] = []
    if search:
        content["tuning"] = {
            name: {
                "lr": entry.best.lr,
                "at_the_edge": entry.at_the_edge,
                "tried": entry.tried,
            }
            for name, entry in search.items()
            if entry.best
        }
        shown.append(tuning.search_table(search))
    for part, records in parts.items():
        if not records:
            continue
        entries = rows(records)
        content[part] = {"size": size(records[0].config), "cells": entries}
        shown.append(accuracy_table(part, entries, f"{size(records[0].config)}. {NOTE}"))
        if part == "main":
            content[part]["comparisons"] = comparisons(records)
            shown += comparison_tables(content[part]["comparisons"])
    trained = [*searched, *(record for mine in parts.values() for record in mine)]
    everything = list({record.config: record for record in trained}.values())
    if found := relations(everything):
        content["relations"] = found
        shown.append(report.correlation_table(found, "over", "In brackets: 95 % bootstrap interval."))
    return content, shown
