"""Whether the gate can be trusted: runs of unchanged and of slowed code beside a busy neighbour.

Every run is the command itself, in a process of its own, against a baseline that was written without the
neighbour. The exact counts know no noise: one run at the end has them, to see how long it takes.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import measure
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


def run(count: int, out: Path) -> int:
    """Runs each kind `count` times, in turn, and writes `gate.json`; 0 when every status was right."""
    console = Console()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "baseline.json"
        if gate("--baseline", str(path), "--update")[0]:
            return 2
        baseline = json.loads(path.read_text())
        with busy_neighbour():
            for number in range(count):
                for kind, (slowed, right) in KINDS.items():
                    start = time.perf_counter()
                    status, text = gate("--baseline", str(path), "--json", "--no-counts", slowed=slowed)
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
            gate("--baseline", str(path), "--json")
            with_counts = time.perf_counter() - start
    summary = {
        kind: {
            "runs": count,
            "exit": {str(s): sum(r["exit"] == s for r in runs if r["kind"] == kind) for s in (0, 1, 2)},
            "longest_s": max(r["seconds"] for r in runs if r["kind"] == kind),
        }
        for kind in KINDS
    }
    measure.write_json(
        out / "gate.json",
        {
            "schema": SCHEMA,
            "machine": measure.machine(),
            "neighbour": "one process that computes without a pause",
            "slow_down": SLOW_DOWN,
            "baseline": baseline,
            "summary": summary,
            "run_with_counts_s": with_counts,
            "runs": runs,
        },
    )
    console.print(f"wrote {out / 'gate.json'}")
    return 0 if all(r["right"] for r in runs) else 1
