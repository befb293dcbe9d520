"""The runs that the command's arguments select."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from bench import arguments, models, peers
from bench.data.registry import DATASETS
from bench.errors import UsageError
from bench.names import look_up
from bench.study import tuning
from bench.study.config import RunConfig
from bench.study.experiments import EXPERIMENTS, SEARCH, Experiment, Grid, experiment, full, small


def named(options: argparse.Namespace) -> list[str]:
    """The experiments that the arguments name: all of the paper's for "all"."""
    return list(EXPERIMENTS) if "all" in options.ids else list(dict.fromkeys(options.ids))


Rates = Mapping[str, float]
"""From an optimizer, or a variant as `RunConfig.variant` names it, to its learning rate."""

Search = Callable[[Sequence[RunConfig]], Rates]
"""Finds the rates of runs, each of another optimizer or schedule; what is not known yet is left out."""


Parts = dict[str, list[RunConfig]]
"""From a part of an experiment to its runs."""


def by_experiment(
    options: argparse.Namespace, sweeps: bool = True, search: Search = lambda configs: {}
) -> dict[str, Parts]:
    """The runs that the arguments name, by experiment and part, without experiments that have none.

    Args:
        options: the options of the command.
        sweeps: also the runs that differ from their optimizer's own settings before `--set` changes any.
        search: finds the rates of an experiment that tunes them itself; what it does not find leaves the
            runs out. Not called where `--rates` is given.

    Raises:
        UsageError: an experiment, network, data set or optimizer that is not known, or none that has such a
            cell; settings for an optimizer that does not take part.

    """
    _check_names(options.network or (), options.dataset or (), options.optimizers or ())
    known = {name: _sized(experiment(name), options) for name in named(options)}
    runs = {name: _wanted(name, entry, options, sweeps) for name, entry in known.items()}
    if not (everything := each_once(runs)):
        raise UsageError(_no_cell(known))
    changed = arguments.overrides(options.set)
    arguments.check_taking_part(changed, (run.optimizer for run in everything))
    fixed = {key: value for key in ("epochs", "batch") if (value := getattr(options, key)) is not None}
    if options.mode:
        fixed["budget"] = options.mode == "budget"
    rates = tuning.read(options.rates) if options.rates else {}

    def as_said(config: RunConfig) -> RunConfig:
        return replace(config.with_settings(changed.get(config.optimizer, {})), **fixed)

    chosen: dict[str, Parts] = {}
    for name, entry in known.items():
        tuned = entry.search and not options.rates
        said = {part: [as_said(run) for run in mine] for part, mine in runs[name].items()}
        # A sweep goes over fixed rates, of which the optimizer's own is one that no setting shows.
        swept = {part: entry.part(part).sweeps_rates for part in said}
        if tuned:
            wanted = {run.variant for part, mine in said.items() if not swept[part] for run in mine}
            first = {
                run.variant: run for run in reversed([as_said(run) for run in entry.part("main").runs()])
            }
            found = search([run for variant, run in first.items() if variant in wanted])
        for part, mine in said.items():
            if tuned and not swept[part]:
                mine = [tuning.with_rates(run, found) for run in mine if run.variant in found]
            elif not swept[part]:
                mine = [tuning.with_rates(run, rates) for run in mine]
            if mine:
                chosen.setdefault(name, {})[part] = list(dict.fromkeys(mine))
    return chosen


def _sized(entry: Experiment, options: argparse.Namespace) -> Experiment:
    if options.preset == "small":
        return small(entry, options.all)
    return full(entry) if options.preset == "full" else entry


def _wanted(name: str, entry: Experiment, options: argparse.Namespace, sweeps: bool) -> Parts:
    """The runs of the parts of an experiment that the arguments name, the search left out."""
    wanted = options.part or entry.parts
    for part in wanted:
        look_up(f"part of {name}", part, dict.fromkeys(entry.parts))
    parts = tuple(part for part in wanted if part != SEARCH) or ("main",)
    seeds = tuple(range(options.seeds or (1 if options.preset == "small" else 5)))
    return {
        part: [
            run
            for run in _narrow(entry.part(part), options).runs(seeds)
            if (not options.schedules or run.schedule in options.schedules) and (sweeps or not run.settings)
        ]
        for part in parts
    }


def each_once(chosen: Mapping[str, Parts]) -> list[RunConfig]:
    """The runs of all experiments; one that several need is there once."""
    return list(
        dict.fromkeys(config for parts in chosen.values() for runs in parts.values() for config in runs)
    )


def _no_cell(known: dict[str, Experiment]) -> str:
    if len(known) > 1:
        return f"none of {', '.join(known)} has such a cell"
    ((name, entry),) = known.items()
    cells = dict.fromkeys((grid.networks, grid.datasets, grid.optimizers) for grid in entry.grids)
    text = "; ".join(" x ".join(", ".join(part) for part in cell) for cell in cells)
    return f"{name} has no such cell. It has {text}"


def _narrow(entry: Experiment, options: argparse.Namespace) -> Experiment:
    def kept(names: tuple[str, ...], wanted: tuple[str, ...] | None) -> tuple[str, ...]:
        return names if wanted is None else tuple(name for name in wanted if name in names)

    def narrowed(grid: Grid) -> Grid:
        return replace(
            grid,
            networks=kept(grid.networks, options.network),
            datasets=kept(grid.datasets, options.dataset),
            optimizers=kept(grid.optimizers, options.optimizers),
        )

    return replace(entry, grids=tuple(map(narrowed, entry.grids)))


def _check_names(networks: Sequence[str], datasets: Sequence[str], optimizers: Sequence[str]) -> None:
    for name in networks:
        models.architecture(name)
    for name in datasets:
        look_up("data set", name, DATASETS)
    for name in optimizers:
        peers.peer(name)
