"""The factors by which a run multiplies its optimizer's learning rate, step by step."""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from bench import peers
from bench.names import look_up
from bench.study.config import RunConfig


def _step(share: float) -> float:
    """The paper's StepLR, every 25 epochs of 250: halved after each tenth of the run."""
    # A tenth of the steps need not be whole: 0.3 is the third, though 10 * 0.3 may come out below 3.
    return 0.5 ** math.floor(10 * share + 1e-9)


def _cosine(share: float) -> float:
    """From 1 to 0 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * share))


FACTORS: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "step": _step,
    "cosine": _cosine,
}
"""From a name to a function that gives the factor by the share of the run that is done, in [0, 1]."""

Make = Callable[[Optimizer, int], LRScheduler]
"""Makes a schedule of an optimizer for a run of so many steps."""


def _following(factor: Callable[[float], float]) -> Make:
    def make(optimizer: Optimizer, steps: int) -> LRScheduler:
        return LambdaLR(optimizer, lambda done: factor(done / steps))

    return make


def _one_cycle(optimizer: Optimizer, steps: int) -> LRScheduler:
    rates = [group["lr"] for group in optimizer.param_groups]
    return OneCycleLR(optimizer, rates, total_steps=steps)


SCHEDULES = {**{name: _following(factor) for name, factor in FACTORS.items()}, "onecycle": _one_cycle}
OWN = "own"
"""As the paper trains the optimizer: see `bench.peers.schedule`, which moves at epoch ends."""


def make(config: RunConfig, optimizer: Optimizer, batches: int) -> tuple[LRScheduler | None, bool]:
    """The schedule of a run of `batches` steps an epoch, and whether it moves at every step.

    Raises:
        UsageError: the schedule is not known.

    """
    if config.schedule == OWN:
        return peers.schedule(config.optimizer, optimizer, config.epochs), False
    made = look_up("schedule", config.schedule, SCHEDULES)
    return made(optimizer, config.epochs * batches), True
