"""Tables of the measurements for the terminal."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from bench.gpu.measurements import STEP_CASES
from bench.gpu.targets import Target

Rows = Sequence[Mapping[str, Any]]


def tables(result: Mapping[str, Any]) -> list[Table]:
    """A table for every section that has rows."""
    made = {
        "step": _step,
        "epoch-end": _epoch_end,
        "kernels": _kernels,
        "epoch-time": _epoch_time,
        "eigenvalues": _eigenvalues,
    }
    return [make(rows) for section, make in made.items() if (rows := result.get(section, {}).get("rows"))]


def targets(judged: Sequence[Target]) -> Table:
    """A table of the targets, and of whether they were reached."""
    table = _table("target", "wanted", "measured", "met", title="Targets")
    for target in judged:
        measured = "not measured" if target.measured is None else f"{target.measured:.4g}"
        met = {True: "yes", False: "NO", None: ""}[target.met]
        table.add_row(target.name, target.wanted, measured, met)
    return table


def _table(first: str, *headings: str, title: str) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(first)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _why_not(row: Mapping[str, Any]) -> str | None:
    why = row.get("error", row.get("absent"))
    return escape(textwrap.shorten(why, 60)) if why else None


def _step(rows: Rows) -> Table:
    table = _table(
        "network",
        "us",
        "GB/s",
        "of a copy's",
        *(f"/ {case}" for case in STEP_CASES[1:]),
        title="Step: device time, ratios of device time",
    )
    for row in rows:
        if why := _why_not(row):
            table.add_row(row["network"], why)
            continue
        host = [case for case in STEP_CASES if not row["queued"][case]]
        table.add_row(
            row["network"],
            f"{row['device_seconds']['rmsgd']['median'] * 1e6:.0f}" + ("*" if "rmsgd" in host else ""),
            f"{row['bytes_per_second'] / 1e9:.0f}",
            f"{row['of_copy']['median']:.3f}",
            *(
                f"{row['device_ratio_to'][case]['median']:.3f}" + ("*" if case in host else "")
                for case in STEP_CASES[1:]
            ),
        )
    table.caption = "*: a queue cannot hold so many launches, so the host's time is included"
    return table


def _epoch_end(rows: Rows) -> Table:
    table = _table(
        "network", "weights", "device ms", "host ms", "MiB", "fp32 / fp64 / SVD", title="Epoch end"
    )
    for row in rows:
        name = row["network"] + (f", {row['peer']}" if "peer" in row else "")
        if why := _why_not(row):
            table.add_row(name, row["weights"], why)
        elif "peer" in row:
            table.add_row(name, row["weights"], "", f"{row['seconds'] * 1e3:.0f}")
        else:
            table.add_row(
                name,
                row["weights"],
                f"{row['device_seconds']['median'] * 1e3:.2f}" + ("" if row["queued"] else "*"),
                f"{row['host_seconds'] * 1e3:.2f}",
                f"{row['extra_bytes'] / 2**20:.0f}",
                " / ".join(map(str, row["stages"].values())),
            )
    return table


def _kernels(rows: Rows) -> Table:
    table = _table("network", "kernel", "ms", "launches", title="Kernels of an epoch end")
    for row in rows:
        if why := _why_not(row):
            table.add_row(row["network"], why)
            continue
        for name, kernel in row["kernels"].items():
            table.add_row(row["network"], name, f"{kernel['seconds'] * 1e3:.3f}", f"{kernel['launches']:.0f}")
    return table


COUNTED = {
    "fingerprint": "read",
    "gram": "Gram",
    "reduction": "reduce",
    "sturm_evbmf": "values",
    "idle": "idle",
}
"""The parts of a counted epoch end and their headings."""


def counted(rows: Rows) -> list[Table]:
    """A table per network of counted times of epoch ends: each card in the design before and in this one."""
    before = {(row["network"], row["device"]): row for row in rows if row["design"] == "before"}
    made: dict[str, Table] = {}
    for row in (row for row in rows if row["design"] == "after"):
        network = row["network"]
        if network not in made:
            title = f"Epoch end of {network}, ms, by count: not measured"
            made[network] = _table("card", *COUNTED.values(), "total", "before", "mostly", title=title)
        old = before[network, row["device"]]
        stage, limit = row["dominated_by"].split(": ")
        made[network].add_row(
            row["device"],
            *(f"{row[f'{stage}_ms']:.2f}" for stage in (*COUNTED, "total")),
            "host" if old["host"] else f"{old['total_ms']:.1f}",
            f"{COUNTED[stage]}: {limit}",
        )
    return list(made.values())


def _eigenvalues(rows: Rows) -> Table:
    cases = list(
        dict.fromkeys(
            case for row in rows if "error" not in row for case in (*row["seconds"], *row["absent"])
        )
    )
    table = _table(
        "n",
        *(f"{case}, ms" for case in cases),
        title=f"Eigenvalues of {rows[0]['count']} matrices n x 2 n, their Gram products included",
    )
    for row in rows:
        if "error" in row:
            table.add_row(str(row["n"]), _why_not(row))
            continue
        cells = (
            f"{row['seconds'][case]['median'] * 1e3:.2f}" if case in row["seconds"] else "absent"
            for case in cases
        )
        table.add_row(str(row["n"]), *cells)
    return table


def _epoch_time(rows: Rows) -> Table:
    table = _table("optimizer", "epoch (s)", "/ SGD", title="Epoch of ResNet18, batch 128, CIFAR's size")
    for row in rows:
        if "absent" in row:
            table.add_row(row["optimizer"], "absent")
        else:
            table.add_row(row["optimizer"], f"{row['epoch']['median']:.2f}", f"{row['ratio']['median']:.3f}")
    return table
