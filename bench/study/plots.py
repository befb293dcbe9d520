"""The paper's figures, drawn from records."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import rmsgd
from bench import peers
from bench.grouping import grouped
from bench.plots import bands_over_time, save, style, style_of
from bench.study.network_metrics import AXES
from bench.study.records import TARGETS, Record, by_cell, by_label, finished, is_plain
from bench.study.statistics import correlation, mean_interval
from rmsgd.inspection.report.series import Series, in_order_of_training
from rmsgd.inspection.report.series_figure import plot_series
from rmsgd.plots import PALETTE, blank, plain, whole_numbers

HIGHLIGHTED = ("rmsgd", "sgd")


def draw(name: str, records: Sequence[Record], folder: Path) -> list[Path]:
    """Draws what the experiment called `name` shows and returns the files; none where runs are missing.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.

    """
    folder.mkdir(parents=True, exist_ok=True)
    good = finished(records)
    return DRAWN.get(name, accuracy_dots)(folder / name, good) if good else []


def low_rank_evolution(stem: Path, records: Sequence[Record]) -> list[Path]:
    """Figure 1a: low rank and noise of one layer over the epochs, and how its metrics go."""
    written = []
    for record in records:
        if record.folder is None:
            continue
        paths = in_order_of_training([str(path) for path in sorted((record.folder / "weights").glob("*.pt"))])
        if paths:
            series = Series(tuple(paths), tuple(rmsgd.probe(path) for path in paths))
            layers = list(series.by_layer())
            path = stem.with_name(f"{stem.name}-{record.config.network}.png")
            # The paper shows layer 25.
            plot_series(series, path, layers[min(24, len(layers) - 1)])
            written.append(path)
    return written


def quality_maps(stem: Path, records: Sequence[Record]) -> list[Path]:
    """Figure 1b: quality of every layer (input at the top) over the epochs, one map per optimizer."""
    groups = {label: mine[0] for label, mine in by_label(records).items() if mine[0].layers}
    if not groups:
        return []
    maps = {
        label: np.array([layer["quality"] for layer in record.layers.values()])
        for label, record in groups.items()
    }
    columns = min(4, len(maps))
    rows = -(-len(maps) // columns)
    figure = blank(2.4 * columns + 0.8, 3.0 * rows + 0.4)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    top = max(float(values.max()) for values in maps.values())
    for axes in panels.flat[len(maps) :]:
        axes.set_visible(False)
    for axes, (label, values) in zip(panels.flat, maps.items(), strict=False):
        extent = (0.5, values.shape[1] + 0.5, len(values) + 0.5, 0.5)
        image = axes.imshow(
            values, aspect="auto", cmap="viridis", vmin=0, vmax=top, interpolation="nearest", extent=extent
        )
        axes.set_title(f"{label}: {100 * groups[label].final['test_accuracy']:.1f} %", fontsize=8)
        whole_numbers(axes)
    for axes in panels[-1]:
        axes.set_xlabel("epoch", fontsize=8)
    for axes in panels[:, 0]:
        axes.set_ylabel("layer", fontsize=8)
    figure.colorbar(image, ax=panels, label="quality (rad)")
    first = next(iter(groups.values())).config
    figure.suptitle(
        f"{first.network}, {first.dataset}: quality of every layer, and test accuracy", fontsize=10
    )
    return [save(figure, stem.with_suffix(".png"))]


def scatter(stem: Path, records: Sequence[Record]) -> list[Path]:
    """Figure 2: Q and the means of the other metrics against test accuracy and gap, a point per run."""
    written = []
    for dataset in dict.fromkeys(record.config.dataset for record in records):
        mine = [record for record in records if record.config.dataset == dataset]
        networks = list(dict.fromkeys(record.config.network for record in mine))
        optimizers = list(dict.fromkeys(record.config.optimizer for record in mine))
        figure = blank(9.6, 3.0 * len(AXES))
        panels = figure.subplots(len(AXES), 2, sharex="row", sharey="col")
        for row, (metric, label) in zip(panels, AXES.items(), strict=True):
            for axes, (target, said) in zip(row, TARGETS.items(), strict=True):
                for record in mine:
                    colour, marker = style_of(record.config.optimizer)
                    axes.plot(
                        record.final[metric],
                        100 * record.target(target),
                        marker,
                        color=colour,
                        fillstyle=("full", "none", "left", "top")[networks.index(record.config.network) % 4],
                        markersize=5,
                        alpha=0.8,
                    )
                found = correlation([r.final[metric] for r in mine], [r.target(target) for r in mine])
                axes.set_title(str(found) if found else "", fontsize=9)
                plain(axes, label, said)
        _optimizer_legend(figure, optimizers)
        fills = ", ".join(
            f"{kind} {name}"
            for kind, name in zip(("full:", "open:", "left:", "top:"), networks, strict=False)
        )
        figure.suptitle(f"{dataset}: one point per run ({fills})", fontsize=10)
        written.append(save(figure, stem.with_name(f"{stem.name}-{dataset}.png")))
    return written


def courses(stem: Path, records: Sequence[Record]) -> list[Path]:
    """Figure 3: Q, the other metrics and rates over the epochs; test accuracy by beta."""
    ours = [record for record in records if record.config.optimizer == "rmsgd"]
    ours = [record for record in ours if dict(record.config.settings).keys() <= {"beta", "lr"}]
    swept = {record.config.network for record in ours if "beta" in dict(record.config.settings)}
    ablation = [record for record in ours if record.config.network in swept]
    compared = [r for r in records if is_plain(r) and r.config.network not in swept]
    written = [_over_the_epochs(stem.with_suffix(".png"), compared)] if compared else []
    if ablation:
        written.append(_by_beta(stem.with_name(f"{stem.name}-beta.png"), ablation))
    return written


def _over_the_epochs(path: Path, records: Sequence[Record]) -> Path:
    """Means over the layers and seeds of every optimizer."""
    quantities = {**AXES, "learning_rate": "learning rate, mean"}
    rows = -(-len(quantities) // 2)
    figure = blank(11.0, 3.2 * rows)
    panels = figure.subplots(rows, 2)
    groups = by_label(records)
    for axes, (name, label) in zip(panels.flat, quantities.items(), strict=False):
        for optimizer, mine in groups.items():
            values = _mean([record.column(name) for record in mine])
            epochs = np.arange(1, len(values) + 1)
            colour, marker = style_of(mine[0].config.optimizer)
            marker = marker if len(values) <= 20 else ""
            axes.plot(epochs, values, color=colour, marker=marker, label=optimizer)
        plain(axes, "epoch", label)
        whole_numbers(axes)
        if name == "learning_rate":
            axes.set_yscale("log")
    for axes in panels.flat[len(quantities) :]:
        axes.set_visible(False)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=5)
    first = records[0].config
    figure.suptitle(f"{first.network}, {first.dataset}: means over the layers", fontsize=10)
    return save(figure, path)


def _by_beta(path: Path, records: Sequence[Record]) -> Path:
    """Test accuracy over the epochs for every beta."""
    default = peers.RMSGD["beta"]
    ordered = sorted(records, key=lambda record: dict(record.config.settings).get("beta", default))
    groups = grouped(ordered, lambda record: f"β = {dict(record.config.settings).get('beta', default)}")
    figure = blank(7.2, 4.2)
    axes = figure.subplots()
    for index, (label, mine) in enumerate(groups.items()):
        values = 100 * _mean([record.column("test_accuracy") for record in mine])
        colour, marker = style(index)
        epochs = np.arange(1, len(values) + 1)
        axes.plot(epochs, values, color=colour, marker=marker if len(values) <= 20 else "", label=label)
    plain(axes, "epoch", "test accuracy (%)")
    whole_numbers(axes)
    axes.legend(frameon=False)
    axes.set_title(
        f"{ordered[0].config.network}, {ordered[0].config.dataset}: momentum β of RMSGD's rates",
        fontsize=10,
    )
    return save(figure, path)


def performance(stem: Path, records: Sequence[Record]) -> list[Path]:
    """Figure 4: accuracy against time, training against test accuracy, accuracy against batch size."""
    batches: dict[tuple[str, str, str], set[int]] = {}
    for record in records:
        key = (record.config.network, record.config.dataset, record.config.optimizer)
        batches.setdefault(key, set()).add(record.config.batch)
    swept = {key for key, sizes in batches.items() if len(sizes) > 1}

    def of_sweep(record: Record) -> bool:
        return (record.config.network, record.config.dataset, record.config.optimizer) in swept

    written = []
    others = [record for record in records if not of_sweep(record)]
    for network, dataset in dict.fromkeys((r.config.network, r.config.dataset) for r in others):
        mine = [r for r in others if (r.config.network, r.config.dataset) == (network, dataset)]
        name = f"{stem.name}-{network}-{dataset}"
        curves = {label: _against_time(group) for label, group in by_label(mine).items()}
        over_time = bands_over_time(
            stem.with_name(f"{name}-time.png"),
            curves,
            ylabel="test accuracy (%)",
            xlabel="time trained, evaluation left out (s)",
            title=f"{network}, {dataset}",
        )
        written += [over_time, _gap(stem.with_name(f"{name}-gap.png"), mine)]
    if swept:
        written.append(
            _batch_sizes(stem.with_name(f"{stem.name}-batch.png"), [r for r in records if of_sweep(r)])
        )
    return written


def accuracy_dots(stem: Path, records: Sequence[Record]) -> list[Path]:
    """Test accuracy of every run, its mean and 95 % interval; a line per optimizer, a panel per cell."""
    cells = by_cell(records)
    labels = list(dict.fromkeys(record.config.label for record in records))
    columns = min(3, len(cells))
    height = -(-len(cells) // columns)
    beside = 0.06 * max(map(len, labels))  # inches that the longest label takes
    figure = blank(3.2 * columns + beside, (0.26 * len(labels) + 1.1) * height)
    panels = figure.subplots(height, columns, squeeze=False, sharey=True)
    for axes in panels.flat[len(cells) :]:
        axes.set_visible(False)
    for axes, (cell, mine) in zip(panels.flat, cells.items(), strict=False):
        for label, group in by_label(mine).items():
            row = labels.index(label)
            values = np.array([100 * record.final["test_accuracy"] for record in group])
            optimizer = group[0].config.optimizer
            # The two that are compared stand out in their colours of all figures.
            colour = style_of(optimizer)[0] if optimizer in HIGHLIGHTED else "0.55"
            axes.plot(values, [row] * len(values), ".", color=colour, markersize=5, alpha=0.5)
            low, high = mean_interval(values)
            axes.plot([low, high], [row, row], color=colour, linewidth=2)
            axes.plot([values.mean()], [row], style_of(optimizer)[1], color=colour, markersize=6)
        axes.set_title(cell, fontsize=9)
        axes.set_yticks(range(len(labels)), labels=labels, fontsize=8)
        plain(axes, "test accuracy (%)", "")
    panels[0, 0].invert_yaxis()
    return [save(figure, stem.with_suffix(".png"))]


DRAWN: Mapping[str, Callable[[Path, Sequence[Record]], list[Path]]] = {
    "fig1a": low_rank_evolution,
    "fig1b": quality_maps,
    "fig2": scatter,
    "fig3": courses,
    "fig4": performance,
}


def _against_time(records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """Seconds and test accuracy in per cent, (seeds, epochs), NaN behind the end of a run."""
    longest = max(len(record.epochs) for record in records)
    times, values = np.full((2, len(records), longest), np.nan)
    for index, record in enumerate(records):
        times[index, : len(record.epochs)] = record.seconds
        values[index, : len(record.epochs)] = 100 * record.column("test_accuracy")
    return times, values


def _gap(path: Path, records: Sequence[Record]) -> Path:
    """Training and test accuracy of every optimizer, joined by the gap between them."""
    groups = by_label(records)
    figure = blank(7.2, 0.32 * len(groups) + 1.3)
    axes = figure.subplots()
    for row, mine in enumerate(groups.values()):
        train = 100 * np.mean([record.final["train_accuracy"] for record in mine])
        test = 100 * np.mean([record.final["test_accuracy"] for record in mine])
        axes.plot([test, train], [row, row], color="0.6", zorder=0)
        axes.plot(train, row, "s", color=PALETTE[1], fillstyle="none", label="training" if row == 0 else None)
        axes.plot(test, row, "o", color=PALETTE[0], label="test" if row == 0 else None)
    axes.set_yticks(range(len(groups)), labels=list(groups), fontsize=8)
    axes.invert_yaxis()
    plain(axes, "accuracy (%)", "")
    axes.legend(frameon=False, fontsize=8)
    first = records[0].config
    axes.set_title(f"{first.network}, {first.dataset}: training and test accuracy at the end", fontsize=10)
    return save(figure, path)


def _batch_sizes(path: Path, records: Sequence[Record]) -> Path:
    figure = blank(7.2, 4.2)
    axes = figure.subplots()
    for label, mine in by_label(records).items():
        sizes = _sizes(mine)
        values = [
            100 * np.mean([r.final["test_accuracy"] for r in mine if r.config.batch == size])
            for size in sizes
        ]
        colour, marker = style_of(mine[0].config.optimizer)
        axes.plot(sizes, values, color=colour, marker=marker, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(_sizes(records), labels=map(str, _sizes(records)))
    axes.minorticks_off()
    plain(axes, "batch size", "test accuracy (%)")
    axes.legend(frameon=False)
    first = records[0].config
    axes.set_title(f"{first.network}, {first.dataset}: accuracy by batch size", fontsize=10)
    return save(figure, path)


def _sizes(records: Sequence[Record]) -> list[int]:
    return sorted({record.config.batch for record in records})


def _mean(curves: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over seeds as far as all got."""
    shortest = min(map(len, curves))
    return np.mean([curve[:shortest] for curve in curves], axis=0)


def _optimizer_legend(figure: Any, optimizers: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for name in optimizers:
        colour, marker = style_of(name)
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle="", label=name))
    figure.legend(handles=handles, frameon=False, loc="outside lower center", ncols=6, fontsize=8)
