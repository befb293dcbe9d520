"""The paper's tables and figures as sets of runs.

A run belongs to no experiment. A figure that needs the runs of a table finds them done.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from bench import peers
from bench.names import look_up
from bench.study.config import RunConfig

SMALL_WIDTH = 0.125
SMALL_BATCH = 64
SMALL_EPOCHS = 3
FULL_EPOCHS = 8
# How much smaller the preset's batches are than the paper's, for the study of batch sizes.
SMALL_BATCH_FACTOR = 8

SEARCH = "tuning"
"""The name of the part in which an experiment tunes learning rates."""

# Optimizers that search their step on every batch. Their `lr` is where the first search begins, and not a
# rate.
SEARCHED = ("sls",)
RMSGD = ("rmsgd", "rmsgd-published")
TABLE_1A = ("adabelief", "adabound", "adagrad", "adam", "adamp", "sls", "sam", "sgd", "sgdp", *RMSGD)
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
CIFAR = ("cifar10", "cifar100")


def scaled_rate(optimizer: str, factor: float) -> float | None:
    """An optimizer's own rate times `factor`, to six digits; None where it searches its rate itself."""
    if optimizer in SEARCHED:
        return None
    return float(f"{factor * peers.peer(optimizer).settings['lr']:.6g}")


@dataclass(frozen=True)
class Grid:
    """Every combination of networks, data sets, optimizers and the values of one swept quantity.

    Attributes:
        networks, datasets, optimizers: names.
        common: fields of `RunConfig` that all share.
        sweep: the quantity: "batch", "lr" (values are factors on each optimizer's own rate; one that
            searches its rate runs once) or a setting of the optimizers; None for no sweep.
        values: the values of the quantity.
        part: the part of the experiment, if it has parts: see `Experiment.search`.
        seeds: the most seeds of the grid; None: all that are asked for.

    """

    networks: tuple[str, ...]
    datasets: tuple[str, ...]
    optimizers: tuple[str, ...]
    common: Mapping[str, Any] = field(default_factory=dict)
    sweep: str | None = None
    values: tuple[float, ...] = ()
    part: str = "main"
    seeds: int | None = None

    def runs(self, seeds: Sequence[int]) -> Iterator[RunConfig]:
        """The runs, seeds innermost."""
        for dataset, network, value, optimizer, seed in product(
            self.datasets, self.networks, self.values or (None,), self.optimizers, seeds[: self.seeds]
        ):
            run = RunConfig(network, dataset, optimizer, seed, **self.common)
            yield run if value is None else self._with(run, value)

    def _with(self, run: RunConfig, value: float) -> RunConfig:
        if self.sweep == "batch":
            return replace(run, batch=int(value))
        assert self.sweep is not None
        own = peers.peer(run.optimizer).settings.get(self.sweep)
        new = scaled_rate(run.optimizer, value) if self.sweep == "lr" else value
        if new in (None, own):
            return run
        return run.with_settings({self.sweep: new})


@dataclass(frozen=True)
class Experiment:
    """A table or figure of the paper.

    Attributes:
        title: what it shows.
        grids: the runs it needs.
        epochs: the epochs at which it reports; empty for the end of the training.
        search: whether the experiment has parts and first tunes the learning rate of every optimizer and
            schedule of its main part, on held-out images, by `bench.study.tuning.search`.

    """

    title: str
    grids: tuple[Grid, ...]
    epochs: tuple[int, ...] = ()
    search: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its parts, in order; the search is the first of one that has it."""
        parts = tuple(dict.fromkeys(grid.part for grid in self.grids))
        return (SEARCH, *parts) if self.search else parts

    @property
    def scheduled(self) -> bool:
        """Whether it chooses the schedules: its report is that of `bench.study.parts`."""
        return any("schedule" in grid.common for grid in self.grids)

    def part(self, name: str) -> "Experiment":
        """The experiment with one of its parts alone."""
        return replace(self, grids=tuple(grid for grid in self.grids if grid.part == name))

    def runs(self, seeds: Sequence[int] = (0,)) -> list[RunConfig]:
        """Its runs, each once."""
        return list(dict.fromkeys(run for grid in self.grids for run in grid.runs(seeds)))

    @property
    def sweeps_rates(self) -> bool:
        """Whether it varies learning rates."""
        return any(grid.sweep == "lr" for grid in self.grids)


_BUDGET = {"budget": True}
_FIXED = {"epochs": 140}
_PATHOLOGY = ("resnet18-imagenet", "resnet34-imagenet", "mobilenetv2-imagenet")
_TABLE_1B = (*RESNETS, "resnext29", "mobilenetv2", "senet18", "efficientnetb0", "shufflenetv2")

EXPERIMENTS: dict[str, Experiment] = {
    "table1a": Experiment(
        "Test accuracy on CIFAR in the time of 250 SGD epochs",
        (Grid((*RESNETS, "resnext29"), CIFAR, TABLE_1A, _BUDGET),),
    ),
    "table1b": Experiment(
        "The same with Cutout",
        (Grid(_TABLE_1B, CIFAR, ("sam", "sgd", "sgdp", *RMSGD), _BUDGET | {"cutout": True}),),
    ),
    "table2": Experiment(
        "MobileNetV2 on ImageNet, batches of 128, after 150 and 250 epochs",
        (Grid(("mobilenetv2-imagenet",), ("imagenet",), ("sam", "sgd", *RMSGD)),),
        epochs=(150, 250),
    ),
    "table3": Experiment(
        "MobileNetV2 and ResNet50 on ImageNet, batches of 256",
        (
            Grid(
                ("mobilenetv2-imagenet", "resnet50-imagenet"),
                ("imagenet",),
                ("sam", "sgd", "adamp", *RMSGD),
                {"batch": 256},
            ),
        ),
    ),
    "table4": Experiment(
        "Computational pathology: MHIST, and ADP with several labels an image",
        (Grid(_PATHOLOGY, ("mhist", "adp"), ("adam", "adamp", "sam", "sgd", "sgdp", *RMSGD)),),
    ),
    "fig1a": Experiment(
        "Low rank and noise of one layer of ResNet34 over the epochs",
        (Grid(("resnet34",), ("cifar10",), ("rmsgd",), {"keep_weights": True}),),
    ),
    "fig1b": Experiment(
        "Quality of every layer of ResNet34 over the epochs, weak and strong optimizers",
        (Grid(("resnet34",), ("cifar10",), ("adam", "adagrad", "adabound", "sgd", "sam", *RMSGD), _BUDGET),),
    ),
    "fig2": Experiment(
        "Q against generalisation gap and test accuracy over optimizers, rates and ResNets; NATS-Bench",
        (Grid(RESNETS, CIFAR, TABLE_1A, _BUDGET, sweep="lr", values=(0.1, 0.3, 1.0, 3.0)),),
    ),
    "fig3": Experiment(
        "Stable rank, condition, Q and rates over 140 epochs; the momentum beta of the rates",
        (
            Grid(("resnet50",), ("cifar10",), ("adam", "sgd", "sam", *RMSGD), _FIXED),
            Grid(
                ("resnet34",), ("cifar10",), ("rmsgd",), {}, sweep="beta", values=(0.8, 0.9, 0.95, 0.98, 0.99)
            ),
        ),
    ),
    "fig4": Experiment(
        "Accuracy against time, training against test, and batch sizes",
        (
            Grid(("resnet34", "resnet50"), CIFAR, TABLE_1A, _BUDGET),
            Grid(("resnet18",), ("cifar10",), ("sam", "sgd", "rmsgd"), {}, "batch", (128, 256, 512, 1024)),
        ),
    ),
}


_DIGITS = {"batch": 64, "epochs": 20, "width": 0.5}
_NETWORK = ("resnet14-digits",)

# One CPU core trains this in about half a minute: a fifth of CIFAR-10's images, half of its test set.
_SHORT: dict[str, Any] = {
    "batch": 128,
    "epochs": 6,
    "images": 10_000,
    "judged": 5_000,
    "channels_last": True,
    "settings": (("weight_decay", 5e-4),),
}
_RULES = ("rmsgd", "rmsgd-paper", "rmsgd-published")
_FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)


def _cifar10(
    optimizers: tuple[str, ...], schedule: str, common: Mapping[str, Any] | None = None, **grid: Any
) -> Grid:
    """A grid of the study of CIFAR-10 on one core."""
    shared = {**_SHORT, "schedule": schedule, **(common or {})}
    return Grid(("resnet8-stride2",), ("cifar10",), optimizers, shared, **grid)


def _counts(
    count: int,
    betas: tuple[float, ...],
    schedule: str = "constant",
    epochs: int = _SHORT["epochs"],
    seeds: int | None = 2,
) -> Grid:
    """RMSGD measuring so many times in a run of so many epochs, with several momenta of its rates."""
    common: dict[str, Any] = {"epochs": epochs}
    if count != epochs:  # one an epoch is what a run does by itself
        common["measurements"] = count
    return _cifar10(
        ("rmsgd",), schedule, common, sweep="beta", values=betas, part="measurements", seeds=seeds
    )


_CIFAR10_SMALL = Experiment(
    "Not in the paper: what RMSGD is worth on CIFAR-10, on one CPU core; in parts",
    (
        *(_cifar10(_RULES, schedule) for schedule in ("constant", "cosine")),
        *(_cifar10(("sgd",), schedule) for schedule in ("constant", "step", "cosine", "onecycle")),
        _cifar10(("adamw",), "cosine", {"settings": ()}),
        # Their projection views a weight as rows, which weights in channels_last are not.
        _cifar10(("sgdp", "adamp"), "step", {"channels_last": False}),
        _cifar10(("sam",), "cosine"),
        # A step of SAM costs two of the others', so it computes as many gradients in half of the epochs.
        _cifar10(("sam",), "cosine", {"epochs": 3}),
        # So that beta to the power of the count is about .9, .5 and .1 in turn; .98 is the paper's.
        _counts(30, (0.98, 0.9965, 0.926)),
        _counts(120, (0.9991, 0.9942)),
        _counts(30, (0.98,), "cosine"),
        # The best of these by two seeds, against one an epoch: with all seeds.
        *(
            _counts(count, (0.98,), schedule, seeds=None)
            for count in (6, 120)
            for schedule in ("constant", "cosine")
        ),
        _counts(6, (0.89, 0.68)),
        # The same powers in a run of twice the length.
        _counts(12, (0.98,), epochs=12),
        _counts(30, (0.98, 0.926), epochs=12),
        _counts(120, (0.98, 0.9942), epochs=12),
        *(
            _cifar10((name,), schedule, common, sweep="lr", values=_FACTORS, part="rates", seeds=2)
            for name, schedule, common in (
                ("rmsgd", "constant", {}),
                ("sgd", "constant", {}),
                ("sgd", "step", {}),
                ("adamw", "cosine", {"settings": ()}),
                ("rmsgd", "cosine", {}),
                ("sgd", "cosine", {}),
            )
        ),
        *(
            _cifar10((name,), schedule, sweep="batch", values=(32, 512), part="batches", seeds=2)
            for name, schedule in (
                ("rmsgd", "constant"),
                ("sgd", "step"),
                ("rmsgd", "cosine"),
                ("sgd", "cosine"),
            )
        ),
    ),
    search=True,
)

_CIFAR10_RULES = Experiment(
    "Not in the paper: SGD on CIFAR-10 with each rule of LayerRates, on one CPU core",
    (_cifar10(("sgd", "sgd-rank-momentum", "sgd-tempbalance", "sgd-llr"), "cosine", seeds=3),),
)

_CIFAR10_GPU = Experiment(
    "Not in the paper: ResNet18 at full width on CIFAR-10, as long as a GPU is lent (--minutes)",
    tuple(
        Grid(
            ("resnet18",),
            ("cifar10",),
            optimizers,
            {"schedule": schedule, "epochs": 30, "channels_last": True, "precision": "bf16"},
        )
        for optimizers, schedule in (
            (("rmsgd",), "constant"),
            (("sgd", "sam"), "step"),
            (("rmsgd",), "cosine"),
        )
    ),
)

OWN: dict[str, Experiment] = {
    "cifar10-gpu": _CIFAR10_GPU,
    "cifar10-rules": _CIFAR10_RULES,
    "cifar10-small": _CIFAR10_SMALL,
    "digits": Experiment(
        "Not in the paper: every optimizer on digits; what beta, gamma and the rules of RMSGD do",
        (
            Grid(_NETWORK, ("digits",), (*TABLE_1A, "rmsgd-release"), _DIGITS),
            Grid(_NETWORK, ("digits",), ("rmsgd",), _DIGITS, "beta", (0.8, 0.9, 0.95, 0.98, 0.99)),
            Grid(
                _NETWORK,
                ("digits",),
                ("rmsgd",),
                {**_DIGITS, "settings": (("step_size", 1),)},
                "gamma",
                (0.8, 0.9, 0.95, 0.98),
            ),
        ),
    ),
}
"""Experiments that are no part of the paper."""


def experiment(name: str) -> Experiment:
    """The experiment called `name`; UsageError with a suggestion and the list when there is none."""
    return look_up("experiment", name, EXPERIMENTS | OWN)


def full(given: Experiment) -> Experiment:
    """The experiment on all images of its data sets, for eight epochs, instead of a part of them."""
    whole = {"images": None, "judged": None, "epochs": FULL_EPOCHS}

    def enlarged(grid: Grid) -> Grid:
        epochs = grid.common.get("epochs", FULL_EPOCHS) * FULL_EPOCHS // _SHORT["epochs"]
        return replace(grid, common={**grid.common, **whole, "epochs": epochs})

    return replace(given, grids=tuple(map(enlarged, given.grids)))


def small(given: Experiment, every: bool = False) -> Experiment:
    """The experiment on digits, in minutes: two networks of an eighth of the width, three epochs.

    Args:
        given: the experiment.
        every: all of its networks instead of two.

    """
    grids = []
    for grid in given.grids:
        networks = tuple(dict.fromkeys(name.removesuffix("-imagenet") for name in grid.networks))
        datasets = tuple(
            dict.fromkeys("digits-properties" if name == "adp" else "digits" for name in grid.datasets)
        )
        common = {**grid.common, "batch": SMALL_BATCH, "epochs": SMALL_EPOCHS, "width": SMALL_WIDTH}
        common |= {"images": None, "judged": None} if "images" in common else {}
        values = grid.values
        if grid.sweep == "batch":
            values = tuple(value / SMALL_BATCH_FACTOR for value in values)
        chosen = networks if every else networks[:2]
        grids.append(
            replace(
                grid, networks=chosen, datasets=datasets, common={**common, "budget": False}, values=values
            )
        )
    return Experiment(given.title, tuple(grids), search=given.search)
