"""`python -m bench study`: arguments, progress, and what to do when something is wrong."""

import argparse
import errno
import json
import math
import os
import shlex
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bench import arguments, measure, output, readme, terminal
from bench.data.nats import LAYOUT as NATS_LAYOUT
from bench.errors import UsageError
from bench.locks import BusyError
from bench.study import fit, listing, nats_study, part_plots, parts, report, table, tuning
from bench.study.config import RunConfig
from bench.study.experiments import EXPERIMENTS, OWN, SEARCH, SEARCHED, experiment
from bench.study.plots import draw
from bench.study.records import Record, read
from bench.study.runner import ERROR, Place, Runner, train_all
from bench.study.schedules import OWN as OWN_SCHEDULE
from bench.study.schedules import SCHEDULES
from bench.study.selection import Parts, Search, by_experiment, each_once, named

OUT = Path(".out/study")
PROGRESS = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
SCHEMA = "rmsgd-bench-study/1"
SEEDS_LOOKED_FOR = 20
FIT = "fit.json"
"""In the folder of the runs: how many epochs and seeds --minutes allows."""

WAIT_SECONDS = 5.0
"""Before asking again for runs that another process is at, where others depend on them."""
ENDS = {
    "diverged": "its loss stopped being a number; the others go on",
    "busy": "another process is at it",
    "failed": f"it raised an error, which {ERROR} in its folder shows; the others go on",
}


class FailedRunsError(RuntimeError):
    """Runs failed that others depend on."""


def main(given: Sequence[str]) -> int:
    """Runs the command.

    Returns:
        0 when all runs have ended, of every optimizer at least one that did not diverge; 1 when an optimizer
        diverged in all of its runs, a run failed, another process is at one, or a file could not be read or
        written; 130 when interrupted. Bad arguments exit with 2.

    """
    options = _parser().parse_args(given, argparse.Namespace(given=list(given)))
    if getattr(options, "all", False) and options.preset != "small":
        raise UsageError("--all is for --preset small, which takes two networks of each experiment by itself")
    console = Console(stderr=True)
    try:
        return options.act(options, console)
    except (BusyError, FailedRunsError) as error:
        terminal.say(str(error), console)
        return 1
    except OSError as error:
        terminal.say(_failed(error, options.out), console)
        return 1
    except KeyboardInterrupt:
        terminal.say("interrupted: the same command goes on from the last checkpoint", console)
        return 130


def _failed(error: OSError, out: Path) -> str:
    """What went wrong with a file, and what to do about a disk that is full."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{error.strerror}: {error.filename or out}. The last checkpoint is intact: make room and give "
            "the same command again."
        )
    return f"{error.strerror}: {error.filename}" if error.strerror and error.filename else str(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench study",
        description="The paper's tables and figures: what was published, runs that repeat it, comparison.",
    )
    commands = parser.add_subparsers(metavar="ACTION", required=True)
    known = f"Experiments: {', '.join(EXPERIMENTS | OWN)}."

    show = commands.add_parser("list", help="experiments and published numbers", epilog=known)
    show.add_argument("ids", nargs="*", metavar="ID", help="experiments to show in full, or notes")
    show.add_argument("--json", action="store_true", help="everything, as JSON")
    show.set_defaults(act=_list, out=OUT)

    run = commands.add_parser("run", help="train what experiments need; done runs are skipped", epilog=known)
    run.add_argument("ids", nargs="+", metavar="ID", help="experiments, or all")
    _selection(run, "5; preset small: 1")
    _rates(run)
    _place(run)
    _minutes(run)
    run.set_defaults(act=_run)

    tune = commands.add_parser("tune", help="search every optimizer's initial learning rate", epilog=known)
    tune.add_argument(
        "ids",
        nargs="*",
        default=["table1a"],
        metavar="ID",
        help="whose cells to tune on (default: ResNet18 on CIFAR-10, as the paper)",
    )
    _selection(tune, "1")
    _place(tune)
    tune.add_argument(
        "--factors",
        type=_factors,
        default=tuning.FACTORS,
        metavar="X,Y,...",
        help=f"of each optimizer's own rate (default: {','.join(map(str, tuning.FACTORS))})",
    )
    tune.set_defaults(act=_tune, rates=None)

    nats = commands.add_parser("nats", help="figure 2 (b): Q of NATS-Bench's networks")
    nats.add_argument("folder", type=Path, metavar="DIR", help=NATS_LAYOUT)
    nats.add_argument("--dataset", default="cifar10", choices=("cifar10", "cifar100", "ImageNet16-120"))
    nats.add_argument("--most", type=arguments.positive, help="architectures to measure (default: all)")
    nats.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="default: %(default)s")
    nats.set_defaults(act=_nats)

    tell = commands.add_parser(
        "report", help="measured against published; figures; takes the arguments of run", epilog=known
    )
    tell.add_argument("ids", nargs="*", default=["all"], metavar="ID", help="experiments (default: all)")
    _selection(tell, f"all that there are, up to {SEEDS_LOOKED_FOR}")
    _rates(tell)
    _place(tell)
    _minutes(tell)
    tell.add_argument(
        "--records",
        type=Path,
        metavar="FILE",
        help="read the runs from this table, which --save-records wrote, instead of --out",
    )
    tell.add_argument(
        "--save-records",
        type=Path,
        metavar="FILE",
        help="of an experiment that has parts: write a table with a row for every run and epoch",
    )
    tell.add_argument("--json", type=Path, metavar="FILE", help="also write what is printed, as JSON")
    tell.add_argument(
        "--readme",
        type=Path,
        metavar="FILE",
        help="rewrite the table of digits or cifar10-rules in this file",
    )
    tell.set_defaults(act=_report)
    return parser


def _selection(parser: argparse.ArgumentParser, seeds: str) -> None:
    add = parser.add_argument
    add("--network", type=arguments.names, metavar="A,B,...", help="only these networks")
    add("--dataset", type=arguments.names, metavar="A,B,...", help="only these data sets")
    add("--optimizers", type=arguments.names, metavar="A,B,...", help="only these optimizers")
    add(
        "--schedules",
        type=arguments.some_of("schedule", dict.fromkeys((OWN_SCHEDULE, *SCHEDULES))),
        metavar="A,B,...",
        help=f"only runs with these schedules of the rate: {', '.join((OWN_SCHEDULE, *SCHEDULES))}",
    )
    add("--seeds", type=arguments.positive, help=f"how many seeds, from 0 on (default: {seeds})")
    add(
        "--part",
        type=arguments.names,
        metavar="A,B,...",
        help="only these parts of an experiment that has parts (cifar10-small: "
        f"{', '.join(experiment('cifar10-small').parts)}); rates are tuned before they are needed",
    )
    add(
        "--preset",
        choices=("small", "full"),
        help="small: digits, an eighth of the width, 3 epochs, minutes on two cores; "
        "full: cifar10-small on all images for 8 epochs",
    )
    add("--all", action="store_true", help="with --preset small: all networks, not two of each experiment")
    add("--epochs", type=arguments.positive, help="instead of the paper's")
    add("--batch", type=arguments.positive, help="instead of the paper's")
    add(
        "--mode",
        choices=("budget", "epochs"),
        help="stop after SGD's time, or after epochs",
    )
    arguments.add_settings(parser)


def _rates(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rates",
        type=Path,
        metavar="FILE",
        help="learning rates that `study tune` found; a sweep over rates (fig2) keeps its own",
    )


def _minutes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--minutes",
        type=arguments.above_zero,
        metavar="N",
        help="as many epochs with as many seeds as every optimizer can have in this time: run decides that "
        "once, by timing some steps, and report looks for those runs",
    )


def _place(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        metavar="PATH",
        help="holds the data set, or a folder of its name that does; or a zip of class folders",
    )
    add("--out", type=Path, default=OUT, metavar="DIR", help="holds a folder per run (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default here: %(default)s")
    add("--threads", type=arguments.positive, help="threads on the CPU (default: preset small 1, else all)")
    add(
        "--checkpoint-every",
        type=_seconds,
        default=300.0,
        metavar="SECONDS",
        help="between checkpoints inside an epoch, 0: after every step; there is one at each epoch end "
        "(default: %(default)g)",
    )
    add("--deterministic", action="store_true", help="on a GPU: slower, and a resumed run is bit-identical")


def _list(options: argparse.Namespace, console: Console) -> int:
    out = Console()
    if options.json:
        print(json.dumps(measure.plain(listing.as_dict()), indent=1))
        return 0
    ids = [name for name in options.ids if name != "notes"]
    for name in ids:
        experiment(name)
    if ids or not options.ids:
        listing.show(ids, out)
    if "notes" in options.ids:
        listing.show_notes(out)
    return 0


def _run(options: argparse.Namespace, console: Console) -> int:
    runner = Runner(prepare(options))
    with arguments.torch_threads(_threads(options)):
        configs = each_once(_selected(options, console, search=partial(_train_search, runner, console)))
        if options.minutes:
            configs = _fitted(runner, configs, options, console)
        ends = {} if options.part == (SEARCH,) else train_with_progress(runner, configs, console)
    said = ", ".join(f"{count} {how}" for how, count in Counter(ends.values()).items())
    again = shlex.join(["report", *options.given[1:]])
    terminal.say(f"{said}; in {options.out}. Next: python -m bench study {again}", console)
    return _status(ends, console)


def _train_search(runner: Runner, console: Console, configs: Sequence[RunConfig]) -> dict[str, float]:
    """Trains what the search over the rates of these runs needs and returns the rates, by variant."""
    while True:
        found = tuning.searched(configs, runner.records)
        missing = [run for entry in found.values() for run in entry.missing]
        if not missing:
            if found:
                Console().print(tuning.search_table(found))
            return tuning.rates(found)
        ends = train_with_progress(runner, missing, console)
        if failed := Counter(ends.values())["failed"]:
            raise FailedRunsError(f"{failed} runs of the search failed, so no rates can be chosen")
        if set(ends.values()) == {"busy"}:
            time.sleep(WAIT_SECONDS)


def _fitted(
    runner: Runner, configs: Sequence[RunConfig], options: argparse.Namespace, console: Console
) -> list[RunConfig]:
    """The runs that fit into the minutes given: seed by seed, of so many epochs that all optimizers end."""
    chosen = fit.chosen(runner, configs, 60 * options.minutes, options.out / FIT)
    terminal.say(chosen.text(), console)
    return chosen.runs(configs)


def _status(ends: Mapping[RunConfig, str], console: Console) -> int:
    """The exit status after runs that ended so, and a word about what is missing."""
    count = Counter(ends.values())
    if busy := count["busy"]:
        terminal.say(
            f"another process is at {busy} of these runs: the same command takes what it leaves", console
        )
    if failed := count["failed"]:
        terminal.say(f"{failed} failed: the same command tries them again", console)
    good = {config.optimizer for config, how in ends.items() if how != "diverged"}
    if lost := [name for name in dict.fromkeys(config.optimizer for config in ends) if name not in good]:
        terminal.say(f"diverged in every run: {', '.join(lost)}", console)
    return 1 if busy or failed or lost else 0


def _tune(options: argparse.Namespace, console: Console) -> int:
    if options.ids == ["table1a"]:
        options.network = options.network or ("resnet18",)
        options.dataset = options.dataset or (None if options.preset else ("cifar10",))
    options.seeds = options.seeds or 1
    if any(key == "lr" for _, key, _ in options.set):
        raise UsageError("tune searches lr: --set is for other settings, --factors for the rates to try")
    chosen = each_once(_selected(options, console, sweeps=False))
    configs = tuning.grid(chosen, options.factors)
    names = dict.fromkeys(config.optimizer for config in chosen)
    if unsearched := [name for name in names if name in SEARCHED]:
        terminal.say(f"{', '.join(unsearched)}: searches its rate itself, so there is none to tune", console)
    if not configs:
        raise UsageError("no optimizer is left to tune")
    place = prepare(options)
    with arguments.torch_threads(_threads(options)):
        ends = train_with_progress(Runner(place), configs, console)
    status = _status(ends, console)
    if {"busy", "failed"} & set(ends.values()):
        terminal.say("no rate is chosen before they have ended", console)
        return status
    records = read(options.out, configs)
    found = tuning.best(records, options.factors)
    out = Console()
    out.print(tuning.table(found))
    # As many networks, trained well and badly, are what the paper's figure 2 is drawn of.
    together = report.correlations(records)
    if together:
        out.print(report.correlation_table(together))
    path = options.out / "rates.json"
    tuning.write(path, found, configs[0], together)
    drawn = output.figures(lambda: draw("fig2", records, options.out / "figures-tuning"), console)
    output.say([path, *drawn], console)
    terminal.say(
        f"Next: python -m bench study run {' '.join(options.ids)} --rates {path}, with the --data, "
        "--preset and filters of this search",
        console,
    )
    return status


def _nats(options: argparse.Namespace, console: Console) -> int:
    table = options.out / f"nats-{options.dataset}.csv"
    with Progress(*PROGRESS, MofNCompleteColumn(), TextColumn("networks"), console=console) as progress:
        task = progress.add_task("measuring", total=None)
        rows = nats_study.measure(
            options.folder,
            table,
            options.dataset,
            options.most,
            lambda done, of: progress.update(task, completed=done, total=of),
        )
    Console().print(nats_study.table(nats_study.correlations(rows)))
    drawn = output.figures(lambda: [nats_study.draw(rows, table.with_suffix(".png"))], console)
    output.say([table, *drawn], console)
    return 0


def _factors(text: str) -> tuple[float, ...]:
    factors = tuple(map(arguments.number, text.split(",")))
    if not all(0 < factor < math.inf for factor in factors):
        raise argparse.ArgumentTypeError(f"expected positive numbers like 0.1,1,10, got {text!r}")
    return factors


def _seconds(text: str) -> float:
    seconds = arguments.number(text)
    if not seconds >= 0:
        raise argparse.ArgumentTypeError(f"expected seconds, 0 or more, got {text!r}")
    return seconds


def _report(options: argparse.Namespace, console: Console) -> int:
    if options.seeds is None:
        options.seeds = SEEDS_LOOKED_FOR
    out = Console()
    content: dict[str, Any] = {}
    written: list[Path] = []
    machine: dict[str, Any] = {}
    look = _records(options)
    searches: dict[str, tuning.Found] = {}

    def rates(runs: Sequence[RunConfig]) -> dict[str, float]:
        searches.update(tuning.searched(runs, look))
        return tuning.rates(searches)

    chosen = _selected(options, console, search=rates)
    if options.minutes:
        fitted = fit.decided(each_once(chosen), options.out / FIT)
        chosen = {
            name: {part: fitted.runs(runs) for part, runs in by_part.items()}
            for name, by_part in chosen.items()
        }
    for name, by_part in chosen.items():
        configs = each_once({name: by_part})
        records = look(configs)
        if not records:
            continue
        machine = machine or records[0].machine
        if experiment(name).scheduled:
            ended = parts.with_own_runs({part: look(mine) for part, mine in by_part.items()})
            searched = look([run for found in searches.values() for run in tuning.tried(found)])
            content[name], tables = parts.tables(ended, searches, searched)
            if options.save_records:
                written += _save(options.save_records, [*searched, *records], ended)
            draw_it = partial(part_plots.draw, options.out / "figures" / name, ended, searches, searched)
        else:
            _name_missing(name, configs, records, options, console)
            content[name], tables = report.tables(name, records)
            draw_it = partial(draw, name, records, options.out / "figures")
        for shown in tables:
            out.print(shown)
        written += output.figures(draw_it, console)
    if not content:
        raise UsageError(
            f"{options.out} has no ended run of {', '.join(chosen)} as the arguments say: give those of run"
        )
    if options.json:
        whole = {"schema": SCHEMA, "machine": machine, "experiments": content}
        measure.write_json(options.json, whole)
        written.append(options.json)
    if options.readme:
        rows = {table: of(content[name]) for name, (table, of) in README_ROWS.items() if name in content}
        if not rows:
            raise UsageError("--readme is for the tables of digits and cifar10-rules: report one of them")
        readme.rewrite(options.readme, {"machine": machine, **rows})
        written.append(options.readme)
    if written:
        output.say(written, console)
    return 0


README_ROWS: Mapping[str, tuple[str, Callable[[dict[str, Any]], list[dict[str, Any]]]]] = {
    "digits": ("study", report.readme_rows),
    "cifar10-rules": ("cifar10-rules", parts.rules_rows),
}
"""From an experiment to its table in a page, and the function that makes the table's rows of a report."""


def _name_missing(
    name: str,
    configs: Sequence[RunConfig],
    records: Sequence[Record],
    options: argparse.Namespace,
    console: Console,
) -> None:
    """Names the optimizers of which no run has ended."""
    ended = {record.config.optimizer for record in records}
    if missing := dict.fromkeys(c.optimizer for c in configs if c.optimizer not in ended):
        hint = "" if options.rates else "; where they were run with --rates FILE, give that too"
        terminal.say(f"{name}: no ended run of {', '.join(missing)}{hint}", console)


def _records(options: argparse.Namespace) -> tuning.Look:
    """Where a report finds the records of runs."""
    if options.records is None:
        return partial(read, options.out)
    known = table.read(options.records)
    return lambda configs: [known[config] for config in configs if config in known]


def _save(path: Path, records: Sequence[Record], ended: Mapping[str, Sequence[Record]]) -> list[Path]:
    """Writes the table of records, with the layers of the best runs of RMSGD and SGD."""
    output.check_file(path)
    main = ended.get("main", ())
    in_full = [run for name in ("rmsgd", "sgd") if (run := parts.best(main, name))]
    return table.write(path, list({record.config: record for record in records}.values()), in_full)


def _selected(
    options: argparse.Namespace, console: Console, sweeps: bool = True, search: Search = lambda configs: {}
) -> dict[str, Parts]:
    """The runs that the arguments name, by experiment; a word about experiments that have none."""
    chosen = by_experiment(options, sweeps, search)
    if without := [name for name in named(options) if name not in chosen]:
        terminal.say(f"no such cell in {', '.join(without)}", console)
    return chosen


def prepare(options: argparse.Namespace) -> Place:
    """Checks the device and where to write, and makes torch deterministic where that is asked for."""
    if options.deterministic:
        # Read when the first context is made, which is what checking the device does.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    arguments.check_device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    return Place(options.out, options.data, torch.device(options.device), options.checkpoint_every)


def _threads(options: argparse.Namespace) -> int:
    # Batches of digits are so small that a second thread costs as much as it brings.
    return options.threads or (1 if _on_one_thread(options) else torch.get_num_threads())


def _on_one_thread(options: argparse.Namespace) -> bool:
    return options.preset == "small" or any(experiment(name).search for name in options.ids if name != "all")


def train_with_progress(
    runner: Runner, configs: Sequence[RunConfig], console: Console
) -> dict[RunConfig, str]:
    """Trains the runs under a bar for all and a line for each that ends otherwise than well."""
    for config in configs:
        runner.prepare(config)  # images that are decoded now have a bar of their own
    columns = (*PROGRESS, TextColumn("{task.completed:.1f}/{task.total:.0f} runs"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting", total=len(configs))
        ended = 0

        def tell(config: RunConfig, text: str, share: float) -> None:
            said = f"{config.network} on {config.dataset}, {text}, seed {config.seed}"
            progress.update(task, completed=ended + min(share, 1.0), description=said)

        def end(config: RunConfig, how: str) -> None:
            nonlocal ended
            ended += 1
            progress.update(task, completed=ended)
            if how != "complete":
                run = f"{config.label}, {config.network} on {config.dataset}, seed {config.seed}"
                terminal.say(f"{run}: {ENDS[how]}", progress.console)

        return train_all(runner, configs, tell, end)
