"""The figures of the gate, each of a case over its control, and the session that decides all of them."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from bench.gate.rule import ERROR, LOOKS, Verdict, interval, judge
from bench.measure import Interval


class Source(NamedTuple):
    """A case of a process: "here" is this checkout, "there" the revision that it is compared with."""

    side: str
    case: str


class Timer(Protocol):
    """A process that holds cases."""

    def time(self, case: str) -> float:
        """Seconds of one call."""


@dataclass(frozen=True)
class Figure:
    """A product of times over a product of times.

    Attributes:
        name: its key in the baseline.
        text: its name for people.
        above: the cases whose times are multiplied in the numerator.
        below: the cases whose times are multiplied in the denominator.
        tolerance: how far above its expected value it may lie, as a fraction, unless the baseline's own
            spread was larger.

    """

    name: str
    text: str
    above: tuple[Source, ...]
    below: tuple[Source, ...]
    tolerance: float


def here_over(name: str, text: str, case: str, control: str, tolerance: float) -> Figure:
    """A case of this checkout over its control."""
    return Figure(name, text, (Source("here", case),), (Source("here", control),), tolerance)


def against(figure: Figure) -> Figure:
    """A figure of this checkout over the same figure of the other revision.

    The controls stay in it, since the layout of a process's memory shifts a case and its control alike, and
    two processes differently.
    """
    above, below = (
        tuple(source._replace(side="there") for source in sources) for sources in (figure.above, figure.below)
    )
    text = f"{figure.name}, here / there"
    return Figure(figure.name, text, figure.above + below, figure.below + above, figure.tolerance)


TOLERANCE = 0.05
"""Half of the slow-down that must be caught: midway between an unchanged figure and a slowed one."""

WIDER = 0.08
"""The tolerance for many small tensors, where processes differ by 2 % and rounds by more."""

ONLY_THE_WORST = 0.5
"""The tolerance for a control of another kind than its case: a busy neighbour alone moves it by a fifth."""

# A busy neighbour slows every kind of work by another factor: in one pair of runs Gram products by 16 %,
# LAPACK's reductions by 43 %, a copy by 2 %. With a core for each process, CPU time and wall time agreed, so
# wall time is read, which also counts waits. A control of the same kind as its case helps: fused SGD on the
# same tensors, and the same spectra by torch. Over six processes a busy neighbour moved the first ratio
# (resnet18) by 0.1 % and the last by 1 %. Single runs of the gate lie within 3 % of the baseline.
FIGURES = (
    here_over("step", "step, resnet18 / fused SGD", "step", "sgd", TOLERANCE),
    here_over(
        "step-many-tensors",
        "step, mobilenetv2 / fused SGD",
        "step-many-tensors",
        "sgd-many-tensors",
        WIDER,
    ),
    here_over("epoch-end", "epoch end / torch's spectra", "epoch-end", "spectra", TOLERANCE),
)

# These watch the controls: if torch's SGD became much slower, it would hide a slower step.
OF_CONTROLS = (
    here_over("step-to-copy", "step, resnet18 / copy", "step", "copy", ONLY_THE_WORST),
    here_over("epoch-end-to-gram", "epoch end / Gram products", "epoch-end", "gram", ONLY_THE_WORST),
)


def target_figure(target: str) -> Figure:
    """The figure of the user's step over the same step with SGD."""
    return here_over(f"target {target}", f"{target} / SGD", "target", "target-sgd", TOLERANCE)


NOTHING_YET = Interval(math.nan, 0.0, math.inf)


@dataclass
class Finding:
    """A figure with its limit, a log ratio per round so far, and the verdict on them."""

    figure: Figure
    expected: float
    limit: float
    logs: list[float] = field(default_factory=list)
    measured: Interval = NOTHING_YET
    verdict: Verdict = Verdict.UNDECIDED

    @property
    def change(self) -> float:
        """How much slower than expected, as a fraction."""
        return self.measured.median / self.expected - 1


@dataclass
class Session:
    """Times rounds until every figure is decided or the time is up.

    A round times every figure that is still open, in an order that is drawn anew.
    """

    timers: Mapping[str, Timer]
    findings: Sequence[Finding]
    order: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def run(self, limit_s: float, on_progress: Callable[[float], object] = lambda share: None) -> None:
        """Times and decides; `on_progress` gets the share of the time that has passed."""
        start = time.perf_counter()
        for look in range(1, LOOKS + 1):
            # There is at least one round, since a look without new data would only spend its share of the
            # error.
            while True:
                self._round()
                passed = (time.perf_counter() - start) / limit_s
                on_progress(min(passed, 1.0))
                if passed >= look / LOOKS:
                    break
            if not self._look(ERROR / LOOKS):
                return

    def collect(self, seconds: float) -> None:
        """Times rounds for `seconds`, at least one, and looks once, at the end."""
        end = time.perf_counter() + seconds
        self._round()
        while time.perf_counter() < end:
            self._round()
        self._look(ERROR)

    def _look(self, error: float) -> list[Finding]:
        """Judges the open findings at this error, and returns those that stay open."""
        for finding in self._open():
            finding.measured = interval(finding.logs, error)
            finding.verdict = judge(finding.measured, finding.limit)
        return self._open()

    def _open(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.verdict is Verdict.UNDECIDED]

    def _round(self) -> None:
        open_findings = self._open()
        for index in self.order.permutation(len(open_findings)):
            finding = open_findings[index]
            finding.logs.append(self._log_ratio(finding.figure))

    def _log_ratio(self, figure: Figure) -> float:
        """The logarithm of the figure, from times taken within a fraction of a second.

        The sources are timed forth and back (A B B A), so that a steady drift affects all of them alike.
        Which of them comes first is drawn anew.
        """
        sources = [*figure.above, *figure.below]
        way = self.order.permutation(len(sources))
        seconds = [0.0] * len(sources)
        for index in (*way, *reversed(way)):
            side, case = sources[index]
            seconds[index] += self.timers[side].time(case)
        logs = np.log(seconds)
        above = len(figure.above)
        return float(logs[:above].sum() - logs[above:].sum())
