"""Whether the gate can be trusted: runs of unchanged and of slowed code beside a busy neighbour.

Every run is the command itself, in a process of its own, against the baseline given, which was written
without the neighbour. The exact counts know no noise: one run at the end has them, to see how long it
takes.
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
    """Runs each kind `count` times, in turn, and writes `gate.json`; 0 when every status was right."""
    console = Console()
    runs: list[dict[str, Any]] = []
    flags = ("--baseline", str(baseline), "--json")
    with busy_neighbour():
        for number in range(count):
            for kind, (slowed, right) in KINDS.items():
                start = time.perf_counter()
                status, text = gate(*flags, "--no-counts", slowed=slowed)
                seconds = time.perf_counter() - start
                result = json.loads(text)
                runs.append(
                    {
                        "kind": kind,
                        "exit": status,
                        "right": status == right,
                        "seconds": seconds,
                        "reasons": result["reasons"],
                        "figures": result.get("figures", []),
                    }
                )
                console.print(f"{number + 1}/{count} {kind}: exit {status} after {seconds:.0f} s")
        start = time.perf_counter()
        gate(*flags)
        with_counts = time.perf_counter() - start
    summary = []
    for kind in KINDS:
        mine = [r for r in runs if r["kind"] == kind]
        summary.append(
            {
                "kind": kind,
                "runs": count,
                "passed": sum(r["exit"] == 0 for r in mine),
                "slower": sum(r["exit"] == 1 for r in mine),
                "undecided": sum(r["exit"] == 2 for r in mine),
                "longest_s": max(r["seconds"] for r in mine),
            }
        )
    record = {
        "schema": SCHEMA,
        "machine": measure.machine(),
        "neighbour": "one process that computes without a pause",
        "slow_down": SLOW_DOWN,
        "baseline": json.loads(baseline.read_text()),
        "gate": summary,
        "run_with_counts_s": with_counts,
        "runs": runs,
    }
    measure.write_json(out / "gate.json", record)
    console.print(f"wrote {out / 'gate.json'}")
    if page:
        readme.rewrite(page, record)
    return 0 if all(r["right"] for r in runs) else 1
