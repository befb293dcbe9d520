"""The probe's page: one HTML file with a sortable table and the spectrum of every layer."""

import math
import os
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rmsgd._version import __version__
from rmsgd.backends.spectra import measure_spectra
from rmsgd.extras import install_command
from rmsgd.inspection.measuring import ProbeSource
from rmsgd.inspection.probing import Probing
from rmsgd.inspection.report.report import Report
from rmsgd.inspection.report.text import metric_text, shape_text, summary
from rmsgd.inspection.selection import Selection
from rmsgd.layers import Unfolding, unfoldings
from rmsgd.metrics import METRICS, NETWORK_QUALITY, LayerMetrics, Metric
from rmsgd.plots import PALETTE
from rmsgd.reference import shrink, threshold

_POINTS = 200  # the most points of a curve that a chart of this size can show
_SMALLEST = 1e-300  # below this a chart's axis has no round numbers in float64
_WIDTH, _HEIGHT = 400, 200  # the size of a chart's plane, in px


class Curve(NamedTuple):
    """Points of a chart in the form of SVG, in px."""

    points: str
    end: tuple[float, float]


class Chart(NamedTuple):
    """The singular values of one unfolding over their index, with the noise threshold."""

    mode: str
    L: int
    M: int
    rank: int
    threshold: float
    values: Curve
    shrunk: Curve | None
    threshold_y: float
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]


def write_page(
    report: Report,
    source: ProbeSource,
    path: str | os.PathLike[str],
    progress: Callable[[float], object] | None = None,
    key: str | None = None,
) -> None:
    """Write the page of a report. Spectra are computed anew from the ``source`` and ``key`` that were probed.

    Raises:
        ModuleNotFoundError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        message = f"the page needs jinja2: {install_command('plot')}"
        raise ModuleNotFoundError(message, name="jinja2") from error
    probing = Probing(source, Selection(key=key))
    rows = []
    for index, layer in enumerate(report.measured):
        rows.append((layer, _sort_keys(index, layer), charts(layer, probing.weight(layer.name))))
        if progress:
            progress((index + 1) / len(report.measured))
    bars = [metric for metric in METRICS if not metric.per_mode]
    largest = {metric.name: _longest_bar(metric, report.measured) for metric in bars}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(shape=shape_text)
    environment.globals.update(metric_text=metric_text, bar=lambda m, layer: _bar(m, layer, largest[m.name]))
    page = environment.get_template("probe.html").render(
        title=os.fspath(source) if isinstance(source, str | os.PathLike) else type(source).__name__,
        summary=summary(report.layers),
        rows=rows,
        skipped=[layer for layer in report.layers if layer.skipped is not None],
        errors=report.errors,
        notes=report.notes,
        metrics=METRICS,
        explained=(*METRICS, NETWORK_QUALITY),
        colours={m.name: colour for m, colour in zip(bars, cycle(PALETTE), strict=False)},
        width=_WIDTH,
        height=_HEIGHT,
        version=__version__,
    )
    Path(path).write_text(page, encoding="utf-8")


def _longest_bar(metric: Metric, layers: Sequence[LayerMetrics]) -> float:
    values = (getattr(layer, metric.name) for layer in layers)
    return max((value for value in values if math.isfinite(value)), default=0.0)


def _bar(metric: Metric, layer: LayerMetrics, longest: float) -> float:
    """How long a bar is, in percent of its column: none for what is undefined, infinite or below 0."""
    value = getattr(layer, metric.name)
    return round(100.0 * value / longest, 1) if 0.0 < value <= longest else 0.0


def _sort_keys(index: int, layer: LayerMetrics) -> list[float]:
    """The numbers by which the table is sorted, one per column. NaN, which JSON does not have, goes first."""
    values = (getattr(layer, metric.name) for metric in METRICS)
    numbers = (sum(v) / len(v) if isinstance(v, tuple) else v for v in values)
    return [index, math.prod(layer.shape), *(float(np.nan_to_num(v, nan=-1e308)) for v in numbers)]


def charts(layer: LayerMetrics, weight: Tensor) -> list[Chart]:
    """A chart for every unfolding of a measured layer, whose weight has two to five dimensions.

    Weights whose singular values or noise variance float64 cannot hold have none.
    """
    result = []
    first = 0  # index of the unfolding's first mode among the layer's
    found = unfoldings(weight.shape)
    _, gammas = measure_spectra([(weight, unfolding) for unfolding in found], "half")
    for unfolding, gamma in zip(found, gammas, strict=True):
        values = gamma.cpu().numpy()
        largest, variance = float(values[0]), layer.noise_variance[first]
        if math.isfinite(largest) and math.isfinite(variance) and not 0.0 < largest < _SMALLEST:
            result.append(_chart(values, unfolding, layer.rank[first], variance))
        first += len(unfolding.modes)
    return result


def _chart(gamma: NDArray[np.float64], unfolding: Unfolding, rank: int, variance: float) -> Chart:
    L, M = unfolding.L, unfolding.M
    limit = math.sqrt(M * threshold(L, M)[2] * variance)
    top = max(float(gamma[0]), limit) * 1.05 or 1.0
    shrunk = None
    if rank:
        c = gamma[:rank] ** 2 / M
        shrunk = _curve(gamma[:rank] * shrink(c, variance, L, M), L, top)
    return Chart(
        " and ".join(unfolding.modes),
        L,
        M,
        rank,
        limit,
        _curve(gamma, L, top),
        shrunk,
        _y(limit, top),
        [(_x(h, L), str(h)) for h in (1, L) if L > 1] + [(_x(rank, L), str(rank))] * (1 < rank < L),
        [(_y(tick, top), f"{tick:g}") for tick in _round_ticks(top)],
    )


def _curve(values: NDArray[np.float64], L: int, top: float) -> Curve:
    # All of the first values, where the signal is, and then as many as the eye can separate.
    last = len(values)
    head = np.arange(min(last, _POINTS // 2))
    chosen = np.unique(np.concatenate([head, np.linspace(0, last - 1, min(last, _POINTS)).astype(int)]))
    points = [(_x(h + 1, L), _y(float(values[h]), top)) for h in chosen.tolist()]
    return Curve(" ".join(f"{x:.1f},{y:.1f}" for x, y in points), points[-1])


def _x(h: int, L: int) -> float:
    return round((h - 1) / max(L - 1, 1) * _WIDTH, 1)


def _y(value: float, top: float) -> float:
    return round((1.0 - value / top) * _HEIGHT, 1)


def _round_ticks(top: float) -> list[float]:
    """Zero and two to five round numbers up to ``top``."""
    power = 10.0 ** math.floor(math.log10(top))
    step = next(s * power for s in (0.2, 0.5, 1.0, 2.0) if top / (s * power) <= 5)
    return [i * step for i in range(int(top / step) + 1)]
