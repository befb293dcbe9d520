"""The parts that the small tasks share: batches drawn from a seed, a training loop, and the results."""

import math
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

import rmsgd
from bench.data.split import Split

MakeOptimizer = Callable[[nn.Module, float], Optimizer]
"""Makes an optimizer of a network's trainable parameters and a learning rate."""

EVALUATED = 512
"""Samples in a batch of an evaluation."""

LOOKS = tuple(Fraction(eighths, 8) for eighths in (5, 6, 7, 8))
"""The shares of a run after which the network is evaluated: the last four epoch ends of eight."""


class Outcome(NamedTuple):
    """The result of a run.

    At a constant rate the last weights are one draw out of many: on CIFAR-10 the accuracies of two epochs of
    the same run differ by several percent. So a run counts as the mean over the last half of it.
    """

    loss: float
    """Cross entropy on training data, nats; the mean over `LOOKS`."""
    accuracy: float
    """Share of held-out samples, or tokens, that are classified right; the mean over `LOOKS`."""
    last_loss: float
    last_accuracy: float
    """The same of the last weights alone."""
    lowest: float
    highest: float
    """The smallest and the largest rate of a parameter at the end, over the lr that was given."""


def epoch_of(split: Split, batch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one size in an order that is drawn anew; what is left over is not used."""
    order = torch.randperm(len(split), generator=generator)
    for chosen in order[: len(order) // batch * batch].view(-1, batch):
        yield split.inputs[chosen], split.targets[chosen]


def train(
    model: nn.Module,
    optimizer: Optimizer,
    lr: float,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    steps: int,
    measure_every: int,
    training: Split,
    held_out: Split,
) -> Outcome:
    """One step for every batch, an epoch end after every `measure_every` of them.

    Args:
        model: what is trained.
        optimizer: of its parameters.
        lr: that the optimizer was given.
        batches: at least `steps` of them.
        steps: how many to take.
        measure_every: steps between two epoch ends of RMSGD.
        training: whose loss is evaluated.
        held_out: whose accuracy is evaluated.

    """
    looks = {math.ceil(share * steps) for share in LOOKS}
    losses, accuracies = [], []
    for step, (x, y) in zip(range(1, steps + 1), batches, strict=False):
        optimizer.zero_grad()
        cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % measure_every == 0 and isinstance(optimizer, rmsgd.RMSGD):
            optimizer.epoch_step()
        if step in looks:
            losses.append(evaluate(model, training)[0])
            accuracies.append(evaluate(model, held_out)[1])
    return Outcome(_mean(losses), _mean(accuracies), losses[-1], accuracies[-1], *_rates(optimizer, lr))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


@torch.no_grad()
def evaluate(model: nn.Module, split: Split) -> tuple[float, float]:
    """Mean cross entropy, in nats, and the share of targets that are named right."""
    model.eval()
    loss, right = 0.0, 0
    for x, y in zip(split.inputs.split(EVALUATED), split.targets.split(EVALUATED), strict=True):
        logits, wanted = model(x).flatten(0, -2), y.flatten()
        loss += cross_entropy(logits, wanted, reduction="sum").item()
        right += int((logits.argmax(1) == wanted).sum())
    model.train()
    return loss / split.targets.numel(), right / split.targets.numel()


def _rates(optimizer: Optimizer, lr: float) -> tuple[float, float]:
    """The range of the rates, over lr."""
    if not isinstance(optimizer, rmsgd.RMSGD):
        return 1.0, 1.0
    rates = [rate / lr for rate in optimizer.learning_rates().values()]
    return min(rates), max(rates)
