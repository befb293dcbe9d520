"""Whether the gate can be trusted: runs of unchanged and of slowed code beside a busy neighbour.

Every run is the command itself, in a process of its own, against the baseline given, which was written
without the neighbour. The exact counts know no noise and are left out.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import measure, readme
from bench.gate.cases import SLOWER

SCHEMA = "rmsgd-bench-gate-trial/1"
SLOW_DOWN = 0.1
KINDS = {
    "unchanged": ("", 0),
    "step slowed": (f"step:{SLOW_DOWN}", 1),
    "epoch end slowed": (f"epoch-end:{SLOW_DOWN}", 1),
}
"""Kind of run to what the environment slows, and the exit status that is right."""
ENDS = ("passed", "slower", "undecided")
"""By exit status."""


@contextmanager
def busy_neighbour() -> Iterator[None]:
    """A process that computes without a pause for as long as the context lasts."""
    process = subprocess.Popen([sys.executable, "-c", "while True: sum(range(1000))"])
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


def run(count: int, baseline: Path, out: Path, page: Path | None) -> int:
    """Runs each kind `count` times, in turn; 0 when every status was right.

    `gate.json` is written anew after every run: whatever ends this early leaves what was done.
    """
    console = Console()
    runs: list[dict[str, Any]] = []
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "machine": measure.machine(),
        "neighbour": "one process that computes without a pause",
        "slow_down": SLOW_DOWN,
        "baseline": json.loads(baseline.read_text(encoding="utf-8")),
    }
    with busy_neighbour():
        for number in range(count):
            for kind in KINDS:
                runs.append(one(kind, baseline))
                measure.write_json(out / "gate.json", record | {"gate": summary(runs), "runs": runs})
                status, seconds = runs[-1]["exit"], runs[-1]["seconds"]
                console.print(f"{number + 1}/{count} {kind}: exit {status} after {seconds:.0f} s")
    console.print(f"wrote {out / 'gate.json'}")
    if page:
        readme.rewrite(page, record | {"gate": summary(runs)})
    return 0 if all(r["right"] for r in runs) else 1


def one(kind: str, baseline: Path) -> dict[str, Any]:
    """One run of this kind: exit status, whether it is right, seconds, and what the gate said."""
    slowed, right = KINDS[kind]
    load = os.getloadavg()[0]
    start = time.perf_counter()
    status, text = gate("--baseline", str(baseline), "--json", "--no-counts", slowed=slowed)
    seconds = time.perf_counter() - start
    result = json.loads(text)
    return {
        "kind": kind,
        "exit": status,
        "right": status == right,
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
