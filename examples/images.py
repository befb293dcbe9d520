"""Train a small convolutional network on handwritten digits with RMSGD.

    python examples/images.py                # about ten seconds on one core
    python examples/images.py --epochs 4     # shorter

It needs scikit-learn, which has the 1,797 images. For each epoch it prints the loss, the test accuracy and
the lowest and highest learning rate, and at the end every layer's rate and rank. All layers begin at the rate
0.03. Layers whose low-rank part grows get a higher rate, and the others keep theirs.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import rmsgd


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (1797, 1, 8, 8) in [0, 1] and their classes (1797,), in a fixed random order."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order] / 16
    return images[:, None], torch.tensor(data.target)[order]


def network() -> nn.Sequential:
    """Three convolutions with batch norm, and a linear head."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, 32, 1), *block(32, 64, 2), *block(64, 64, 2), nn.Flatten(), nn.Linear(256, 10)
    )


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """The share of images (n, 1, 8, 8) whose class (n,) the model names, in [0, 1]."""
    model.eval()
    with torch.no_grad():
        right = (model(x).argmax(1) == y).float().mean().item()
    model.train()
    return right


def main(arguments: list[str] | None = None) -> float:
    """Run the example; returns the test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=12)
    epochs = parser.parse_args(arguments).epochs

    torch.manual_seed(0)
    x, y = digits()
    train, test = slice(0, 1437), slice(1437, None)
    model = network()
    optimizer = rmsgd.RMSGD(model.named_parameters(), lr=0.03, weight_decay=5e-4)
    for epoch in range(1, epochs + 1):
        total = 0.0
        batches = torch.randperm(1437).split(64)
        for batch in batches:
            optimizer.zero_grad()
            loss = cross_entropy(model(x[train][batch]), y[train][batch])
            loss.backward()
            optimizer.step()
            total += loss.item()
        optimizer.epoch_step()  # the one call that SGD does not have
        rates = optimizer.learning_rates().values()
        right = accuracy(model, x[test], y[test])
        print(
            f"epoch {epoch:2}  loss {total / len(batches):.3f}  test accuracy {right:.3f}  "
            f"rates {min(rates):.4f} to {max(rates):.4f}"
        )

    rates = optimizer.learning_rates()
    print("\nlayer          rate    rank of its modes")
    for layer in optimizer.report().layers:
        print(f"{layer.name:12} {rates[layer.name]:.4f}    {', '.join(map(str, layer.rank))}")
    return right


if __name__ == "__main__":
    main()
