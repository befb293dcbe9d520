"""The parts that the small tasks share: batches drawn from a seed, a training loop, and the results."""

from collections.abc import Callable, Iterable, Iterator
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


class Outcome(NamedTuple):
    """The result of a run."""

    loss: float
    """Cross entropy on training data, nats."""
    accuracy: float
    """Share of held-out samples, or tokens, that are classified right."""
    lowest: float
    highest: float
    """The smallest and the largest rate of a parameter at the end, over the lr that was given."""


def epoch_of(split: Split, batch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one size in an order that is drawn anew; what is left over is not used."""
    order = torch.randperm(len(split), generator=generator)
    for chosen in order[: len(order) // batch * batch].view(-1, batch):
        yield split.inputs[chosen], split.targets[chosen]


def train(
    model: nn.Module, optimizer: Optimizer, batches: Iterable[tuple[Tensor, Tensor]], measure_every: int
) -> list[float]:
    """One step for every batch, an epoch end after every `measure_every` of them; the losses, in nats."""
    losses = []
    for step, (x, y) in enumerate(batches, start=1):
        optimizer.zero_grad()
        loss = cross_entropy(model(x).flatten(0, -2), y.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
        if step % measure_every == 0 and isinstance(optimizer, rmsgd.RMSGD):
            optimizer.epoch_step()
    return losses


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


def outcome(optimizer: Optimizer, lr: float, loss: float, accuracy: float) -> Outcome:
    """The result of a run, with the range of its rates at the end."""
    if not isinstance(optimizer, rmsgd.RMSGD):
        return Outcome(loss, accuracy, 1.0, 1.0)
    rates = [rate / lr for rate in optimizer.learning_rates().values()]
    return Outcome(loss, accuracy, min(rates), max(rates))
