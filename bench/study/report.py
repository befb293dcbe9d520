"""`study report`: measured results beside published ones, and the conclusions."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import groupby, product
from typing import Any, TypeVar

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from bench.grouping import grouped
from bench.study import published
from bench.study.config import RunConfig
from bench.study.experiments import EXPERIMENTS, experiment
from bench.study.network_metrics import LABELS
from bench.study.published import Value
from bench.study.records import TARGETS, Record, by_cell, by_label, finished, is_plain
from bench.study.statistics import Difference, correlation, detectable, holm, in_deviations, paired

Entry = TypeVar("Entry")
UNKNOWN = Difference(math.nan, math.nan, math.nan, math.nan)


def counterpart(name: str, config: RunConfig) -> RunConfig | None:
    """The paper's run that this one repeats, on its own data or on smaller; None if there is none."""
    for run in EXPERIMENTS[name].runs() if name in EXPERIMENTS else ():
        same = run.network.removesuffix("-imagenet") == config.network.removesuffix("-imagenet")
        several = (run.dataset == "adp") == (config.dataset in ("adp", "digits-properties"))
        other_data = config.dataset.startswith("digits")
        if (
            same
            and run.optimizer == config.optimizer
            and several
            and (other_data or run.dataset == config.dataset)
        ):
            return run
    return None


def different(config: RunConfig, paper: RunConfig) -> list[str]:
    """Fields of a run that are not the paper's. The learning rate may be: it is tuned."""
    pairs = {
        field.name: tuple(getattr(run, field.name) for run in (config, paper))
        for field in fields(RunConfig)
        if field.name not in ("optimizer", "seed", "keep_weights")
    }
    pairs["settings"] = tuple(dict(settings) | {"lr": None} for settings in pairs["settings"])
    return [name for name, (here, there) in pairs.items() if here != there]


def cells(records: Sequence[Record]) -> dict[tuple[str, str, str], list[Record]]:
    """(data set, network, label) to the runs with their seeds; the label has the batch size if it varies."""
    varies = len({record.config.batch for record in records}) > 1

    def cell(record: Record) -> tuple[str, str, str]:
        config = record.config
        label = f"{config.label}, batch {config.batch}" if varies else config.label
        return config.dataset, config.network, label

    return grouped(records, cell)


def rows(name: str, records: Sequence[Record]) -> Iterator[dict[str, Any]]:
    """One row per cell and reported epoch: measured, published and their difference.

    There is no difference where the runs are not the paper's, and "differs" has the names of the fields that
    differ. Where runs of the same network, data set and batch size had budgets of their own, "budgets" has
    more than one, and there is no difference.
    """
    shared = budgets(records)
    for (dataset, network, label), mine in cells(records).items():
        config, good = mine[0].config, finished(mine)
        seconds = shared[_cell(mine[0])]
        paper = counterpart(name, config)
        differs = [] if paper is None else different(config, paper)
        comparable = paper is not None and not differs and len(seconds) < 2
        reached = min((len(record.epochs) for record in good), default=0)
        for epoch in [epoch for epoch in experiment(name).epochs if epoch <= reached] or (0,):
            final = [record.epochs[epoch - 1] if epoch else record.final for record in good]
            accuracy = 100 * np.array([values["test_accuracy"] for values in final])
            value = None
            if paper is not None:
                value = published.load().value(name, paper.dataset, paper.network, paper.optimizer, epoch)
            measured = Value(mean(accuracy), deviation(accuracy))
            yield {
                "dataset": dataset,
                "network": network,
                "optimizer": label,
                "settings": dict(config.settings),
                "epoch": epoch or None,
                "seeds": len(mine),
                "diverged": len(mine) - len(good),
                "measured": measured._asdict(),
                "gap": mean([100 * (values["train_accuracy"] - values["test_accuracy"]) for values in final]),
                "Q": mean([values["Q"] for values in final]),
                "epochs": mean([len(record.epochs) for record in good]),
                "seconds_per_epoch": mean([record.seconds[-1] / len(record.epochs) for record in good]),
                "budgets": seconds,
                "differs": differs,
                "published": None if value is None else value._asdict(),
                "published_dataset": None if paper is None else paper.dataset,
                "deviations": in_deviations(*measured, *value) if comparable and value else None,
            }


def budgets(records: Sequence[Record]) -> dict[tuple[str, str, int], list[float]]:
    """(data set, network, batch size) to the different budgets of its runs, in seconds."""
    found: dict[tuple[str, str, int], set[float]] = {}
    for record in records:
        found.setdefault(_cell(record), set()).update(() if record.budget is None else (record.budget,))
    return {cell: sorted(seconds) for cell, seconds in found.items()}


def mean(values: Sequence[float] | np.ndarray) -> float:
    """The mean; NaN of nothing."""
    return float(np.mean(values)) if len(values) else float("nan")


def deviation(values: Sequence[float] | np.ndarray) -> float:
    """The sample standard deviation; NaN of fewer than two."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def accuracy_table(name: str, entries: Sequence[dict[str, Any]]) -> Table:
    """Measured against published."""
    numbers = any(entry["published"] for entry in entries)
    columns = ["measured (%)", "gap", "Q", "epochs"] + ["published (%)", "diff. /\nstd. dev."] * numbers
    table = new_table(f"{name}: {experiment(name).title}", "optimizer", columns)
    table.caption = " ".join(_notes(entries))

    def cells(entry: Mapping[str, Any]) -> list[str]:
        return _measured_cells(entry) + (_published_cells(entry) if numbers else [])

    _add_sections(table, entries, lambda entry: f"{entry['network']}, {entry['dataset']}", cells)
    return table


def new_table(title: str, first: str, columns: Iterable[str], caption: str = "") -> Table:
    """A table of the study without rows: its first column names them, and the others hold numbers."""
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, show_edge=False, collapse_padding=True)
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _add_sections(
    table: Table,
    entries: Iterable[Entry],
    heading: Callable[[Entry], str],
    cells: Callable[[Entry], Iterable[str]],
) -> None:
    """Adds a row for each entry; neighbours with the same heading stand under it."""
    for said, mine in groupby(entries, heading):
        table.add_section()
        table.add_row(f"[bold]{said}[/bold]")
        for entry in mine:
            table.add_row(*cells(entry))


def _measured_cells(entry: Mapping[str, Any]) -> list[str]:
    lost = f", {entry['diverged']} of {entry['seeds']} diverged" if entry["diverged"] else ""
    figures = [
        str(Value(**entry["measured"])),
        f"{entry['gap']:.2f}",
        f"{entry['Q']:.3f}",
        f"{entry['epochs']:.4g}",
    ]
    good = entry["diverged"] < entry["seeds"]
    label = entry["optimizer"] + (f", epoch {entry['epoch']}" if entry["epoch"] else "") + lost
    return [label, *(figures if good else "-" * len(figures))]


def _published_cells(entry: Mapping[str, Any]) -> list[str]:
    known = entry["deviations"] is not None and not math.isnan(entry["deviations"])
    return [
        str(Value(**entry["published"])) if entry["published"] else "-",
        f"{entry['deviations']:+.1f}" if known else "-",
    ]


def _notes(entries: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Sentences on what the table of accuracies holds, and on what cannot be compared."""
    seeds = max((entry["seeds"] for entry in entries), default=0)
    yield f"Seeds: {seeds}. Gap: training minus test accuracy."
    theirs = {entry["published_dataset"] for entry in entries if entry["published"]}
    if other := theirs - {entry["dataset"] for entry in entries}:
        places = ", ".join(sorted(other))
        yield f"Published numbers are of {places}: other data, so no difference is given."
    own = [entry for entry in entries if entry["published"] and "dataset" not in entry["differs"]]
    if changed := dict.fromkeys(name for entry in own for name in entry["differs"]):
        yield f"No difference is given where the paper has another {', '.join(changed)}."
    if unequal := dict.fromkeys(_budgets_of(entry) for entry in entries if len(entry["budgets"]) > 1):
        yield f"Not comparable, for different budgets: {', '.join(unequal)}."
    if order := order_agreement(entries):
        yield "Order of the optimizers, measured against published: " + "; ".join(order) + "."


def tables(name: str, records: Sequence[Record]) -> tuple[dict[str, Any], list[Table]]:
    """What the runs of an experiment came to, as data and as tables."""
    cells = list(rows(name, records))
    content: dict[str, Any] = {"cells": cells}
    shown = [accuracy_table(name, cells)]
    if compared := comparisons(records):
        content["comparisons"] = compared
        shown.append(comparison_table(compared))
    if name == "fig2" and (together := correlations(records)):
        content["correlations"] = together
        shown.append(correlation_table(together))
    return content, shown


def _budgets_of(entry: dict[str, Any]) -> str:
    seconds = ", ".join(f"{budget:.1f}" for budget in entry["budgets"])
    return f"{entry['network']} on {entry['dataset']} ({seconds} s)"


def order_agreement(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Per cell and reported epoch, the rank correlation of measured and published over the optimizers."""
    pairs: dict[tuple[str, str, int | None], list[tuple[float, float]]] = {}
    for entry in entries:
        if entry["published"] and len(entry["budgets"]) < 2:
            cell = (entry["network"], entry["dataset"], entry["epoch"])
            pairs.setdefault(cell, []).append((entry["measured"]["mean"], entry["published"]["mean"]))
    said = []
    for (network, dataset, _), mine in pairs.items():
        if found := correlation(*zip(*mine, strict=True)):
            said.append(f"{network} on {dataset} ROCC {found.rocc:+.2f} (n = {found.n})")
    return said


def comparisons(records: Sequence[Record], reference: str = "rmsgd") -> list[dict[str, Any]]:
    """The reference optimizer's test accuracy against every other's, seed by seed.

    One entry per data set, network and other optimizer or setting: how many seeds ended well with both
    ("seeds"), those that did not and why ("left_out"), the difference in per cent with its 95 % interval, and
    the p value of a paired t test, alone and corrected (Holm) for the comparisons of that cell. Fewer than
    two pairs show nothing: their numbers are NaN, and where no seed was left out there is no entry. A cell
    where the reference ran with several rates has none, nor has one whose runs had different budgets.
    """
    found = []
    shared = budgets(records)
    for cell in dict.fromkeys(_cell(record) for record in records):
        groups = by_label([record for record in records if _cell(record) == cell])
        own = [label for label, runs in groups.items() if _is_own(runs[0], reference)]
        if len(own) != 1 or len(shared[cell]) > 1:
            continue
        found += against(own[0], groups)
    return found


def against(reference: str, groups: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """One group's test accuracy against that of every other, as `comparisons` has it: a family of tests."""
    ours = groups[reference]
    cell = {"dataset": ours[0].config.dataset, "network": ours[0].config.network}
    entries: list[dict[str, Any]] = []
    for label, theirs in groups.items():
        if label == reference:
            continue
        good = [_accuracies(runs) for runs in (ours, theirs)]
        pairs = sorted(good[0].keys() & good[1].keys())
        left_out = _left_out({reference: ours, label: theirs})
        if len(pairs) > 1 or left_out:
            mine, other = ([accuracy[seed] for seed in pairs] for accuracy in good)
            difference = paired(mine, other) if pairs[1:] else UNKNOWN
            spread = detectable(deviation(np.subtract(mine, other)), len(pairs))
            entry = {**cell, "reference": reference, "other": label, "seeds": len(pairs)}
            entries.append({**entry, "left_out": left_out, **difference._asdict(), "detectable": spread})
    tested = [entry["p"] for entry in entries if entry["seeds"] > 1]
    corrected = iter(holm(tested))
    return [
        {**entry, "p_corrected": next(corrected) if entry["seeds"] > 1 else math.nan} for entry in entries
    ]


def _is_own(record: Record, reference: str) -> bool:
    return record.config.optimizer == reference and is_plain(record)


def _accuracies(records: Sequence[Record]) -> dict[int, float]:
    """Seed to test accuracy in per cent, of the runs that did not diverge."""
    return {record.config.seed: 100 * record.final["test_accuracy"] for record in finished(records)}


def _left_out(groups: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """The seeds of either group that make no pair: which run is missing, and why."""
    ends = {label: {run.config.seed: run.diverged for run in runs} for label, runs in groups.items()}
    return [
        {"seed": seed, "optimizer": label, "why": "diverged" if mine.get(seed) else "not ended"}
        for seed in sorted(set().union(*ends.values()))
        for label, mine in ends.items()
        if mine.get(seed, True)
    ]


def _cell(record: Record) -> tuple[str, str, int]:
    return record.config.dataset, record.config.network, record.config.batch


def readme_rows(content: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per optimizer, at its tuned rate: its accuracy, and RMSGD's difference to it."""
    differences = {entry["other"]: entry for entry in content.get("comparisons", ()) if entry["seeds"] > 1}
    return [
        {**cell, "difference": differences.get(cell["optimizer"])}
        for cell in content["cells"]
        if cell["settings"].keys() <= {"lr"}
    ]


def comparison_table(entries: Sequence[dict[str, Any]]) -> Table:
    """Whether the differences are real."""
    said = "Paired by seed: mean, 95 % interval, p of Student's t; corrected (Holm) per cell."
    table = new_table(
        f"test accuracy of {entries[0]['reference']} minus another's (%)",
        "other",
        ("pairs", "difference", "95 % interval", "p", "p corrected"),
        " ".join([said, *_seeds_left_out(entries)]),
    )

    def cells(entry: Mapping[str, Any]) -> Iterator[str]:
        known = entry["seeds"] > 1
        yield entry["other"]
        yield f"{entry['seeds']} of {entry['seeds'] + len({run['seed'] for run in entry['left_out']})}"
        yield f"{entry['mean']:+.2f}" if known else "-"
        yield "-" if math.isnan(entry["low"]) else f"{entry['low']:+.2f} to {entry['high']:+.2f}"
        yield f"{entry['p']:.2g}" if known else "-"
        yield f"{entry['p_corrected']:.2g}" if known else "-"

    _add_sections(table, entries, lambda entry: f"{entry['network']}, {entry['dataset']}", cells)
    return table


def _seeds_left_out(entries: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence per cell about the seeds that make no pair, each run once."""
    cells: dict[str, dict[tuple[str, str], list[str]]] = {}
    for entry in entries:
        for run in entry["left_out"]:
            lost = cells.setdefault(f"{entry['network']}, {entry['dataset']}", {})
            seeds = lost.setdefault((run["optimizer"], run["why"]), [])
            if str(run["seed"]) not in seeds:
                seeds.append(str(run["seed"]))
    return [
        f"Seeds left out of {cell}: "
        + "; ".join(f"{name} {', '.join(seeds)} ({why})" for (name, why), seeds in lost.items())
        + "."
        for cell, lost in cells.items()
    ]


def correlations(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Q and the means of the other metrics against test accuracy and generalisation gap.

    Over the optimizers, rates and seeds of each network, and of all networks together.
    """
    found = []
    good = finished(records)
    groups = by_cell(good)
    if len(groups) > 1:
        groups["all"] = good
    for name, mine in groups.items():
        for metric in LABELS:
            for target in TARGETS:
                result = correlation(
                    [record.final[metric] for record in mine], [record.target(target) for record in mine]
                )
                if result is not None:
                    found.append({"group": name, "metric": metric, "against": target, **result._asdict()})
    return found


def correlation_table(entries: Sequence[Mapping[str, Any]], group: str = "group", note: str = "") -> Table:
    """PLCC and ROCC, one row per group and metric.

    Args:
        entries: with "metric", "against", "n", "plcc" and "rocc", the last two as numbers, or as lists of the
            value and the bounds of its interval.
        group: the key of an entry that says which networks it is over.
        note: ends the caption.

    """
    table = new_table(
        "Q, stable rank and condition against test accuracy and generalisation gap",
        "over the runs of",
        ("runs", "accuracy\nPLCC", "accuracy\nROCC", "gap\nPLCC", "gap\nROCC"),
        f"PLCC: Pearson's correlation. ROCC: Spearman's rank-order correlation. {note}".rstrip(),
    )
    pairs = {(entry[group], entry["metric"], entry["against"]): entry for entry in entries}

    def cells(row: tuple[str, str]) -> Iterator[str]:
        found = [pairs.get((*row, against)) for against in TARGETS]
        yield LABELS[row[1]]
        yield str(next(entry["n"] for entry in found if entry))
        for entry, kind in product(found, ("plcc", "rocc")):
            yield _coefficient(entry[kind]) if entry else "-"

    shown = dict.fromkeys((entry[group], entry["metric"]) for entry in entries)
    _add_sections(table, shown, lambda row: row[0], cells)
    return table


def _coefficient(found: float | Sequence[float]) -> str:
    value, *bounds = [found] if isinstance(found, float) else found
    interval = f" ({', '.join(f'{bound:+.2f}' for bound in bounds)})" if bounds else ""
    return f"{value:+.2f}{interval}"
