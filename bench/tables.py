"""`python -m bench tables`: the measured tables of README and docs, from the recorded results.

The commands that measure write their own tables with `--readme`. This command measures nothing. It is for
tables whose form has changed, and for the table "cost", which combines the results of several commands.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import readme
from bench.errors import UsageError
from bench.study import parts, report

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
PAGES = (
    *(ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "layer-rates", "learning-rates", "study")),
    ROOT / "README.md",
)


def recorded(folder: Path) -> list[dict[str, Any]]:
    """The recorded results of a folder, as `readme.rewrite` takes them.

    Raises:
        UsageError: a file is missing or damaged.

    """

    def read(name: str) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{folder / name}: {error}") from None
        return content

    speed, probe = read("speed-cpu.json"), read("probe-speed.json")
    epoch, digits = read("epoch-time-resnet18-cpu.json"), read("study-digits.json")
    epoch["epoch-time"] = epoch["optimizers"]
    digits["study"] = report.readme_rows(digits["experiments"]["digits"])
    cost = {"machine": speed["machine"], "cost": readme.cost_rows({**speed, **probe, **epoch}, "resnet18")}
    others = [read(f"{name}.json") for name in ("split-cpu", "noise-search", "gate")]
    for some in ("same-lr.json", "probe-large.json", "layer-rates*.json"):
        others += [read(path.name) for path in sorted(folder.glob(some))]
    for path in folder.glob("study-cifar10-rules.json"):
        rules = read(path.name)
        rules["cifar10-rules"] = parts.rules_rows(rules["experiments"]["cifar10-rules"])
        others.append(rules)
    return [speed, probe, epoch, digits, cost, *others]


def rewrite(page: Path, results: Sequence[dict[str, Any]]) -> None:
    """Write every marked table of a page for which there is a result."""
    text = page.read_text(encoding="utf-8")
    for result in results:
        known = {name: rows for name, rows in result.items() if f"<!-- measured: {name} -->" in text}
        readme.rewrite(page, {"machine": result["machine"], **known})


def main(arguments: Sequence[str]) -> int:
    """Writes the tables and prints the pages' names; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m bench tables", description=__doc__.split("\n\n")[0])
    parser.add_argument("pages", nargs="*", type=Path, default=PAGES, metavar="PAGE")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the recorded results")
    options = parser.parse_args(arguments)
    results = recorded(options.results)
    for page in options.pages:
        rewrite(page, results)
        print(f"wrote {page}")
    return 0
