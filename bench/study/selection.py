"""Which runs the command's arguments mean."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace

from bench import arguments, models, peers
from bench.data.study_sets import DATASETS
from bench.errors import UsageError
from bench.names import look_up
from bench.study import tuning
from bench.study.config import RunConfig, sorted_settings
from bench.study.experiments import EXPERIMENTS, Experiment, Grid, experiment, small


def named(options: argparse.Namespace) -> list[str]:
    """The experiments that the arguments name: all of the paper's for "all"."""
    return list(EXPERIMENTS) if "all" in options.ids else list(dict.fromkeys(options.ids))


def by_experiment(options: argparse.Namespace, sweeps: bool = True) -> dict[str, list[RunConfig]]:
    """The runs that the arguments name, by experiment, without experiments that have none.

    Args:
        options: of the command.
        sweeps: also the runs that differ from their optimizer's own settings before `--set` changes any.

    Raises:
        UsageError: an experiment, network, data set or optimizer that is not known, or none that has such a
            cell; settings for an optimizer that does not take part.

    """
    _check_names(options.network or (), options.dataset or (), options.optimizers or ())
    seeds = range(options.seeds or (1 if options.preset else 5))
    known = {name: experiment(name) for name in named(options)}
    if options.preset:
        known = {name: small(entry, options.all) for name, entry in known.items()}
    chosen = {name: _narrow(entry, options).runs(tuple(seeds)) for name, entry in known.items()}
    if not sweeps:
        chosen = {name: [run for run in runs if not run.settings] for name, runs in chosen.items()}
    chosen = {name: runs for name, runs in chosen.items() if runs}
    if not chosen:
        raise UsageError(_no_cell(known))
    changed = arguments.overrides(options.set)
    arguments.check_taking_part(changed, (run.optimizer for runs in chosen.values() for run in runs))
    fixed = {key: value for key in ("epochs", "batch") if (value := getattr(options, key)) is not None}
    if options.mode:
        fixed["budget"] = options.mode == "budget"
    rates = tuning.read(options.rates) if options.rates else {}

    def as_said(name: str, config: RunConfig) -> RunConfig:
        settings = {**dict(config.settings), **changed.get(config.optimizer, {})}
        said = replace(config, settings=sorted_settings(settings), **fixed)
        # A sweep goes over fixed rates, of which the optimizer's own is one that no setting shows.
        return said if known[name].sweeps_rates else tuning.with_rates(said, rates)

    return {name: list(dict.fromkeys(as_said(name, run) for run in runs)) for name, runs in chosen.items()}


def each_once(chosen: Mapping[str, Sequence[RunConfig]]) -> list[RunConfig]:
    """The runs of all experiments; one that several need is there once."""
    return list(dict.fromkeys(config for runs in chosen.values() for config in runs))


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
