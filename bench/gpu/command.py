"""The command line of `bench gpu`: stages of sections, each within its time; tables, JSON and exit status."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from bench import arguments, measure, output, peers, readme, terminal
from bench.gpu import checks, measurements, processes, tables, targets
from bench.gpu.budget import Need, share

SCHEMA = "rmsgd-bench-gpu/1"
BUDGET_S = 360  # seconds of all stages but the last
SANITIZE_S = 240
DONE, FAILED, NO_GPU, INTERRUPTED = 0, 1, 2, 130
CUT = 300  # the most characters of an error to print; the log has the rest
EPOCH_OPTIMIZERS = ("rmsgd", "sgd", "sam")
EPOCH_TIME = ("--model", "resnet18", "--device", "cuda", "--batch", "128", "--rounds", "8")


@dataclass
class Session:
    """What the sections have in common.

    Attributes:
        out: the folder of the result, the log and the epoch times.
        passed: the backends that passed their smoke test; None if that was not run.

    """

    out: Path
    passed: list[str] | None = None

    @property
    def log(self) -> Path:
        """The file with the output of every process of the run."""
        return self.out / "gpu.log"

    @property
    def backends(self) -> Sequence[str]:
        """The backends to test."""
        return checks.BACKENDS if self.passed is None else self.passed

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the processes that measure: it names the first backend that passed, if known."""
        return {"RMSGD_BACKEND": self.passed[0]} if self.passed else {}


@dataclass(frozen=True)
class Section:
    """A part of the run: the function that runs it within a number of seconds, and the seconds it needs."""

    run: Callable[[Session, float], dict[str, Any]]
    need: Need


def _build(session: Session, limit_s: float) -> dict[str, Any]:
    return checks.build(limit_s, session.log)


def _smoke(session: Session, limit_s: float) -> dict[str, Any]:
    result = checks.smoke_tests(limit_s, session.log)
    session.passed = [b for b in checks.BACKENDS if checks.usable(result["backends"], b)]
    return result


def _tests(session: Session, limit_s: float) -> dict[str, Any]:
    return checks.gpu_tests(limit_s, session.log, session.backends, "gpu and not slow", hanging_s=60)


def _sanitizer(session: Session, limit_s: float) -> dict[str, Any]:
    return checks.gpu_tests(limit_s, session.log, session.backends[:1], "gpu and slow", hanging_s=600)


def _stress(session: Session, limit_s: float) -> dict[str, Any]:
    return checks.stress(limit_s, session.log, session.environment)


def _measured(name: str) -> Callable[[Session, float], dict[str, Any]]:
    def run(session: Session, limit_s: float) -> dict[str, Any]:
        command = [sys.executable, "-m", "bench.gpu.measurements", name]
        ended = processes.run(command, limit_s, session.log, session.environment)
        rows = measurements.parse(ended.output)
        errors = [row["error"] for row in rows if "error" in row]
        return {"rows": rows, "error": ended.failure() or "; ".join(errors) or None}

    return run


def _epoch_time(session: Session, limit_s: float) -> dict[str, Any]:
    """Runs `bench epoch-time` of ResNet18 in one interleaved run, with the optimizers that are installed."""
    absent = {name: why for name in EPOCH_OPTIMIZERS if (why := unavailable(name))}
    here = [name for name in EPOCH_OPTIMIZERS if name not in absent]
    out = session.out / "epoch-time"
    written = out / "epoch-time-resnet18-cuda.json"
    written.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench", "epoch-time", *EPOCH_TIME, "--optimizers", ",".join(here)]
    ended = processes.run([*command, "--out", str(out.resolve())], limit_s, session.log, session.environment)
    rows = json.loads(written.read_text())["optimizers"] if written.is_file() else []
    rows += [{"optimizer": name, "absent": why} for name, why in absent.items()]
    return {"rows": rows, "error": ended.failure()}


def unavailable(optimizer: str) -> str | None:
    """Why a peer cannot be made here; None where it can."""
    try:
        peers.make(optimizer, nn.Linear(1, 1).named_parameters())
    except peers.PeerUnavailableError as error:
        return str(error)
    return None


SECTIONS = {
    "build": Section(_build, Need(75, 150)),
    "smoke": Section(_smoke, Need(30, 60)),
    "tests": Section(_tests, Need(70, 120)),
    "step": Section(_measured("step"), Need(20, 45)),
    "epoch-end": Section(_measured("epoch-end"), Need(35, 60)),
    "kernels": Section(_measured("kernels"), Need(20, 40)),
    "epoch-time": Section(_epoch_time, Need(40, 75)),
    "eigenvalues": Section(_measured("eigenvalues"), Need(30, 60)),
    "sanitizer": Section(_sanitizer, Need(0, 200)),
    "stress": Section(_stress, Need(30, 60)),
}
STAGES = {
    "build": ("build",),
    "tests": ("smoke", "tests"),
    "time": ("step", "epoch-end", "kernels", "epoch-time"),
    "peers": ("eigenvalues",),
    "sanitize": ("sanitizer", "stress"),
}
LAST = "sanitize"
"""The stage that runs only when it is named."""


def main(given: Sequence[str]) -> int:
    """Runs the stages or sections asked for; writes `gpu.json` and its stage's JSON after each section.

    Returns:
        0: everything ran and every test passed, whether or not the printed targets are met. 1: something
            failed, or there was no time for it. 2: there is no GPU, or the arguments are wrong. 130: it was
            interrupted.

    """
    parser = _parser()
    options = parser.parse_args(given)
    if options.model:
        arguments.refuse(parser, options, ["only", "seconds"], "is for what runs, and --model runs nothing")
        if options.stages:
            parser.error("--model runs no stages")
        return model(options.json, options.out, options.readme)
    arguments.refuse(parser, options, ["json", "readme"], "is for --model")
    if options.only and options.stages:
        parser.error("--only takes the place of stages")
    names = options.only or sections_of(options.stages)
    seconds = options.seconds or budget_of(names)
    if not torch.cuda.is_available():
        terminal.say(
            "bench gpu: torch finds no CUDA device here, so there is nothing to measure", Console(stderr=True)
        )
        return NO_GPU
    output.check(options.out)
    console = Console()
    session = Session(options.out)
    result: dict[str, Any] = {"schema": SCHEMA, "machine": measure.machine()}
    try:
        run_sections(names, session, result, console, time.monotonic() + seconds)
    except KeyboardInterrupt:
        terminal.say(f"interrupted; what was measured is in {session.out}", console)
        return INTERRUPTED
    console.print(*tables.tables(result), tables.targets(targets.judge(result)))
    failed = failures(result, names)
    for line in failed:
        terminal.say(line, console)
    terminal.say(f"wrote {session.out / 'gpu.json'} and {session.log}", console)
    return FAILED if failed else DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu",
        description="Build, test and measure the CUDA kernels on this machine's GPU, in 6 minutes and "
        "without a network. Every section of a stage runs in processes of its own and ends when its time is "
        "over; what it had measured by then is kept. --model counts what an epoch end takes, and needs no "
        "GPU.",
    )
    parser.add_argument(
        "stages",
        nargs="*",
        type=_stage,
        metavar="STAGE",
        help=f"some of {', '.join(STAGES)} (default: all but {LAST}, which takes 4 minutes more)",
    )
    parser.add_argument(
        "--model", action="store_true", help="print counted times of networks on cards, and run nothing"
    )
    parser.add_argument("--json", action="store_true", help="with --model: only JSON")
    parser.add_argument("--readme", type=Path, help="with --model: rewrite the counted table of this file")
    parser.add_argument("--out", type=Path, default=Path(".out/gpu"), help="folder (default: %(default)s)")
    parser.add_argument(
        "--only",
        type=_sections,
        metavar="SECTION,...",
        help=f"instead of stages, some of their sections: {', '.join(SECTIONS)}",
    )
    parser.add_argument(
        "--seconds",
        type=arguments.positive,
        help=f"for everything (default: {BUDGET_S}, and {SANITIZE_S} for {LAST})",
    )
    return parser


def _stage(text: str) -> str:
    if text not in STAGES:
        raise argparse.ArgumentTypeError(f"no stage {text!r}; choose from {', '.join(STAGES)}")
    return text


def sections_of(stages: Sequence[str]) -> tuple[str, ...]:
    """The sections of some stages, in order; of all but the last where none is named."""
    chosen = [name for name in STAGES if name in stages or (not stages and name != LAST)]
    return tuple(section for name in chosen for section in STAGES[name] if section in SECTIONS)


def budget_of(names: Sequence[str]) -> float:
    """Seconds for these sections."""
    last = set(STAGES[LAST])
    return BUDGET_S * bool(set(names) - last) + SANITIZE_S * bool(set(names) & last)


def model(as_json: bool, out: Path, page: Path | None = None) -> int:
    """Prints the counted times of an epoch end, and beside them the times that were measured here, if any.

    With a page it rewrites the page's table of them too.
    """
    from bench.gpu import counting  # it builds networks

    if page is not None:
        readme.marked(page, ["counted"])
    rows = list(counting.counted())
    if page is not None:
        readme.rewrite(page, {"machine": {}, "counted": rows})
    if as_json:
        sys.stdout.write(json.dumps({"counted": rows}) + "\n")
        return DONE
    console = Console()
    console.print(*tables.counted(rows))
    measured = out / "gpu.json"
    if measured.is_file():
        console.print(*tables.tables(json.loads(measured.read_text())))
    return DONE


def _sections(text: str) -> tuple[str, ...]:
    asked = text.split(",")
    unknown = [name for name in asked if name not in SECTIONS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"no section {', '.join(map(repr, unknown))}; choose from {', '.join(SECTIONS)}"
        )
    return tuple(name for name in SECTIONS if name in asked)


def run_sections(
    names: Sequence[str], session: Session, result: dict[str, Any], console: Console, deadline: float
) -> None:
    """Runs sections in order and puts the findings of each into `result`, under its name.

    A section without time is "skipped". One that fails has an "error", and the rest goes on.

    Args:
        names: keys of `SECTIONS`.
        session: the state that the sections share.
        result: the findings, which are written to `gpu.json` of the session's folder after each section.
        console: prints the name of the running section.
        deadline: the end of the run by `time.monotonic()`.

    """
    for i, name in enumerate(names):
        section = SECTIONS[name]
        later = [SECTIONS[other].need for other in names[i + 1 :]]
        start = time.monotonic()
        seconds = share(section.need, later, deadline - start)
        if not seconds:
            result[name] = {"skipped": "no time was left"}
        else:
            terminal.say(f"{name}: at most {seconds:.0f} s ...", console)
            try:
                result[name] = section.run(session, seconds)
            except Exception as error:  # one section's failure leaves the others' figures
                result[name] = {"error": measurements.reason(error)}
            result[name]["seconds"] = time.monotonic() - start
            terminal.say(f"{name}: {result[name]['seconds']:.0f} s", console)
        result["targets"] = [asdict(target) for target in targets.judge(result)]
        measure.write_json(session.out / "gpu.json", result)
        stage = next((stage for stage, sections in STAGES.items() if name in sections), name)
        kept = {"schema", "machine", "targets", *STAGES.get(stage, (name,))}
        measure.write_json(
            session.out / f"gpu-{stage}.json", {key: value for key, value in result.items() if key in kept}
        )


def failures(result: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """A line for every section that failed or was left out."""
    lines = []
    for name in names:
        why = result[name].get("error") or result[name].get("skipped")
        if why:
            lines.append(f"{name}: {why if len(why) <= CUT else '... ' + why[-CUT:]}")
    return lines
