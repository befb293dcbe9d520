"""The losses of a GPT with every rule, as a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.layer_rates.language import EVERY
from bench.plots import save, span, style
from bench.study.statistics import paired
from rmsgd.plots import blank, plain


def losses(path: Path, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """Draws the training losses over the steps, and what every variant's has over that of AdamW.

    The left panel has means over the seeds. The right one has means of the differences of the same seeds,
    with 95 % intervals; its axis spans what is reached in the second half of the runs.

    Args:
        path: the file to write.
        found: for every variant its runs, one per seed and in the order of the seeds, as `language.runs`
            returns them. At least two seeds are needed for intervals.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.

    """
    figure = blank(10.4, 4.4)
    left, right = figure.subplots(1, 2)
    reference = _curves(found["adamw"])
    steps = EVERY * np.arange(1, reference.shape[1] + 1)
    late: list[float] = []
    for index, (name, of_seeds) in enumerate(found.items()):
        colour, _ = style(index)
        curves = _curves(of_seeds)
        left.plot(steps, curves.mean(0), color=colour, linewidth=1.6, label=name)
        if name == "adamw":
            right.axhline(0, color=colour, linewidth=1.6)
        elif len(curves) > 1:
            points = [paired(ours, theirs) for ours, theirs in zip(curves.T, reference.T, strict=True)]
            mean, low, high = (np.array([point[i] for point in points]) for i in range(3))
            right.plot(steps, mean, color=colour, linewidth=1.6)
            right.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
            late += [*low[len(low) // 2 :], *high[len(high) // 2 :]]
    # The first losses of all are those of random weights: they would hide what differs at the end.
    later = reference[:, len(steps) // 4 :]
    left.set_ylim(later.min() - 0.1, later.max() + 0.3)
    span(right, late)
    plain(left, "step", "training loss (nats per byte)")
    left.set_title("mean over the seeds", fontsize=10)
    plain(right, "step", "training loss minus AdamW's (nats per byte)")
    right.set_title("the same seeds compared: mean and 95 % interval", fontsize=10)
    figure.legend(frameon=False, loc="outside lower center", ncols=len(found), fontsize=8)
    return save(figure, path)


def _curves(of_seeds: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The training losses of all seeds, (seeds, points)."""
    return np.array([one["training"] for one in of_seeds], dtype=np.float64)
