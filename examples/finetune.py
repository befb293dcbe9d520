"""Fine-tune a pretrained network: learn the digits 0 to 4, then go on with 5 to 9.

    python examples/finetune.py

It takes about ten seconds on one core and needs scikit-learn. The network is pretrained in the script itself,
so that nothing has to be downloaded. Then it is fine-tuned twice: by the paper's Algorithm 1 to the letter,
which begins with s(0) = 0, and by the default, which measures s(0) before the first step and keeps every rate
between half of lr and twice lr. The script prints the rates after the first epoch of each. With s(0) = 0 the
whole stable rank of a trained layer counts as if it had been learned in this epoch, and its rate jumps.
"""

import argparse
import copy

import torch
from images import accuracy, digits, network
from torch import nn
from torch.nn.functional import cross_entropy

import rmsgd


def train(
    model: nn.Module, optimizer: rmsgd.RMSGD, x: torch.Tensor, y: torch.Tensor, epochs: int
) -> dict[str, float]:
    """Train; returns the learning rates after the first epoch."""
    first: dict[str, float] = {}
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        optimizer.epoch_step()
        first = first or optimizer.learning_rates()
    return first


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Run the example; returns the highest rate after one epoch under each rule."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=6)
    epochs = parser.parse_args(arguments).epochs

    torch.manual_seed(0)
    x, y = digits()
    old, new = y < 5, y >= 5
    pretrained = network()
    train(pretrained, rmsgd.RMSGD(pretrained.named_parameters(), lr=0.03), x[old], y[old], 2 * epochs)
    print(f"pretrained on 0 to 4: accuracy there {accuracy(pretrained, x[old], y[old]):.3f}")

    inputs, targets = x[new], y[new]
    highest = {}
    for rule in ("paper", "bounded"):
        torch.manual_seed(1)
        model = copy.deepcopy(pretrained)
        optimizer = rmsgd.RMSGD(model.named_parameters(), lr=0.01, rule=rule)
        first = train(model, optimizer, inputs[:600], targets[:600], epochs)
        highest[rule] = max(first.values())
        print(
            f"{rule:8} rates after one epoch {min(first.values()):.4f} to {max(first.values()):.4f}, "
            f"accuracy on 5 to 9: {accuracy(model, inputs[600:], targets[600:]):.3f}"
        )
    return highest


if __name__ == "__main__":
    main()
