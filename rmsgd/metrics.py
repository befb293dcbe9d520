"""The metrics of a network's weights: each is declared once, here, and every view reads its declaration.

A new metric is a field of ``LayerMetrics``, an entry of ``METRICS``, and the place that computes it: a column
of the backends' table (``csrc/evbmf/metrics.h``, ``reference.py``), ``of_values``, a function of all singular
values, or ``derive``, a function of the metrics before it. Tables, CSV, JSON, figures, the page, comparisons
and logs follow.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rmsgd import reference
from rmsgd.backends import base
from rmsgd.layers import unfoldings


@dataclass(frozen=True)
class Metric:
    """The names of a metric, its meaning, and the format of its values."""

    name: str
    """Its name in code: field of ``LayerMetrics``, column of a CSV file, key in JSON and in logs."""
    label: str
    """Its name on the axis of a figure."""
    heading: str
    """Its name over the column of a table."""
    symbol: str
    formula: str
    """How it follows from the shrunk singular values d₁ >= ... >= dᵣ of a matrix L x M, L <= M."""
    meaning: str
    """What the number means, in three or four words, with its unit."""
    range: str
    better: Literal["higher", "lower"] | None
    """Which direction goes with better learning, according to the paper; None where neither does."""
    format: str
    """The format of its values in Python."""
    help: str
    """One sentence for readers who do not know it."""
    column: int | None = None
    """Its column in the table of the backends, which has a row per matrix; None where it is derived."""
    derive: Callable[[Mapping[str, float]], float] | None = None
    """Computes it from the metrics that are declared before it; None where it has a column."""
    of_values: Callable[[NDArray[np.float64]], float] | None = None
    """Computes it from all singular values of a matrix, (L,) descending. A probe has it; an epoch end, which
    would have to find all of them, has not."""
    per_mode: bool = False
    """Whether a layer has one number per mode instead of their mean."""
    shown: bool = True
    """Whether tables for the terminal, figures and comparisons have it; files and the page always do."""

    def text(self, value: float) -> str:
        """A value in the format of tables; "-" for NaN, which stands for undefined or not measured."""
        return "-" if math.isnan(value) else f"{value:{self.format}}"


RANK = Metric(
    "rank",
    label="rank",
    heading="rank",
    symbol="r",
    formula="number of singular values above the noise threshold of EVBMF",
    meaning="number of directions",
    range="0 to L",
    better=None,
    format="d",
    help="How many directions of the weight stand out from its noise.",
    column=base.RANK,
    per_mode=True,
)
STABLE_RANK = Metric(
    "stable_rank",
    label="stable rank",
    heading="stable rank",
    symbol="s",
    formula="Σ dᵢ² / (L d₁²)",
    meaning="share of full rank",
    range="0 to 1",
    better="higher",
    format=".4f",
    help="The energy of the low-rank part over that of a matrix whose L values all equal its largest; 0 "
    "where nothing stands out from the noise.",
    column=base.STABLE_RANK,
)
CONDITION_NUMBER = Metric(
    "condition_number",
    label="condition number",
    heading="condition",
    symbol="κ",
    formula="1 − dᵣ / d₁",
    meaning="1 − smallest/largest",
    range="0 to 1",
    better="lower",
    format=".4f",
    help="How far the smallest singular value of the low-rank part lies below its largest; 1 where nothing "
    "stands out from the noise.",
    column=base.CONDITION_NUMBER,
)
QUALITY = Metric(
    "quality",
    label="quality",
    heading="quality",
    symbol="q",
    formula="arctan(s / κ)",
    meaning="angle in rad",
    range="0 to π/2",
    better="higher",
    format=".4f",
    help="Large where the stable rank is high and the condition number low; 0 where nothing stands out from "
    "the noise.",
    derive=lambda known: reference.quality(known["stable_rank"], known["condition_number"]),
)
NOISE_VARIANCE = Metric(
    "noise_variance",
    label="noise variance",
    heading="noise variance",
    symbol="σ²",
    formula="global minimiser of the free energy of EVBMF",
    meaning="per entry, in squared units of the weight",
    range="0 to the mean square of the entries",
    better=None,
    format=".2e",
    help="The variance of what is left of an entry when the low-rank part is taken away.",
    column=base.NOISE_VARIANCE,
    per_mode=True,
)

TAIL_EXPONENT = Metric(
    "tail_exponent",
    label="tail exponent",
    heading="tail",
    symbol="α",
    formula="1 + n / Σ ln(λⱼ / λₙ) over the n = L − ⌊L/2⌋ largest eigenvalues λⱼ = γⱼ²",
    meaning="exponent of a power law",
    range="1 to ∞",
    better=None,
    format=".2f",
    help="How fast the eigenvalues of the whole weight thin out towards the largest, by Hill's estimate over "
    "their upper half, as TempBalance takes it. A few large ones make it small.",
    of_values=reference.hill_alpha,
)
FULL_STABLE_RANK = Metric(
    "full_stable_rank",
    label="stable rank of the whole weight",
    heading="full stable rank",
    symbol="‖W‖_F² / ‖W‖₂²",
    formula="Σ γⱼ² / γ₁² over all singular values γⱼ of the weight",
    meaning="number of directions",
    range="1 to L",
    better=None,
    format=".2f",
    help="The energy of the whole weight, noise included, over that of its strongest direction; "
    "WeightWatcher's stable_rank.",
    of_values=reference.full_stable_rank,
    shown=False,
)
LOG_SPECTRAL_NORM = Metric(
    "log_spectral_norm",
    label="log spectral norm",
    heading="log spectral norm",
    symbol="log₁₀ λ₁",
    formula="log₁₀ γ₁² of the largest singular value γ₁ of the weight",
    meaning="decades, in squared units of the weight",
    range="-∞ to ∞",
    better=None,
    format=".2f",
    help="How strong the strongest direction of the weight is, as WeightWatcher writes it.",
    of_values=reference.log_spectral_norm,
    shown=False,
)

METRICS = (
    RANK,
    STABLE_RANK,
    CONDITION_NUMBER,
    QUALITY,
    NOISE_VARIANCE,
    TAIL_EXPONENT,
    FULL_STABLE_RANK,
    LOG_SPECTRAL_NORM,
)
"""The metrics of a layer, in the order of tables."""
SHOWN = tuple(metric for metric in METRICS if metric.shown)
"""The columns of tables for the terminal."""
SCALARS = tuple(metric for metric in SHOWN if not metric.per_mode)
"""The metrics of which a layer has one number. They are drawn and compared."""
AT_EPOCH_ENDS = tuple(metric for metric in SCALARS if metric.of_values is None)
"""The metrics that an epoch end measures. They are logged."""
AVERAGED = tuple(metric for metric in SCALARS if metric is not QUALITY)
"""The metrics whose mean over the layers describes a network. The quality is part of Q instead."""

NETWORK_QUALITY = Metric(
    "quality",
    label="Q of the network",
    heading="Q",
    symbol="Q",
    formula="Σ q² / √layers",
    meaning="rad² √layers",
    range="0 to π²/4 √layers",
    better="higher",
    format=".4f",
    help="How well all layers together have learned; compare it only between networks of one architecture.",
)
"""The metric of a whole network."""


@dataclass(frozen=True)
class LayerMetrics:
    """The metrics of one weight by EVBMF; ``METRICS`` says what each number is.

    ``rank`` (a number of singular values, 0 to L) and ``noise_variance`` (per entry, in squared units of the
    weight) have one entry per mode. ``stable_rank`` (Eq. 2, 0 to 1) and ``condition_number`` (Eq. 3, 0 to 1)
    are the means over the modes, and ``quality`` is ``arctan(stable_rank / condition_number)`` (Eq. 4, 0 to
    pi/2, in rad). A skipped layer has no modes, NaN metrics and the reason in ``skipped``. Two layers are
    equal if all their fields are; a number that is undefined, NaN, is equal to another such number.
    """

    name: str
    """The key under which the weight is stored."""
    shape: tuple[int, ...]
    modes: tuple[str, ...]
    """("in", "out") for a kernel, as far as they have a spectrum; ("matrix",) for a 2-D weight."""
    rank: tuple[int, ...]
    noise_variance: tuple[float, ...]
    stable_rank: float
    condition_number: float
    quality: float
    tail_exponent: float = math.nan
    """NaN where not all singular values were looked for, as at an epoch end; so are the next two."""
    full_stable_rank: float = math.nan
    log_spectral_norm: float = math.nan
    skipped: str | None = None
    """Why the weight was not measured; None where it was."""

    def _comparable(self) -> tuple[object, ...]:
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(None if isinstance(x, float) and math.isnan(x) else x for x in values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LayerMetrics) and self._comparable() == other._comparable()

    def __hash__(self) -> int:
        return hash(self._comparable())

    @classmethod
    def from_rows(
        cls,
        name: str,
        shape: tuple[int, ...],
        rows: Sequence[Sequence[float]],
        gammas: Sequence[NDArray[np.float64]] = (),
    ) -> "LayerMetrics":
        """A layer from its rows, (FIELDS,) each, of a metrics table (``backends.base``), one per unfolding.

        ``gammas`` are all singular values of these unfoldings, if they are known.

        An empty low rank has quality 0. A layer is skipped if its weight has a NaN or an Inf, or if the
        weight was changed while it was measured.
        """
        if reason := base.why_not_measured(rows):
            return cls.skip(name, shape, reason)
        # A 1 x 1 kernel's two modes share one spectrum.
        modes = [
            (mode, row, gamma)
            for row, gamma, u in zip(rows, gammas or rows, unfoldings(shape), strict=True)
            for mode in u.modes
        ]
        values: dict[str, Any] = {}
        for metric in METRICS:
            if metric.derive is not None:
                values[metric.name] = metric.derive(values)
                continue
            if metric.of_values is not None:
                if not gammas:
                    continue  # the field's default
                column = [metric.of_values(np.asarray(gamma)) for _, _, gamma in modes]
            else:
                assert metric.column is not None
                column = [row[metric.column] for _, row, _ in modes]
            if metric.per_mode:
                values[metric.name] = tuple(map(int, column)) if metric.format == "d" else tuple(column)
            else:
                values[metric.name] = sum(column) / len(column)
        return cls(name, shape, tuple(mode for mode, *_ in modes), **values)

    @classmethod
    def skip(cls, name: str, shape: tuple[int, ...], reason: str) -> "LayerMetrics":
        """Make a skipped layer: it has no modes, NaN metrics and ``reason`` in ``skipped``."""
        values: dict[str, Any] = {metric.name: () if metric.per_mode else math.nan for metric in METRICS}
        return cls(name, shape, (), **values, skipped=reason)

    def to_dict(self) -> dict[str, Any]:
        """The fields in JSON's types: lists for tuples, None for NaN and Inf; see ``METRICS`` for units."""
        return {key: plain(value) for key, value in vars(self).items()}


def plain(value: Any) -> Any:
    """A value in JSON's types: None for NaN, which stands for undefined, and for Inf; a list for a tuple."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [plain(entry) for entry in value] if isinstance(value, tuple) else value


def measured(layers: Sequence[LayerMetrics]) -> tuple[LayerMetrics, ...]:
    """The layers that were not skipped."""
    return tuple(layer for layer in layers if layer.skipped is None)


def network_quality(layers: Sequence[LayerMetrics]) -> float:
    """Q of a network, ``||q||_2^2 / sqrt(layers)`` over the layers that were measured (Eq. 5).

    It lies in 0 to pi^2/4 sqrt(layers), where 0 means that the network has learned nothing. It is NaN if no
    layer was measured, since then nothing is known of the network.
    """
    return reference.network_quality([layer.quality for layer in measured(layers)])


def mean(metric: Metric, layers: Sequence[LayerMetrics]) -> float:
    """The mean of one of ``SCALARS``, in its unit, over the layers of which it is known; NaN without any."""
    values = [value for layer in measured(layers) if not math.isnan(value := getattr(layer, metric.name))]
    return float(sum(values) / len(values)) if values else math.nan
