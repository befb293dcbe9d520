"""The measured tables of README and docs, written from the JSON of a run: no figure there is typed by hand.

A table stands between `<!-- measured: NAME -->` and `<!-- /measured -->`.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from bench import atomic
from bench.errors import UsageError
from bench.measure import Interval, count


def rewrite(path: Path, result: dict[str, Any]) -> None:
    """Replace every marked table of `path` for which `result` has the figures, and nothing else in the file.

    Raises:
        UsageError: the file has no mark for a table that this run measured.

    """
    measured = [name for name in TABLES if name in result]
    text = marked(path, measured)
    for name in measured:
        before, opening, closing, after = _mark(name).split(text, maxsplit=1)
        table = f"{_where(result['machine'], name)}\n\n{TABLES[name](result[name])}\n"
        text = before + opening + table + closing + after
    atomic.write(path.resolve(), text.encode())


def marked(path: Path, names: Iterable[str]) -> str:
    """The text of `path`.

    Raises:
        UsageError: the page has no mark for one of these tables.

    """
    text = path.read_text(encoding="utf-8")
    for name in names:
        if not _mark(name).search(text):
            raise UsageError(f"{path} has no line '<!-- measured: {name} -->' to write the table behind")
    return text


def _mark(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- measured: {name} -->\n).*?(<!-- /measured -->)", re.DOTALL)


HOW = {
    "cost": "medians of interleaved rounds, ratios within rounds",
    "noise-search": "every free energy in float64",
    "study": "means over seeds",
    "cifar10-rules": "means over seeds",
    "same-lr": "means over seeds",
    "layer-rates-gpt": "means over seeds",
    "split": "processes over gloo; medians of interleaved rounds",
    "gate": "each run against a baseline of the machine when it was quiet",
}


def _where(machine: dict[str, Any], name: str) -> str:
    if name == "counted":
        return "Milliseconds by count, of the first design and the present one. Nothing was measured."
    how = HOW.get(name, "medians of interleaved rounds")
    threads = count(machine["threads"], "thread")
    return f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, {threads}; {how}."


def _markdown(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _interval(figures: Mapping[str, Any], form: str = ".2f") -> str:
    """A ratio with its 95 % interval; "-" where the rounds were too few for one."""
    return Interval(figures["median"], figures.get("low"), figures.get("high")).text(form)


def step_cells(row: dict[str, Any]) -> list[str]:
    """A row's figures: every case's milliseconds and ratio to fused SGD, and the share of the bandwidth."""
    figures = [
        f"{seconds * 1e3:.2f} ({row['to_sgd_fused'][name]['median']:.2f})"
        for name, seconds in row["seconds"].items()
    ]
    return [*figures, f"{row['bandwidth_of_floor']['median']:.0%}"]


def _step(rows: list[dict[str, Any]]) -> str:
    """A table with a column per network, since there are fewer networks than optimizers."""
    headings = [
        "step, ms<br>/ fused SGD [95 %]",
        *(f"{row['model']}<br>{row['tensors']} tensors" for row in rows),
    ]
    lines = [
        [
            name,
            *(f"{row['seconds'][name] * 1e3:.2f}<br>{_interval(row['to_sgd_fused'][name])}" for row in rows),
        ]
        for name in rows[0]["seconds"]
    ]
    lines.append(["bandwidth / plain loop's", *(_interval(row["bandwidth_of_floor"]) for row in rows)])
    return _markdown(headings, lines)


def epoch_end_cells(row: dict[str, Any]) -> list[str]:
    """A row's figures, in the order of the headings; empty where rmsgd 1.0.2 was left out."""
    release = row["seconds"].get("rmsgd-1.0.2")
    return [
        str(row["spectra"]),
        f"{row['seconds']['rmsgd'] * 1e3:.1f}",
        f"{row['to_gram']['median']:.2f}",
        f"{row['to_gram_initial']['median']:.2f}",
        "" if release is None else f"{release:.2f}",
        "" if release is None else f"{row['faster_than_release']['median']:.1f}",
        " / ".join(str(count) for count in row["stages"].values()),
    ]


def _epoch_end(rows: list[dict[str, Any]]) -> str:
    headings = [
        "epoch end",
        "spectra",
        "ms",
        "/ Gram products [95 %]",
        "the same, initial weights [95 %]",
        "rmsgd 1.0.2, s",
        "times faster [95 %]",
        "fp32 Gram / fp64 Gram / SVD",
    ]
    lines = []
    for row in rows:
        cells = epoch_end_cells(row)
        cells[2:4] = [_interval(row["to_gram"]), _interval(row["to_gram_initial"])]
        if "faster_than_release" in row:
            cells[5] = _interval(row["faster_than_release"], ".1f")
        lines.append([row["model"], *cells])
    return _markdown(headings, lines)


def search_cells(row: dict[str, Any]) -> list[str]:
    """For each search: spectra above the minimum, those with another rank, the worst error of sigma^2."""
    return [
        f"{missed} ({row['another_rank'][name]}; {row['worst_error_of_variance'][name]:.1%})"
        for name, missed in row["above_the_minimum"].items()
    ]


def _noise_search(rows: list[dict[str, Any]]) -> str:
    headings = ["above the minimum (another rank; worst error of sigma²)", "spectra", "rmsgd"]
    return _markdown(
        [*headings, "rmsgd 1.0.2", "Python VBMF"],
        [[f"{row['model']}, {row['weights']}", str(row["spectra"]), *search_cells(row)] for row in rows],
    )


PROBE_CASES = ("rmsgd", "full SVD", "weightwatcher")


def probe_cells(row: Mapping[str, Any]) -> list[str]:
    """For each case its seconds and their ratio to `rmsgd.probe`'s; a peer not installed is "absent"."""
    cells = []
    for case in PROBE_CASES:
        if case not in row["seconds"]:
            cells.append("absent")
            continue
        times = f" ({row['faster'][case]['median']:.1f})" if case in row["faster"] else ""
        cells.append(f"{row['seconds'][case]:.2f}{times}")
    return cells


def _probe_speed(rows: list[dict[str, Any]]) -> str:
    headings = ["probe, s; times rmsgd's [95 %]", "layers", "rmsgd", "full SVD (SciPy)", "WeightWatcher"]
    lines = []
    for row in rows:
        cells = probe_cells(row)
        for i, case in enumerate(PROBE_CASES):
            if case in row["faster"]:
                cells[i] = f"{row['seconds'][case]:.2f}<br>{_interval(row['faster'][case], '.1f')}"
        lines.append([row["model"], str(row["layers"]), *cells])
    return _markdown(headings, lines)


LARGE_HEADINGS = (
    "probe of a language model",
    "parameters",
    "matrices",
    "s",
    "most memory, GiB",
    "fp32 Gram / fp64 Gram / SVD",
    "WeightWatcher, s; times rmsgd's [95 %]",
)


def large_cells(row: Mapping[str, Any]) -> list[str]:
    """What the probe of a large checkpoint took; memory is that of a process which does nothing else."""
    memory = f"{row['peak_mib'] / 1024:.2f}" if "peak_mib" in row else "-"
    theirs = f"{row['weightwatcher']:.1f}<br>{_interval(row['faster'], '.1f')}" if "faster" in row else "-"
    stages = " / ".join(str(count) for count in row["stages"].values())
    size = f"{row['parameters'] / 1e6:,.0f} M"
    return [row["what"], size, str(row["layers"]), f"{row['seconds']:.1f}", memory, stages, theirs]


def _probe_large(rows: list[dict[str, Any]]) -> str:
    return _markdown(list(LARGE_HEADINGS), [large_cells(row) for row in rows])


def study_cells(row: dict[str, Any]) -> list[str]:
    """Test accuracy with its deviation, the difference of RMSGD with its interval, and p."""
    measured, difference = row["measured"], row["difference"]
    deviation = "" if math.isnan(measured["std"]) else f" ± {measured['std']:.2f}"
    cells = [f"{measured['mean']:.2f}{deviation}", f"{row['gap']:.2f}", f"{row['Q']:.2f}"]
    if difference is None:
        return [*cells, "-", "-"]
    interval = Interval(difference["mean"], *_bounds((difference["low"], difference["high"])))
    return [*cells, interval.text("+.2f"), f"{difference['p_corrected']:.2g}"]


SAME_LR_HEADINGS = (
    "task (seeds)",
    "SGD",
    "RMSGD",
    "RMSGD minus SGD [95 %]",
    "at the end",
    "loss: SGD",
    "RMSGD minus SGD [95 %]",
    "rates / lr",
    "the letter minus SGD: accuracy; loss",
)


def same_lr_cells(row: Mapping[str, Any]) -> list[str]:
    """A task's held-out accuracies in percent, its training losses in nats, the range of RMSGD's rates.

    Differences are of the same seeds; the letter's are of the few that it has.
    """
    sgd, ours, letter = row["sgd"], row["rmsgd"], row["rmsgd-paper"]
    behind, last = (
        Interval(*(100 * value for value in ours[f"{which}accuracy_difference"])) for which in ("", "last_")
    )
    return [
        f"{row['task']} ({row['seeds']})",
        f"{100 * sgd['accuracy']:.1f}",
        f"{100 * ours['accuracy']:.1f}",
        behind.text("+.2f"),
        last.text("+.2f"),
        f"{sgd['loss']:.3f}",
        Interval(*ours["loss_difference"]).text("+.3f"),
        f"{ours['lowest']:.2f} to {ours['highest']:.2f}",
        f"{100 * letter['accuracy_difference'][0]:+.2f}; {letter['loss_difference'][0]:+.3f}",
    ]


def _same_lr(rows: list[dict[str, Any]]) -> str:
    return _markdown(list(SAME_LR_HEADINGS), [same_lr_cells(row) for row in rows])


def timed_cells(row: Mapping[str, Any]) -> list[str]:
    """Milliseconds of every case, and how many times as long it takes as the first, with its interval."""
    return [
        f"{seconds * 1e3:.1f}" + (f"<br>{_interval(row['ratio'][case])}" if case in row["ratio"] else "")
        for case, seconds in row["seconds"].items()
    ]


def _layer_rates_step(rows: list[dict[str, Any]]) -> str:
    headings = ["a step of fused AdamW, ms; / one group [95 %]", "tensors", "groups", *rows[0]["seconds"]]
    return _markdown(
        headings, [[row["model"], str(row["tensors"]), str(row["groups"]), *timed_cells(row)] for row in rows]
    )


def _layer_rates_end(rows: list[dict[str, Any]]) -> str:
    headings = ["a measurement, ms; / SVD loop [95 %]", "layers", *rows[0]["seconds"]]
    return _markdown(headings, [[row["model"], str(row["layers"]), *timed_cells(row)] for row in rows])


GPT_HEADINGS = (
    "a GPT, nats per byte",
    "held out",
    "minus AdamW [95 %]",
    "training",
    "minus AdamW [95 %]",
    "ratios",
)


def gpt_cells(row: Mapping[str, Any]) -> list[str]:
    """A variant: held-out and training loss with the differences from AdamW, and the range of its ratios."""
    cells = [row["variant"]]
    for key in ("held_out", "training"):
        difference = row.get(f"{key}_difference")
        cells += [f"{row[key]:.3f}", Interval(*difference).text("+.3f") if difference else "-"]
    low, high = row["ratios"]
    return [*cells, f"{low:.2f} to {high:.2f}"]


def _layer_rates_gpt(rows: list[dict[str, Any]]) -> str:
    return _markdown(list(GPT_HEADINGS), [gpt_cells(row) for row in rows])


def _cifar10_rules(rows: list[dict[str, Any]]) -> str:
    headings = ["SGD on CIFAR-10, test accuracy (%)", "mean [95 %]", "minus SGD [95 %]", "p (Holm)"]
    lines = []
    for row in rows:
        difference = row["difference"]
        mean = Interval(row["test_accuracy"], *_bounds(row["interval"])).text(".2f")
        cells = ["-", "-"]
        if difference is not None:
            # It is SGD minus the rule.
            low, high = _bounds((difference["low"], difference["high"]))
            turned = (None, None) if low is None or high is None else (-high, -low)
            cells = [Interval(-difference["mean"], *turned).text("+.2f"), f"{difference['p_corrected']:.2g}"]
        lines.append([row["optimizer"], mean, *cells])
    return _markdown(headings, lines)


def _bounds(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """The bounds of an interval, None where there is none."""
    low, high = (None if value is None or math.isnan(value) else value for value in values)
    return low, high


def _study(rows: list[dict[str, Any]]) -> str:
    headings = ["digits, test accuracy (%)", "mean ± std", "gap", "Q", "rmsgd minus it [95 %]", "p (Holm)"]
    return _markdown(headings, [[row["optimizer"], *study_cells(row)] for row in rows])


def epoch_cells(row: dict[str, Any]) -> list[str]:
    """The parts of an epoch, the epoch, and its ratio to the reference's with its interval."""
    return [
        f"{row['forward_backward']['median']:.2f}",
        f"{1e3 * row['step']['median']:.1f}",
        f"{1e3 * row['epoch_end']['median']:.0f}",
        f"{row['epoch']['median']:.0f}",
        _interval(row["ratio"], ".3f"),
    ]


def _epoch_time(rows: list[dict[str, Any]]) -> str:
    headings = ["epoch", "forward + backward, s", "step, ms", "epoch end, ms", "epoch, s", "/ SGD [95 %]"]
    return _markdown(headings, [[row["optimizer"], *epoch_cells(row)] for row in rows])


def gate_cells(row: dict[str, Any]) -> list[str]:
    """How the runs of one kind ended, and the longest."""
    ends = [str(row[key]) for key in ("runs", "passed", "slower", "undecided")]
    return [*ends, f"{row['longest_s']:.0f}"]


def _gate(rows: list[dict[str, Any]]) -> str:
    headings = ["beside a busy neighbour", "runs", "passed", "called slower", "undecided", "longest run, s"]
    return _markdown(headings, [[row["kind"], *gate_cells(row)] for row in rows])


def split_headings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The headings of what `split_cells` gives."""
    model = " / ".join(rows[0]["modelled_to_one"])
    return ["1 rank, ms", "2 ranks / 1 [95 %]", "work of each, ms", "exchange, ms", f"model: {model}"]


def split_cells(row: dict[str, Any]) -> list[str]:
    """A row's figures: the measured milliseconds, then the modelled shares of one rank's time."""
    seconds = row["seconds"]
    return [
        f"{seconds['one rank'] * 1e3:.0f}",
        _interval(row["two_to_one"]),
        " / ".join(f"{own * 1e3:.0f}" for own in seconds["own work"]),
        f"{seconds['exchange'] * 1e3:.2f}",
        " / ".join(f"{share:.2f}" for share in row["modelled_to_one"].values()),
    ]


def _split(rows: list[dict[str, Any]]) -> str:
    return _markdown(
        ["epoch end", *split_headings(rows)], [[row["model"], *split_cells(row)] for row in rows]
    )


def cost_rows(records: Mapping[str, Any], model: str) -> list[dict[str, Any]]:
    """The rows of the table "cost", on one network's training, taken from the whole tables.

    Args:
        records: the tables "step", "epoch-end", "epoch-time" and "probe-speed".
        model: the network of the first three.

    """
    step, end = (
        next(row for row in records[table] if row["model"] == model) for table in ("step", "epoch-end")
    )
    epoch = {row["optimizer"]: row for row in records["epoch-time"]}
    probe = records["probe-speed"][0]
    return [
        {
            "what": f"step of {model}, to torch's fused SGD",
            "seconds": step["seconds"]["rmsgd"],
            "ratio": step["to_sgd_fused"]["rmsgd"],
        },
        {
            "what": "epoch of it (390 steps and the epoch end), to SGD",
            "seconds": epoch["rmsgd"]["epoch"]["median"],
            "ratio": epoch["rmsgd"]["ratio"],
        },
        {
            "what": "the same with SAM, to SGD",
            "seconds": epoch["sam"]["epoch"]["median"],
            "ratio": epoch["sam"]["ratio"],
        },
        {
            "what": "epoch end alone, times faster than rmsgd 1.0.2",
            "seconds": end["seconds"]["rmsgd"],
            "ratio": end["faster_than_release"],
        },
        {
            "what": f"probe of {probe['model']}, times faster than WeightWatcher",
            "seconds": probe["seconds"]["rmsgd"],
            "ratio": probe["faster"]["weightwatcher"],
        },
    ]


def _cost(rows: list[dict[str, Any]]) -> str:
    def text(seconds: float) -> str:
        if seconds < 0.1:
            return f"{seconds * 1e3:.1f} ms"
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"

    return _markdown(
        ["what it costs", "time", "ratio [95 %]"],
        [
            [
                row["what"],
                text(row["seconds"]),
                _interval(row["ratio"], ".2f" if row["ratio"]["median"] < 10 else ".1f"),
            ]
            for row in rows
        ],
    )


def counted_row(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A network's cells: for each card the milliseconds in the first design, and in the present one."""
    cells = []
    for before, after in zip(rows[::2], rows[1::2], strict=True):
        first = "host" if before["host"] else f"{before['total_ms']:.1f}"
        cells.append(f"{first} → {after['total_ms']:.1f}")
    return [rows[0]["network"], *cells]


def _counted(rows: list[dict[str, Any]]) -> str:
    networks = [list(group) for _, group in groupby(rows, key=lambda row: row["network"])]
    cards = [row["device"] for row in networks[0][::2]]
    return _markdown(["epoch end", *cards], [counted_row(group) for group in networks])


TABLES: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "step": _step,
    "epoch-end": _epoch_end,
    "noise-search": _noise_search,
    "probe-speed": _probe_speed,
    "probe-large": _probe_large,
    "study": _study,
    "cifar10-rules": _cifar10_rules,
    "same-lr": _same_lr,
    "layer-rates-step": _layer_rates_step,
    "layer-rates-end": _layer_rates_end,
    "layer-rates-gpt": _layer_rates_gpt,
    "epoch-time": _epoch_time,
    "gate": _gate,
    "split": _split,
    "cost": _cost,
    "counted": _counted,
}
