"""The figures of an experiment that has parts, with the results of each part."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.grouping import grouped
from bench.plots import DASHES, save, style_of
from bench.study import parts, tuning
from bench.study.plots import scatter
from bench.study.records import Record, finished
from rmsgd.plots import blank, depth_colours, plain, whole_numbers

DASH_OF = {"constant": ":", "cosine": "-", "step": "--", "onecycle": "-."}
"""A schedule looks the same in every figure, as an optimizer's colour does."""

FOLLOWED = ("rmsgd", "rmsgd-paper", "sgd", "adamw")
"""Whose accuracy is drawn over the epochs."""

LOWEST_RATE = 1000
"""How far below the highest rate the axis of the rates ends: the last step of a cosine has next to none."""

COURSES = {"rate": "learning rate", "stable_rank": "stable rank", "condition_number": "condition number"}


def draw(
    stem: Path,
    records: Mapping[str, Sequence[Record]],
    search: Mapping[str, tuning.Found],
    searched: Sequence[Record] = (),
) -> list[Path]:
    """Draws the results of the parts and returns the files.

    Args:
        stem: the files' names begin with it.
        records: part to its runs that have ended.
        search: variant to what the search over its rates came to.
        searched: its runs, for the figure that compares networks, not optimizers.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.

    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    good = {part: finished(mine) for part, mine in records.items() if finished(mine)}
    written = []

    def named(what: str) -> Path:
        return stem.with_name(f"{stem.name}-{what}.png")

    if "main" in good:
        written.append(_main(stem.with_suffix(".png"), good["main"]))
        pair = [run for name in ("rmsgd", "sgd") if (run := parts.best(good["main"], name)) and run.layers]
        if pair:
            written.append(_layers(named("layers"), pair))
    if search:
        written.append(_tuning(named("tuning"), search))
    if "measurements" in good:
        written.append(_measurements(named("measurements"), good["measurements"]))
    if "rates" in good:
        written.append(_rates(named("rates"), good["rates"]))
    trained = [*finished(searched), *(record for mine in good.values() for record in mine)]
    every = list({record.config: record for record in trained}.values())
    if len(every) > 2:
        written += scatter(stem.with_name(f"{stem.name}-metrics"), every)
    return written


def _main(path: Path, records: Sequence[Record]) -> Path:
    """Test accuracy at the end with its interval, best at the top; and over the epochs."""
    entries = sorted(parts.rows(records), key=lambda entry: entry["test_accuracy"])
    groups = parts.by_configuration(records)
    figure = blank(10.4, max(3.6, 0.3 * len(entries) + 1.4))
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    for row, entry in enumerate(entries):
        colour, marker = style_of(entry["optimizer"])
        values = [100 * record.final["test_accuracy"] for record in groups[entry["label"]]]
        left.plot(values, [row] * len(values), ".", color=colour, alpha=0.45, markersize=5)
        low, high = entry["interval"]
        left.plot([low, high], [row, row], color=colour, linewidth=2)
        left.plot(entry["test_accuracy"], row, marker, color=colour, markersize=7)
    left.set_yticks(range(len(entries)), labels=[entry["label"] for entry in entries], fontsize=9)
    plain(left, "test accuracy at the end (%)", "")
    left.set_title("mean, 95 % interval, and each seed", fontsize=10)
    followed = [entry for entry in reversed(entries) if entry["optimizer"] in FOLLOWED]
    longest = max(entry["epochs"] for entry in entries)
    for entry in followed:
        if entry["epochs"] < longest:
            continue
        mine = groups[entry["label"]]
        courses = 100 * np.array([record.column("test_accuracy") for record in mine])
        epochs = np.arange(1, courses.shape[1] + 1)
        colour, _ = style_of(entry["optimizer"])
        dash = DASH_OF.get(entry["schedule"], DASHES[0])
        right.plot(epochs, courses.mean(0), color=colour, linestyle=dash, linewidth=1.8, label=entry["label"])
    plain(right, "epoch", "test accuracy (%)")
    whole_numbers(right)
    right.set_title("mean over the seeds, after each epoch", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    figure.suptitle(parts.size(records[0].config), fontsize=10)
    return save(figure, path)


def _tuning(path: Path, search: Mapping[str, tuning.Found]) -> Path:
    """Accuracy on held-out images by learning rate, one seed: how much the choice of the rate matters."""
    figure = blank(8.4, 4.6)
    axes = figure.subplots()
    for name, found in search.items():
        if found.best is None:
            continue
        colour, marker = style_of(found.best.optimizer)
        tried = sorted((rate, 100 * value) for rate, value in found.tried.items() if np.isfinite(value))
        dash = DASH_OF.get(found.best.schedule, DASHES[0])
        axes.plot(*zip(*tried, strict=True), color=colour, marker=marker, linestyle=dash, label=name)
    axes.set_xscale("log")
    plain(axes, "learning rate", "accuracy on held-out images (%)")
    axes.set_title("the search: one seed at each rate", fontsize=10)
    figure.legend(frameon=False, loc="outside right upper", fontsize=8)
    return save(figure, path)


def _measurements(path: Path, records: Sequence[Record]) -> Path:
    """Accuracy by how often RMSGD measures, a line for what is left of a rate: beta to that power.

    Runs of each length have axes of their own.
    """
    entries = parts.rows(records)
    remainders = sorted({_remainder(entry) for entry in entries})
    colours = dict(zip(remainders, _shades(len(remainders)), strict=True))
    lengths = sorted({entry["epochs"] for entry in entries})
    figure = blank(1.6 + 4.6 * len(lengths), 4.4)
    panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    drawn: dict[str, Any] = {}
    for axes, epochs in zip(panels, lengths, strict=True):
        here = [entry for entry in entries if entry["epochs"] == epochs]
        lines = grouped(here, lambda entry: (entry["schedule"], _remainder(entry)))
        for (schedule, left), mine in sorted(lines.items()):
            look = {"color": colours[left], "marker": "o", "linestyle": DASH_OF.get(schedule, "-")}
            label = f"{schedule}, βⁿ = {left}"
            drawn[label] = _swept(axes, records, mine, "measurements", label=label, **look)
        counts = sorted({entry["measurements"] for entry in here})
        axes.set_xticks(counts, labels=map(str, counts))
        axes.minorticks_off()
        plain(axes, "measurements in the run, n", "test accuracy (%)")
        axes.set_title(f"runs of {epochs} epochs", fontsize=10)
    figure.suptitle("RMSGD by its number of measurements; bars: lowest and highest seed", fontsize=10)
    figure.legend(drawn.values(), drawn, frameon=False, loc="outside right upper", fontsize=8)
    return save(figure, path)


def _remainder(entry: Mapping[str, Any]) -> str:
    """What is left of a rate at the end of the run."""
    return f"{entry['beta'] ** entry['measurements']:.1f}"


def _swept(
    axes: Any, records: Sequence[Record], entries: Sequence[Mapping[str, Any]], quantity: str, **look: Any
) -> Any:
    """Draws accuracy by a quantity, on a logarithmic axis: means, and bars from lowest to highest seed."""
    groups = parts.by_configuration(records)
    entries = sorted(entries, key=lambda entry: entry[quantity])
    means = np.array([entry["test_accuracy"] for entry in entries])
    values = [[100 * run.final["test_accuracy"] for run in groups[entry["label"]]] for entry in entries]
    ends = np.array([(min(mine), max(mine)) for mine in values]).T
    axes.set_xscale("log")
    return axes.errorbar(
        [entry[quantity] for entry in entries], means, np.abs(ends - means), capsize=3, **look
    )


def _shades(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](share) for share in np.linspace(0.1, 0.85, count)]


def _rates(path: Path, records: Sequence[Record]) -> Path:
    """Final accuracy against the initial learning rate."""
    figure = blank(7.2, 4.4)
    axes = figure.subplots()
    lines = grouped(parts.rows(records), lambda entry: (entry["optimizer"], entry["schedule"]))
    for (optimizer, schedule), mine in lines.items():
        colour, marker = style_of(optimizer)
        look = {"color": colour, "marker": marker, "linestyle": DASH_OF.get(schedule, "-")}
        _swept(axes, records, mine, "lr", label=f"{optimizer} {schedule}", **look)
    plain(axes, "initial learning rate", "test accuracy (%)")
    axes.set_title("bars: lowest and highest seed", fontsize=10)
    axes.legend(frameon=False)
    return save(figure, path)


def _layers(path: Path, pair: Sequence[Record]) -> Path:
    """Rate, stable rank and condition of every layer over the epochs, a column for each run."""
    figure = blank(4.6 * len(pair) + 1.2, 8.0)
    panels = figure.subplots(len(COURSES), len(pair), squeeze=False, sharey="row", sharex=True)
    names = list(pair[0].layers)
    colours = depth_colours(figure, panels, names)
    for place, (column, record) in enumerate(zip(panels.T, pair, strict=True)):
        accuracy = 100 * record.final["test_accuracy"]
        column[0].set_title(f"{record.config.variant}: {accuracy:.1f} % at the end", fontsize=10)
        for axes, (metric, label) in zip(column, COURSES.items(), strict=True):
            for name, colour in zip(names, colours, strict=True):
                values = record.layers[name][metric]
                axes.plot(np.arange(1, len(values) + 1), values, color=colour, linewidth=1.4)
            plain(axes, "epoch" if axes is column[-1] else "", label if place == 0 else "")
            whole_numbers(axes)
    highest = max(float(layer["rate"].max()) for record in pair for layer in record.layers.values())
    for axes in panels[0]:
        axes.set_yscale("log")
        axes.set_ylim(highest / LOWEST_RATE, 1.5 * highest)
    figure.suptitle("every layer over the epochs, in the best run of each optimizer", fontsize=10)
    return save(figure, path)
