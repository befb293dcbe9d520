"""Whether the gate can be trusted: runs of unchanged and of slowed code beside a busy neighbour.

Every run is the command itself, in a process of its own, against the given baseline, which was written
without the neighbour. The exact counts have no noise and are left out.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import measure, readme, terminal
from bench.gate.cases import SLOWER
from bench.gate.processes import GateError

SCHEMA = "rmsgd-bench-gate-trial/2"
SLOW_DOWN = 0.1
BESIDE_S = 25.0
"""Seconds that a run may take beside its longest time to measure: to start, and to finish its last round."""
KINDS = {
    "unchanged": ("", 0),
    "step slowed": (f"step:{SLOW_DOWN}", 1),
    "epoch end slowed": (f"epoch-end:{SLOW_DOWN}", 1),
}
"""From a kind of run to what the environment slows, and the exit status that is right."""
ENDS = ("passed", "slower", "undecided")
"""From an exit status to its meaning."""

# It ends when the process that started it has ended in any way.
NEIGHBOUR = "import os; parent = os.getppid()\nwhile os.getppid() == parent: sum(range(1000))"


@contextmanager
def busy_neighbour() -> Iterator[None]:
    """Runs a process that computes without a pause for as long as the context lasts."""
    process = subprocess.Popen([sys.executable, "-c", NEIGHBOUR])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def gate(*flags: str, slowed: str = "") -> tuple[int, str]:
    """Exit status and stdout of one run of the command."""
    done = subprocess.run(
        [sys.executable, "-m", "bench", "gate", *flags],
        env=os.environ | {SLOWER: slowed},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


@dataclass(frozen=True)
class Settings:
    """The arguments of every run of the command: baseline, threads, and the longest time to measure."""

    baseline: Path
    threads: int
    seconds: float

    @property
    def longest_s(self) -> float:
        """The longest time that a run may take in all."""
        return self.seconds + BESIDE_S

    @property
    def flags(self) -> tuple[str, ...]:
        """As arguments."""
        return (
            *("--baseline", str(self.baseline)),
            *("--threads", str(self.threads)),
            *("--seconds", str(self.seconds)),
        )


def run(count: int, settings: Settings, out: Path, page: Path | None) -> int:
    """Runs each kind `count` times, in turn; returns 0 when every run was right and ended in time.

    Every run is written to `gate-unfinished.json` as it ends, and after the last one all are in `gate.json`
    instead. A trial that was interrupted goes on where it ended, if code, settings, baseline and machine are
    the same.

    Raises:
        GateError: a run ended with a status that the gate does not have.

    """
    console = Console()
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "machine": measure.machine() | {"threads": settings.threads},
        "neighbour": "one process that computes without a pause",
        "slow_down": SLOW_DOWN,
        "longest_s": settings.longest_s,
        "seconds": settings.seconds,
        "baseline": json.loads(settings.baseline.read_text(encoding="utf-8")),
    }
    unfinished, finished = out / "gate-unfinished.json", out / "gate.json"
    todo = [(number, kind) for number in range(1, count + 1) for kind in KINDS]
    runs = _left(unfinished, record)[: len(todo)]
    if runs:
        terminal.say(f"going on after {len(runs)} of {len(todo)} runs, from {unfinished}", console)
    with busy_neighbour():
        for number, kind in todo[len(runs) :]:
            runs.append(one(kind, settings))
            measure.write_json(unfinished, record | {"gate": summary(runs), "runs": runs})
            last = runs[-1]
            ending = f"{ENDS[last['exit']]} after {last['seconds']:.0f} s"
            terminal.say(f"{number}/{count} {kind}: {ending}" + ("" if last["right"] else ": wrong"), console)
    record |= {"gate": summary(runs), "runs": runs}
    measure.write_json(finished, record)
    unfinished.unlink()
    terminal.say(f"wrote {finished}", console)
    if page:
        readme.rewrite(page, record)
    return 0 if all(r["right"] for r in runs) else 1


def _left(unfinished: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of an unfinished record that begins like this one; none where there is no such record."""
    try:
        found = json.loads(unfinished.read_text(encoding="utf-8"))
        same = all(found[key] == value for key, value in measure.plain(record).items())
        return list(found["runs"]) if same else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def one(kind: str, settings: Settings) -> dict[str, Any]:
    """One run of this kind: its exit status, whether that is right, its seconds, and the gate's output."""
    slowed, right = KINDS[kind]
    load = os.getloadavg()[0]
    start = time.perf_counter()
    status, text = gate(*settings.flags, "--json", "--no-counts", slowed=slowed)
    seconds = time.perf_counter() - start
    if status not in range(len(ENDS)):
        raise GateError(f"a run of the self-test ended with status {status}")
    result = json.loads(text)
    return {
        "kind": kind,
        "exit": status,
        "right": status == right and seconds < settings.longest_s,
        "seconds": seconds,
        "load_average": load,
        "reasons": result["reasons"],
        "figures": result.get("figures", []),
    }


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per kind: how its runs ended, and the longest."""
    rows = []
    for kind in KINDS:
        mine = [r for r in runs if r["kind"] == kind]
        if mine:
            ends = {word: sum(r["exit"] == status for r in mine) for status, word in enumerate(ENDS)}
            longest = max(r["seconds"] for r in mine)
            rows.append({"kind": kind, "runs": len(mine), **ends, "longest_s": longest})
    return rows
