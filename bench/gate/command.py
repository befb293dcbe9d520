"""The command line of the gate: modes, table, JSON and exit status."""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table
from scipy import stats

from bench import arguments, measure, output, terminal
from bench.gate import baseline as baselines
from bench.gate import callgrind, trial
from bench.gate.baseline import Baseline
from bench.gate.figures import FIGURES, OF_CONTROLS, Figure, Finding, Session, target_figure
from bench.gate.figures import against as here_over_there
from bench.gate.processes import ROOT, GateError, Worker, built
from bench.gate.rule import Verdict
from rmsgd import backends

SCHEMA = "rmsgd-bench-gate-run/1"
PASSED, SLOWER, UNDECIDED = 0, 1, 2
BASELINE = ROOT / "bench" / "baseline.json"
LONGEST_S = 35.0
AGAINST_S = 120.0  # a round times both sides with their controls, and two processes have more noise
LIMIT = 1.05
LAUNCHES = 7
LAUNCH_S = 9.0
INTERRUPTED = 130


@dataclass
class Report:
    """The findings of a run, and its verdict."""

    machine: Mapping[str, Any]
    findings: list[Finding] = field(default_factory=list)
    counts: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def reasons(self) -> list[str]:
        """Every regression, in words."""
        slower = [
            f"{finding.figure.text} takes {finding.change:.1%} more than expected "
            f"(limit {finding.limit / finding.expected - 1:.1%})"
            for finding in self.findings
            if finding.verdict is Verdict.SLOWER
        ]
        more = [
            f"{c['name']}: {c['here']}, {c['expected']} expected"
            for c in self.counts
            if c["verdict"] == "more"
        ]
        return slower + more

    @property
    def status(self) -> int:
        """The exit status."""
        if self.reasons:
            return SLOWER
        open_ = any(finding.verdict is Verdict.UNDECIDED for finding in self.findings)
        return UNDECIDED if open_ else PASSED

    def as_json(self) -> dict[str, Any]:
        """The whole report as plain values."""
        return {
            "schema": SCHEMA,
            "exit": self.status,
            "reasons": self.reasons,
            "notes": self.notes,
            "machine": self.machine,
            "seconds": self.seconds,
            "figures": [
                {
                    "name": finding.figure.name,
                    "ratio": finding.measured._asdict(),
                    "expected": finding.expected,
                    "limit": finding.limit,
                    "verdict": finding.verdict.value,
                    "rounds": len(finding.logs),
                }
                for finding in self.findings
            ],
            "counts": self.counts,
        }


def main(given: Sequence[str]) -> int:
    """Judges, or with --update measures what later runs are judged against.

    Returns:
        0: nothing got slower. 1: something did, and the output says what and by how much. 2: the gate could
            not decide, or the arguments are wrong. 130: it was interrupted.

    """
    options = _options(given)
    options.seconds = options.seconds or (AGAINST_S if options.against else LONGEST_S)
    errors = Console(stderr=True)
    if options.self_test:
        output.check(options.out, options.readme, ["gate"])
    elif options.update:
        output.check_file(options.baseline or BASELINE)
    start = time.perf_counter()
    try:
        check_core()
        report = Report(describe(options.threads))
        if options.self_test:
            return self_test(options, report.machine)
        if options.update:
            return update(options, report.machine, errors)
        with progress(errors) as bar:
            (against if options.against else judge)(options, report, bar)
    except GateError as error:
        if options.json:
            print(json.dumps({"schema": SCHEMA, "exit": UNDECIDED, "reasons": [str(error)]}))
        terminal.say(f"bench gate: {error}", errors)
        return UNDECIDED
    except KeyboardInterrupt:
        said = "the same command goes on" if options.self_test else "nothing was decided"
        terminal.say(f"interrupted: {said}", errors)
        return INTERRUPTED
    report.seconds = time.perf_counter() - start
    if options.json:
        print(json.dumps(measure.plain(report.as_json()), indent=1))
    else:
        show(report, Console())
    return report.status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench gate",
        description="Fail when the optimizer got slower: ratios to controls of the same run, judged "
        "against a baseline, and exact counts.",
        epilog="Exit status: 0 nothing got slower, 1 something did, 2 the gate could not decide.",
    )
    add = parser.add_argument
    add(
        "--baseline",
        type=Path,
        help=f"what to judge against (default: the checkout's {BASELINE.relative_to(ROOT)}; with --target "
        "none, but --limit)",
    )
    add("--update", action="store_true", help="measure the baseline anew and write it")
    add("--against", metavar="REV", help="judge against this revision, built and timed in turn with this one")
    add(
        "--target",
        type=_module_and_function,
        metavar="MODULE:FUNCTION",
        help="judge a step of your own: the function takes a callable that makes the optimizer (rmsgd.RMSGD, "
        "or one with the same arguments that makes SGD) and returns a step to call",
    )
    add(
        "--limit",
        type=arguments.above_zero,
        help=f"largest ratio of --target to SGD without a baseline (default: {LIMIT})",
    )
    add(
        "--seconds",
        type=arguments.above_zero,
        help=f"longest time to measure (default: {LONGEST_S:.0f}; with --against {AGAINST_S:.0f})",
    )
    add("--threads", type=arguments.positive, default=1, help="threads of both sides (default: %(default)s)")
    add("--no-counts", action="store_true", help="leave the exact counts out")
    add("--json", action="store_true", help="write JSON, and nothing else, to stdout")
    add(
        "--self-test",
        type=arguments.positive,
        metavar="N",
        help="test the gate by N runs each of unchanged and of slowed code",
    )
    add("--out", type=Path, default=Path(".out/gate"), help="folder for --self-test (default: %(default)s)")
    add("--readme", type=Path, help="rewrite the table of --self-test in this file")
    return parser


def _options(given: Sequence[str]) -> argparse.Namespace:
    """The arguments; those that exclude each other end the program with status 2."""
    parser = _parser()
    options = parser.parse_args(given)
    if options.update and options.against:
        parser.error("--update and --against exclude each other: a revision is compared with, not stored")
    if options.self_test and (options.update or options.against or options.target):
        parser.error("--self-test runs the gate as it is: without --update, --against and --target")
    if options.readme and not options.self_test:
        parser.error("--readme: the table is that of --self-test N")
    if options.json and (options.update or options.self_test):
        parser.error("--json prints a judgement, so --update and --self-test cannot have it")
    if options.limit is not None and (options.baseline or options.update or not options.target):
        parser.error("--limit is for --target without a baseline; a baseline has limits of its own")
    if options.baseline and options.against:
        parser.error("--baseline and --against exclude each other: one of them is judged against")
    return options


def _module_and_function(text: str) -> str:
    if not all(text.partition(":")):
        raise argparse.ArgumentTypeError(f"expected module:function, got {text!r}")
    return text


def check_core() -> None:
    """Checks that the compiled core runs, unless RMSGD_BACKEND names another backend.

    Raises:
        GateError: the core was not built or cannot run here, so that a fallback would be timed.

    """
    asked_for = os.environ.get("RMSGD_BACKEND", "")
    (core,) = (status for status in backends.statuses("cpu") if status.name == "native")
    if core.available or asked_for not in ("", core.name):
        return
    try:
        import_module("rmsgd._cpu")
        remedy = ""
    except ImportError:
        remedy = f"build it with {sys.executable} -m pip install -e {ROOT}, or "
    raise GateError(
        f"the compiled core does not run here, and a fallback would be timed in its place ({core.reason}); "
        f"{remedy}name the fallback that is to be judged, as in RMSGD_BACKEND=torch"
    )


def describe(threads: int) -> dict[str, Any]:
    """This machine, with the instruction set and the compiler of the optimizer's core."""
    used = os.environ.get("RMSGD_BACKEND") or backends.backend_for(torch.device("cpu")).name
    isa = import_module("rmsgd._cpu").isa() if used == "native" else f"none ({used})"
    return measure.machine() | {"threads": threads, "isa": isa, "compiler": callgrind.compiler(ROOT)}


@contextmanager
def progress(console: Console) -> Iterator[Progress]:
    """A progress bar on stderr that vanishes when it is done."""
    columns = (SpinnerColumn(), *Progress.get_default_columns()[:2], TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        bar.add_task("gate", total=1.0, text="starting")
        yield bar


def _say(bar: Progress, text: str, share: float = 0.0) -> None:
    bar.update(bar.task_ids[0], text=text, completed=share)


def judge(options: argparse.Namespace, report: Report, bar: Progress) -> None:
    """Times this checkout and judges it against the baseline."""
    known = _baseline(options, report)
    differences = [] if known is None else known.differences(report.machine)
    if known is not None and differences:
        report.notes.append(
            f"the baseline is another machine's ({'; '.join(differences)}): a figure may be "
            f"{known.tolerance_elsewhere:.0%} above it; --update writes this one's"
        )
    for figure in _figures(options):
        if known is not None and figure.name in known.figures:
            limit = known.limit(figure.name, elsewhere=bool(differences))
            report.findings.append(Finding(figure, known.figures[figure.name]["ratio"], limit))
        elif options.target and known is None:
            report.findings.append(Finding(figure, 1.0, options.limit or LIMIT))
        else:
            raise GateError(f"the baseline has no figure {figure.name!r}; write one with --update")
    _say(bar, "loading")
    with Worker(ROOT, options.threads, options.target) as worker:
        if known is not None and not options.target and not options.no_counts:
            _say(bar, "counting")
            found = worker.count() | _instructions(ROOT, report.machine, report.notes)
            report.counts = compared(found, known, report.machine)
        session = Session({"here": worker}, report.findings)
        session.run(options.seconds, lambda share: _say(bar, "timing", share))


def _baseline(options: argparse.Namespace, report: Report) -> Baseline | None:
    """The baseline; None where the user's step is judged without one."""
    if options.target and options.baseline is None:
        return None
    return baselines.load(options.baseline or BASELINE, report.machine, options.threads)


def _figures(options: argparse.Namespace) -> Sequence[Figure]:
    return (target_figure(options.target),) if options.target else FIGURES + OF_CONTROLS


def _instructions(folder: Path, machine: Mapping[str, Any], notes: list[str]) -> dict[str, int]:
    try:
        return callgrind.count(folder, machine["isa"])
    except callgrind.CallgrindError as error:
        notes.append(f"instructions of {folder.name} are not counted: {error}")
        return {}


def compared(found: Mapping[str, int], known: Baseline, machine: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per count with its verdict: the same, more (a regression), fewer, or why it is not compared."""
    rows = []
    for name in sorted({*found, *known.counts}):
        here, expected = found.get(name), known.counts.get(name)
        if here is None or expected is None:
            verdict = "not counted " + ("here" if here is None else "in the baseline")
        elif why := known.why_not_comparable(name, machine):
            verdict = f"not compared: {why}"
        else:
            verdict = "same" if here == expected else "more" if here > expected else "fewer"
        rows.append({"name": name, "here": here, "expected": expected, "verdict": verdict})
    return rows


def against(options: argparse.Namespace, report: Report, bar: Progress) -> None:
    """Times this checkout and another revision in turn."""
    _say(bar, f"building {options.against}")
    figures = (target_figure(options.target),) if options.target else FIGURES
    report.findings = [Finding(here_over_there(f), 1.0, 1 + f.tolerance) for f in figures]
    with ExitStack() as stack:
        there = stack.enter_context(built(options.against))
        _say(bar, "loading")
        workers = {
            "here": stack.enter_context(Worker(ROOT, options.threads, options.target)),
            "there": stack.enter_context(Worker(there, options.threads, options.target, slower=False)),
        }
        if not options.target and not options.no_counts:
            _say(bar, "counting")
            here, expected = (
                workers[side].count() | _instructions(folder, report.machine, report.notes)
                for side, folder in (("here", ROOT), ("there", there))
            )
            report.counts = compared(here, Baseline(report.machine, {}, expected), report.machine)
        session = Session(workers, report.findings)
        session.run(options.seconds, lambda share: _say(bar, "timing", share))


def update(options: argparse.Namespace, machine: Mapping[str, Any], console: Console) -> int:
    """Measures in several processes and writes the baseline.

    The layout of memory shifts all ratios of a process. So the baseline is the median of several processes,
    and no tolerance is narrower than twice their spread.
    """
    path, figures = options.baseline or BASELINE, _figures(options)
    ratios: dict[str, list[float]] = {figure.name: [] for figure in figures}
    counts: dict[str, int] = {}
    notes: list[str] = []
    with progress(console) as bar:
        for launch in range(LAUNCHES):
            _say(bar, f"process {launch + 1} of {LAUNCHES}", launch / LAUNCHES)
            with Worker(ROOT, options.threads, options.target, slower=False) as worker:
                findings = [Finding(figure, 1.0, math.inf) for figure in figures]
                Session({"here": worker}, findings).collect(min(options.seconds, LAUNCH_S))
                for finding in findings:
                    ratios[finding.figure.name].append(finding.measured.median)
                if launch == 0 and not options.target and not options.no_counts:
                    counts = worker.count() | _instructions(ROOT, machine, notes)
    fresh: dict[str, Mapping[str, Any]] = {
        figure.name: expectation(ratios[figure.name], figure.tolerance) for figure in figures
    }
    try:
        old = baselines.load(path, machine, options.threads)
        kept = None if old.differences(machine) else old
    except GateError:
        kept = None
    if kept is not None:
        fresh, counts = {**kept.figures, **fresh}, counts or dict(kept.counts)
    baselines.save(path, Baseline(machine, fresh, counts))
    table = Table("figure", "ratio", "tolerance", box=SIMPLE_HEAD, show_edge=False)
    for figure in figures:
        entry = fresh[figure.name]
        table.add_row(figure.text, f"{entry['ratio']:.3f}", f"{entry['tolerance']:.1%}")
        if entry["tolerance"] > figure.tolerance:
            notes.append(f"{figure.text}: processes differ, so its tolerance is {entry['tolerance']:.1%}")
    terminal.show(table, Console())
    for note in notes:
        terminal.say(f"note: {note}", console)
    terminal.say(f"wrote {path}", console)
    return PASSED


def expectation(ratios: Sequence[float], least: float) -> dict[str, Any]:
    """A figure of the baseline from those of several processes: the median, and the tolerance.

    The spread is the median absolute deviation, scaled to a standard deviation, so that one process that was
    disturbed moves neither.
    """
    logs = np.log(ratios)
    spread = float(stats.median_abs_deviation(logs, scale="normal"))
    tolerance = max(least, math.expm1(2 * spread))
    return {"ratio": math.exp(np.median(logs)), "tolerance": tolerance, "processes": list(ratios)}


def self_test(options: argparse.Namespace, machine: Mapping[str, Any]) -> int:
    """Runs `trial`, which shows what the gate catches, against a baseline that must exist."""
    path = options.baseline or BASELINE
    baselines.load(path, machine, options.threads)
    settings = trial.Settings(path, options.threads, options.seconds)
    return trial.run(options.self_test, settings, options.out, options.readme)


def show(report: Report, console: Console) -> None:
    """Prints the tables, and the verdict in one line."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("figure")
    for heading in ("ratio", "limit", "change", "rounds", "verdict"):
        table.add_column(heading, justify="right", no_wrap=True)
    for finding in report.findings:
        table.add_row(
            finding.figure.text,
            str(finding.measured),
            f"{finding.limit:.3f}",
            f"{finding.change:+.1%}",
            str(len(finding.logs)),
            finding.verdict.value,
        )
    terminal.show(table, console)
    if report.counts:
        table = Table("count", "here", "expected", "verdict", box=SIMPLE_HEAD, show_edge=False)
        for row in report.counts:
            cells = ("" if row[key] is None else str(row[key]) for key in ("here", "expected"))
            table.add_row(row["name"], *cells, row["verdict"])
        terminal.show(table, console)
    for note in report.notes:
        terminal.say(f"note: {note}", console)
    if report.status == UNDECIDED:
        terminal.say("undecided: an interval still contains its limit; --seconds gives more time", console)
    for reason in report.reasons:
        terminal.say(f"slower: {reason}", console)
    if report.status == PASSED:
        terminal.say("nothing got slower", console)
