"""`python -m bench probe-speed`: `rmsgd.probe` against WeightWatcher on the same state dicts.

Both look at a network's weights alone, and they measure different things. WeightWatcher's `analyze()` (with
its defaults) takes every singular value of one unfolding of each weight and fits a power law to them. Its
stable rank is that of the raw weight, ||W||_F^2 / ||W||_2^2, between 1 and the rank. The stable rank of rmsgd
is that of the low-rank part only, as a share of full rank between 0 and 1, and the mean over both unfoldings
of a convolution. Both are printed side by side. A third case is the least work of any probe by full SVD,
without a power law: SciPy's singular values of every weight, one unfolding each.

`--large` probes a made checkpoint of a billion parameters instead (see `bench.large_checkpoint`), and a tenth
of it beside WeightWatcher.

WeightWatcher is optional (the extra `weightwatcher`); without it its column is absent.
"""

import argparse
import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import rmsgd
from bench import large_checkpoint, measure, output, readme, terminal
from bench.arguments import add_output, add_rounds, refuse
from bench.networks import network, networks
from bench.weights import make_trained_like

MODELS = ("resnet50", "vit-b16")
SHOWN = 4  # layers of each network whose stable ranks are printed
SIZE = large_checkpoint.Size()

StateDict = Mapping[str, Tensor]


def full_svd(state: StateDict) -> None:
    """Every singular value of every weight, one unfolding each, by LAPACK in the weights' precision."""
    for weight in state.values():
        if weight.ndim > 1:
            scipy.linalg.svdvals(weight.flatten(1).numpy())


def weightwatcher() -> Callable[[StateDict], Any] | None:
    """A function that analyses a state dict by WeightWatcher; None where that is not installed."""
    with _silence():
        try:
            from weightwatcher import WeightWatcher
        except ImportError:
            return None
        logging.getLogger("weightwatcher").setLevel(logging.ERROR)

    def analyse(state: StateDict) -> Any:
        with _silence():
            return WeightWatcher(model=dict(state)).analyze()

    return analyse


@contextlib.contextmanager
def _silence():  # type: ignore[no-untyped-def]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def compare(name: str, rounds: int, theirs: Callable[[StateDict], Any] | None) -> dict[str, Any]:
    """The row of one network: seconds of every case in interleaved rounds, and both tools' stable ranks."""
    torch.manual_seed(0)
    module = network(name)
    make_trained_like(module)
    state = {key: value.detach() for key, value in module.state_dict().items()}
    frames: list[Any] = []
    cases: dict[str, Callable[[], object]] = {
        "rmsgd": lambda: rmsgd.probe(state),
        "full SVD": lambda: full_svd(state),
    }
    if theirs is not None:
        cases["weightwatcher"] = lambda: frames.append(theirs(state))
    seconds = measure.interleave(cases, rounds)
    layers = rmsgd.probe(state).measured
    stable_ranks = _by_layer(frames[-1]) if frames else {}
    return {
        "model": name,
        "layers": len(layers),
        "seconds": measure.medians(seconds),
        "faster": measure.ratios(seconds, "rmsgd"),
        "stable_rank": [
            {
                "layer": layer.name,
                "rmsgd": layer.stable_rank,
                "weightwatcher": stable_ranks.get(layer.name.removesuffix(".weight")),
            }
            for layer in layers
        ],
    }


def compare_large(folder: Path, theirs: Callable[[StateDict], Any] | None) -> list[dict[str, Any]]:
    """A row on the whole checkpoint, which is written into this folder for a while, and one on a tenth."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        large_checkpoint.write(Path(place), SIZE)
        whole = large_checkpoint.probe(Path(place), torch.get_num_threads())
    state = large_checkpoint.tenth(SIZE)
    tenth = {key: value for key, value in large_checkpoint.measured(state).items() if "_mib" not in key}
    if theirs is not None:
        tenth["weightwatcher"] = measure.seconds_per_call(lambda: theirs(state), 1, lambda: None)
        tenth["faster"] = measure.ratio([tenth["weightwatcher"]], [tenth["seconds"]])._asdict()
    return [{"what": "whole, bfloat16, from disk", **whole}, {"what": "a tenth, float32", **tenth}]


def large_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A table of what the probes of the large checkpoint took."""
    cells = ([cell.replace("<br>", "\n") for cell in readme.large_cells(row)] for row in rows)
    return terminal.table("Probing a language model of a billion parameters", readme.LARGE_HEADINGS, cells)


def _by_layer(frame: Any) -> dict[str, float]:
    column = "longname" if "longname" in frame else "name"
    return {
        str(name).removesuffix(".weight"): float(value)
        for name, value in zip(frame[column], frame["stable_rank"], strict=True)
    }


def speed_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A table of seconds, and of how many times faster `rmsgd.probe` is."""
    cells = ([row["model"], str(row["layers"]), *readme.probe_cells(row)] for row in rows)
    headings = ("model", "layers", *readme.PROBE_CASES)
    return terminal.table("Probing a state dict: seconds (times rmsgd.probe's)", headings, cells)


def stable_rank_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A table of both stable ranks for a few layers of each network."""
    result = Table(title="Stable rank, two definitions")
    result.add_column("layer", overflow="fold")
    for heading in ("rmsgd: low rank,\nshare of full rank", "WeightWatcher:\nraw weight"):
        result.add_column(heading, justify="right")
    for row in rows:
        layers = row["stable_rank"]
        for i in np.linspace(0, len(layers) - 1, SHOWN).astype(int):
            layer = layers[i]
            theirs = layer["weightwatcher"]
            result.add_row(
                f"{row['model']}: {layer['layer']}",
                f"{layer['rmsgd']:.4f}",
                "absent" if theirs is None else f"{theirs:.2f}",
            )
    return result


def main(arguments: Sequence[str]) -> int:
    """Compares, prints the tables, writes `probe-speed.json` or `probe-large.json`; returns 0."""
    parser = argparse.ArgumentParser(
        prog="python -m bench probe-speed",
        description="Time rmsgd.probe against a full SVD and WeightWatcher on the same state dicts.",
    )
    parser.add_argument(
        "--models", type=networks, default=MODELS, help=f"comma-separated (default: {','.join(MODELS)})"
    )
    parser.add_argument(
        "--large",
        action="store_true",
        help="probe a made checkpoint of a billion parameters instead, and a tenth of it, once each",
    )
    add_rounds(parser, 6)
    add_output(parser, "probe-speed")
    options = parser.parse_args(arguments)
    if options.large:
        refuse(parser, options, ["models", "rounds"], "is not for --large, whose checkpoints are made")
    name = "probe-large" if options.large else "probe-speed"
    output.check(options.out, options.readme, [name])
    theirs = weightwatcher()
    console = Console()
    if options.large:
        rows = compare_large(options.out, theirs)
        console.print(large_table(rows))
    else:
        rows = [compare(model, options.rounds, theirs) for model in options.models]
        console.print(speed_table(rows))
        console.print(stable_rank_table(rows))
    result = {"schema": 1, "machine": measure.machine(), name: rows}
    output.finish(options.out / f"{name}.json", result, console, page=options.readme)
    return 0
