"""What the gate times: which case over which control, and the session that decides all of them."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from bench.gate.rule import ERROR, LOOKS, Verdict, interval, judge
from bench.measure import Interval


class Source(NamedTuple):
    """A case of a process: "here" is this checkout, "there" the revision it is held against."""

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
        text: what it is, for people.
        above: whose times are multiplied above the line.
        below: and below it.
        tolerance: how far above what is expected it may lie, as a fraction, unless the baseline's own
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
    """A figure of this checkout over the same figure there.

    The controls stay in: how the memory of a process happens to be laid out moves a case and its control
    alike, and two processes differently.
    """
    above, below = (
        tuple(source._replace(side="there") for source in sources) for sources in (figure.above, figure.below)
    )
    text = f"{figure.name}, here / there"
    return Figure(figure.name, text, figure.above + below, figure.below + above, figure.tolerance)


TOLERANCE = 0.05
"""Half of the slow-down that has to be caught: as far from an unchanged figure as from a slowed one."""

WIDER = 0.08
"""For many small tensors: processes differ by 2 %, and rounds by more."""

ONLY_THE_WORST = 0.5
"""For a control of another kind than its case: a busy neighbour alone moves such a ratio by a fifth."""

# A busy neighbour slows whatever computes, each kind of work by another factor: in one pair of runs Gram
# products by 16 %, LAPACK's reductions by 43 %, a copy by 2 %. With a core for each, the processor's own
# clock said the same as the one on the wall, so the wall's is read, which also sees waits. What helps is a
# control of the same kind: fused SGD on the same tensors, and the same spectra by torch. Over six processes
# a neighbour that computes moved the first ratio (resnet18) by 0.1 % and the last by 1 %; single runs of
# the gate lie within 3 % of the baseline.
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

# These watch the controls: a torch whose SGD became much slower would hide a step that did.
OF_CONTROLS = (
    here_over("step-to-copy", "step, resnet18 / copy", "step", "copy", ONLY_THE_WORST),
    here_over("epoch-end-to-gram", "epoch end / Gram products", "epoch-end", "gram", ONLY_THE_WORST),
)


def target_figure(target: str) -> Figure:
    """The caller's own step against the same step with SGD."""
    return here_over(f"target {target}", f"{target} / SGD", "target", "target-sgd", TOLERANCE)


NOTHING_YET = Interval(math.nan, 0.0, math.inf)


@dataclass
class Finding:
    """A figure with its limit, and what has been found so far: a log ratio per round, and what it says."""

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

    In a round every figure that is still open has its turn, in an order that is drawn anew.
    """

    timers: Mapping[str, Timer]
    findings: Sequence[Finding]
    order: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def run(self, limit_s: float, on_progress: Callable[[float], object] = lambda share: None) -> None:
        """Decides; `on_progress` is told the share of the time that has passed."""
        start = time.perf_counter()
        for look in range(1, LOOKS + 1):
            # At least one round: a look without news would only spend its share of the error.
            while True:
                self._round()
                passed = (time.perf_counter() - start) / limit_s
                on_progress(min(passed, 1.0))
                if passed >= look / LOOKS:
                    break
            if not self._look(ERROR / LOOKS):
                return

    def collect(self, seconds: float) -> None:
        """Times rounds for so long, at least one, and looks once, at the end."""
        end = time.perf_counter() + seconds
        self._round()
        while time.perf_counter() < end:
            self._round()
        self._look(ERROR)

    def _look(self, error: float) -> list[Finding]:
        """Judges the open findings at this error; returns those that stay open."""
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
        """Log of the figure from times taken within a fraction of a second.

        The sources are timed one way and back again (A B B A), so that what changes steadily meanwhile
        meets all of them alike; which comes first is drawn anew.
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
