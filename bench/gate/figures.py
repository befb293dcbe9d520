"""What the gate times: which case over which control, and the session that decides all of them."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from bench.gate.rule import ERROR, LOOKS, Verdict, interval, judge, log_ratio
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
    """A ratio of times.

    Attributes:
        name: its key in the baseline.
        text: what it is, for people.
        above: whose times are added up above the line.
        below: and below it.
        tolerance: how far above the baseline it may lie, as a fraction, unless the baseline's own spread
            was larger.

    """

    name: str
    text: str
    above: tuple[Source, ...]
    below: tuple[Source, ...]
    tolerance: float

    @property
    def sources(self) -> set[Source]:
        """Everything that has to be timed for it."""
        return {*self.above, *self.below}


def _here(*cases: str) -> tuple[Source, ...]:
    return tuple(Source("here", case) for case in cases)


TOLERANCE = 0.05
"""Half of the slow-down that has to be caught: as far from an unchanged figure as from a slowed one."""

# Gram products alone do not slow down as an epoch end does when the machine is busy elsewhere: products
# wait for the arithmetic units, tridiagonal reductions for memory and for each other. With torch's
# eigenvalues of the same matrices the control has the same mix. The two figures with the plain controls
# watch the controls themselves: a torch whose SGD got slower would hide a slower step.
FIGURES = (
    Figure("step", "step, resnet18 / fused SGD", _here("step"), _here("sgd"), TOLERANCE),
    Figure(
        "step-many-tensors",
        "step, mobilenetv2 / fused SGD",
        _here("step-many-tensors"),
        _here("sgd-many-tensors"),
        TOLERANCE,
    ),
    Figure("step-to-copy", "step, resnet18 / copy", _here("step"), _here("copy"), 0.25),
    Figure(
        "epoch-end",
        "epoch end / torch's spectra",
        _here("epoch-end"),
        _here("gram", "eigenvalues"),
        TOLERANCE,
    ),
    Figure("epoch-end-to-gram", "epoch end / Gram products", _here("epoch-end"), _here("gram"), 0.25),
)
AGAINST = tuple(
    Figure(name, f"{text} / there", (Source("here", name),), (Source("there", name),), TOLERANCE)
    for name, text in (
        ("step", "step, resnet18"),
        ("step-many-tensors", "step, mobilenetv2"),
        ("epoch-end", "epoch end"),
    )
)


def target_figure(target: str) -> Figure:
    """The caller's own step against the same step with SGD."""
    return Figure(f"target {target}", f"{target} / SGD", _here("target"), _here("target-sgd"), TOLERANCE)


def target_against(target: str) -> Figure:
    """The caller's own step here against the same step with the other revision's optimizer."""
    here, there = (Source("here", "target"),), (Source("there", "target"),)
    return Figure(f"target {target}", f"{target} / there", here, there, TOLERANCE)


NOTHING_YET = Interval(math.nan, 0.0, math.inf)


@dataclass
class Finding:
    """A figure with its limit, and what has been found so far."""

    figure: Figure
    expected: float
    limit: float
    measured: Interval = NOTHING_YET
    verdict: Verdict = Verdict.UNDECIDED
    rounds: int = 0

    @property
    def change(self) -> float:
        """How much slower than expected, as a fraction."""
        return self.measured.median / self.expected - 1


@dataclass
class Session:
    """Times rounds until every figure is decided or the time is up.

    Every round times each source that is still needed once, in an order drawn anew: two sources of one
    figure lie milliseconds apart, and neither always follows the same neighbour.
    """

    timers: Mapping[str, Timer]
    findings: Sequence[Finding]
    seconds: dict[Source, list[float]] = field(default_factory=dict)

    def run(self, limit_s: float, on_progress: Callable[[float], object] = lambda share: None) -> None:
        """Decides; `on_progress` is told the share of the time that has passed."""
        order = np.random.default_rng(0)
        start = time.perf_counter()
        for look in range(1, LOOKS + 1):
            # At least one round: a look without news would only spend its share of the error.
            while True:
                self._round(order)
                passed = (time.perf_counter() - start) / limit_s
                on_progress(min(passed, 1.0))
                if passed >= look / LOOKS:
                    break
            if not self.look(ERROR / LOOKS):
                return

    def collect(self, seconds: float) -> None:
        """Times rounds for so long and judges nothing."""
        order = np.random.default_rng(0)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            self._round(order)
        self.look(ERROR)

    def look(self, error: float) -> list[Finding]:
        """Updates the open findings at this error; returns those that stay open."""
        for finding in self._open():
            above, below = (
                [self.seconds[source] for source in sources]
                for sources in (finding.figure.above, finding.figure.below)
            )
            logs = log_ratio(above, below)
            finding.rounds = len(logs)
            finding.measured = interval(logs, error)
            finding.verdict = judge(finding.measured, finding.limit)
        return self._open()

    def _open(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.verdict is Verdict.UNDECIDED]

    def _round(self, order: np.random.Generator) -> None:
        needed = sorted(set().union(*(finding.figure.sources for finding in self._open())))
        for index in order.permutation(len(needed)):
            source = needed[index]
            self.seconds.setdefault(source, []).append(self.timers[source.side].time(source.case))
