"""Layer-wise rates for other optimizers: the cost of a step and of a measurement, and a GPT with every rule.

`groups` times a step of fused AdamW with one group, with a group per layer, and with LayerRates. `epoch-end`
times `LayerRates.step` against a loop of full SVDs over the layers, as the authors of TempBalance measure.
`language` trains a small GPT and draws its losses. Its runs are kept in the folder of the results, and none
is repeated that is there.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench import arguments, measure, output, readme, terminal
from bench.layer_rates import language, plots, speed
from bench.names import look_up
from bench.networks import networks

PARTS = {"groups": speed.step, "epoch-end": speed.epoch_end, "language": language.runs}
MODELS = ("resnet18", "resnet50", "vit-b16", "gpt2")


TABLES = {
    "groups": "layer-rates-step",
    "epoch-end": "layer-rates-end",
    "language": "layer-rates-gpt",
}
"""The name of each part's result, which is also that of its table in the documentation."""


def speed_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """A table of every case's milliseconds, and of how many times as long as the first it takes."""
    cells = (
        [row["model"], *(cell.replace("<br>", "\n") for cell in readme.timed_cells(row))] for row in rows
    )
    return terminal.table(title, ["model", *rows[0]["seconds"]], cells)


def language_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A table of every variant's losses, and of its differences from AdamW."""
    title = "Means over seeds, and differences from AdamW [95 %]"
    return terminal.table(title, readme.GPT_HEADINGS, map(readme.gpt_cells, rows))


def _draw(folder: Path, result: Mapping[str, Any]) -> list[Path]:
    return [plots.losses(folder / "layer-rates-gpt.png", result["runs"])] if "runs" in result else []


def main(given: Sequence[str]) -> int:
    """Measures, prints the tables, writes `layer-rates.json` and the figure; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m bench layer-rates", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(".out/layer-rates"), help="folder of the results")
    parser.add_argument(
        "--parts", type=arguments.names, default=tuple(PARTS), help="comma-separated (default: all)"
    )
    parser.add_argument(
        "--models", type=networks, default=MODELS, help=f"comma-separated (default: {','.join(MODELS)})"
    )
    parser.add_argument("--rounds", type=arguments.positive, default=6, help="interleaved rounds (default 6)")
    parser.add_argument("--threads", type=arguments.positive, default=1, help="threads of torch (default 1)")
    parser.add_argument("--seeds", type=arguments.positive, default=3, help="seeds of the GPT (default 3)")
    parser.add_argument(
        "--steps", type=arguments.positive, default=800, help="steps of a run of the GPT (default 800)"
    )
    parser.add_argument("--readme", type=Path, help="rewrite the tables of this file")
    options = parser.parse_args(given)
    for part in options.parts:
        look_up("part", part, PARTS)
    if "language" not in options.parts:
        arguments.refuse(parser, options, ["seeds", "steps"], "is for the part language")
    if set(options.parts) == {"language"}:
        arguments.refuse(parser, options, ["models", "rounds"], "is for the parts groups and epoch-end")
    output.check(options.out, options.readme, [TABLES[part] for part in options.parts])
    torch.set_num_threads(options.threads)
    console = Console()
    result: dict[str, Any] = {"schema": 1, "machine": measure.machine()}
    if "groups" in options.parts:
        rows = speed.rows(speed.step, options.models, 5 * options.rounds)
        result[TABLES["groups"]] = rows
        console.print(speed_table("A step of AdamW, fused", rows))
    if "epoch-end" in options.parts:
        rows = speed.rows(speed.epoch_end, options.models, options.rounds)
        result[TABLES["epoch-end"]] = rows
        console.print(speed_table("A measurement of all layers", rows))
    if "language" in options.parts:
        with Progress() as progress:
            bar = progress.add_task("training", total=options.seeds * len(language.VARIANTS))
            found = language.runs(options.out, options.seeds, options.steps, lambda: progress.advance(bar))
        result[TABLES["language"]] = rows = language.summary(found)
        result["runs"] = found
        terminal.show(language_table(rows), console)
    path = options.out / "layer-rates.json"
    output.finish(path, result, console, page=options.readme, draw=partial(_draw, options.out, result))
    return 0
