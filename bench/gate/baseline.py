"""The gate's baseline: ratios with their tolerances, counts, and the machine that they come from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import measure
from bench.gate.processes import GateError

SCHEMA = "rmsgd-bench-gate/1"
TOLERANCE_ELSEWHERE = 0.25
SAME_MACHINE = ("cpu", "cores", "memory_gib", "torch")
ISAS = ("baseline", "avx2", "avx512")
"""The instruction sets in order: a processor that has one of them has those before it."""

MATTERS = {
    "allocations": "torch",
    "torch operations": "torch",
    "instructions": "compiler",
    "spectra redone": "cpu",  # the weights come from LAPACK, whose last bits depend on the processor
}
"""From the beginning of a count's name to what it depends on besides the optimizer."""


@dataclass(frozen=True)
class Baseline:
    """The record that a run is compared with.

    Attributes:
        machine: the machine as `bench.measure.machine` describes it, with the core's "isa" and "compiler".
        figures: from name to {"ratio", "tolerance", "processes"}; the last is the ratio in each process of
            --update.
        counts: from name to count.
        tolerance_elsewhere: the least tolerance on another machine than this.

    """

    machine: Mapping[str, Any]
    figures: Mapping[str, Mapping[str, Any]]
    counts: Mapping[str, int]
    tolerance_elsewhere: float = TOLERANCE_ELSEWHERE

    def differences(self, machine: Mapping[str, Any]) -> list[str]:
        """How this machine differs from that of the baseline, a line each."""
        return [
            f"{key} {machine.get(key)} here, {self.machine.get(key)} there"
            for key in SAME_MACHINE
            if machine.get(key) != self.machine.get(key)
        ]

    def limit(self, figure: str, *, elsewhere: bool) -> float:
        """The ratio above which the figure counts as slower."""
        entry = self.figures[figure]
        tolerance = max(entry["tolerance"], self.tolerance_elsewhere if elsewhere else 0.0)
        return float(entry["ratio"] * (1 + tolerance))

    def why_not_comparable(self, count: str, machine: Mapping[str, Any]) -> str | None:
        """Why a count cannot be compared on this machine; None where it can."""
        for start, key in MATTERS.items():
            if count.startswith(start) and machine.get(key) != self.machine.get(key):
                return f"{key} {machine.get(key)} here, {self.machine.get(key)} in the baseline"
        return None


def load(path: Path, machine: Mapping[str, Any], threads: int) -> Baseline:
    """The baseline in `path`.

    Raises:
        GateError: it is missing, has another schema or is incomplete, or was taken with other instruction
            sets or threads, so that its ratios cannot be compared with those of this run.

    """
    advice = "; write one with --update"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise GateError(f"there is no baseline {path}{advice}") from None
    except ValueError as error:
        raise GateError(f"{path} is not JSON: {error}{advice}") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise GateError(f"{path} has schema {schema!r}, this gate reads {SCHEMA!r}{advice}")
    if missing := _missing(content):
        raise GateError(f"{path} has no {missing}{advice}")
    found = Baseline(
        content["machine"], content["figures"], content["counts"], content["tolerance_elsewhere"]
    )
    if found.machine["isa"] != machine["isa"]:
        there, here = (ISAS.index(m["isa"]) if m["isa"] in ISAS else None for m in (found.machine, machine))
        forceable = there is not None and here is not None and there < here
        raise GateError(
            f"{path} was taken with the {found.machine['isa']} kernels, here run the {machine['isa']} ones"
            + (f"; RMSGD_ISA={found.machine['isa']} forces the same" if forceable else "")
            + advice
        )
    if found.machine["threads"] != threads:
        taken = measure.count(found.machine["threads"], "thread")
        raise GateError(f"{path} was taken with {taken}, this run has {threads} (--threads)")
    return found


def _missing(content: Mapping[str, Any]) -> str | None:
    """The first entry that a baseline's JSON lacks."""
    machine, figures = content.get("machine"), content.get("figures")
    places = [
        ("", content, ("machine", "figures", "counts", "tolerance_elsewhere")),
        ("machine.", machine, ("isa", "threads")),
    ]
    if isinstance(figures, dict):
        places += [(f"figures.{name}.", entry, ("ratio", "tolerance")) for name, entry in figures.items()]
    for place, entry, keys in places:
        for key in keys:
            if not isinstance(entry, dict) or key not in entry:
                return place + key
    return None


def save(path: Path, baseline: Baseline) -> None:
    """Writes the baseline as JSON."""
    measure.write_json(
        path,
        {
            "schema": SCHEMA,
            "machine": baseline.machine,
            "tolerance_elsewhere": baseline.tolerance_elsewhere,
            "figures": baseline.figures,
            "counts": baseline.counts,
        },
    )
