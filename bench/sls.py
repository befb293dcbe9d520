"""Stochastic line search: SGD whose step size is found anew on every batch."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

TRIALS = 100
SMALLEST = 1e-6
FLAT = 1e-8  # a gradient of this norm or less counts as zero


class SLS(Optimizer):
    """SGD with the Armijo line search of Vaswani et al., "Painless SGD" (NeurIPS 2019), Algorithm 1.

    The step starts from the last one, enlarged by ``gamma^(1/batches_per_epoch)``, and shrinks by
    ``backtrack`` until ``f(w - eta g) <= f(w) - c eta ||g||^2`` on the batch at hand. The step found is
    ``param_groups[0]["lr"]``.

    Args:
        params: tensors, in one group: there is one step size.
        lr: the first step size to try.
        c: the share of the decrease predicted by the gradient that a step must reach, in (0, 1).
        backtrack: the factor on a step size that was too large, in (0, 1).
        gamma: the factor by which the step size may grow in one epoch, at least 1.
        batches_per_epoch: the number of steps in an epoch.
        longest: the largest step size.

    Raises:
        ValueError: a number is outside its range, or there are several groups.

    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1.0,
        c: float = 0.1,
        backtrack: float = 0.9,
        gamma: float = 2.0,
        batches_per_epoch: int = 500,
        longest: float = 10.0,
    ) -> None:
        for name, value in (("c", c), ("backtrack", backtrack)):
            if not 0 < value < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {value}")
        for name, value in (("lr", lr), ("batches_per_epoch", batches_per_epoch), ("longest", longest)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not gamma >= 1:
            raise ValueError(f"gamma must be at least 1, got {gamma}")
        growth = gamma ** (1 / batches_per_epoch)
        super().__init__(
            params, {"lr": lr, "c": c, "backtrack": backtrack, "growth": growth, "longest": longest}
        )
        if len(self.param_groups) > 1:
            raise ValueError("SLS has one step size: give it one group of parameters")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any], loss: Tensor | float) -> None:  # type: ignore[override]
        """Takes one step.

        Args:
            closure: returns the loss of the batch at the current weights; it is called with gradients
                disabled.
            loss: the loss of the same batch at the weights whose gradients are in ``p.grad``.

        """
        group = self.param_groups[0]
        moved = [p for p in group["params"] if p.grad is not None]
        before = [p.detach().clone() for p in moved]
        gradients = [p.grad for p in moved]
        value = float(loss)
        squared = float(sum(g.square().sum() for g in gradients))
        if not squared > FLAT**2 or not value < float("inf"):
            return
        random = _random_states(moved)
        eta = min(group["lr"] * group["growth"], group["longest"])
        for _ in range(TRIALS):
            _move(moved, before, gradients, eta)
            _restore(random)  # every trial has the same dropout
            if float(closure()) <= value - group["c"] * eta * squared:
                break
            eta *= group["backtrack"]
        else:
            _move(moved, before, gradients, SMALLEST)
        group["lr"] = eta


def _move(moved: list[Tensor], before: list[Tensor], gradients: list[Tensor], eta: float) -> None:
    for p, old, g in zip(moved, before, gradients, strict=True):
        torch.sub(old, g, alpha=eta, out=p)


def _random_states(tensors: list[Tensor]) -> list[tuple[torch.device, Tensor]]:
    states = [(torch.device("cpu"), torch.get_rng_state())]
    for device in {p.device for p in tensors if p.is_cuda}:
        states.append((device, torch.cuda.get_rng_state(device)))
    return states


def _restore(states: list[tuple[torch.device, Tensor]]) -> None:
    for device, state in states:
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)
