"""Data that is already where the network is: no loader processes, no transfer inside an epoch."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.models import architecture
from bench.names import look_up

NAMES = ("digits", "synthetic")


@dataclass(frozen=True)
class Split:
    """Samples, shape (n, *sample), and targets, int64, shape (n,) or (n, length) for tokens."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class Dataset:
    """What a network learns from and what it is judged by, both on one device."""

    name: str
    train: Split
    test: Split
    classes: int

    @property
    def sample(self) -> tuple[int, ...]:
        return tuple(self.train.inputs.shape[1:])


class Batches:
    """Shuffled mini-batches of a split; every pass draws a new order from the seed.

    All batches have the same size, so that one step costs what the next does: what is left over at
    the end of a pass is not used in that pass.

    Raises:
        ValueError: the split holds less than one batch.

    """

    def __init__(self, split: Split, size: int, seed: int) -> None:
        if not 1 <= size <= len(split):
            raise ValueError(f"batch must be between 1 and the {len(split)} training samples, got {size}")
        self._split, self._size = split, size
        self._generator = torch.Generator(split.inputs.device).manual_seed(seed)

    def __len__(self) -> int:
        return len(self._split) // self._size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self._split.inputs.device
        order = torch.randperm(len(self._split), generator=self._generator, device=device)
        for chosen in order[: len(self) * self._size].view(len(self), self._size):
            yield self._split.inputs[chosen], self._split.targets[chosen]


def load(name: str, model: str, device: str | torch.device = "cpu", samples: int = 2048) -> Dataset:
    """The data set called `name`, in a form that `model` reads.

    Args:
        name: "digits", scikit-learn's 1797 images of 8x8 handwritten digits, or "synthetic".
        model: a key of `bench.models.ARCHITECTURES`.
        device: where the tensors are put.
        samples: size of the synthetic training set; the test set is a quarter of it.

    Raises:
        ValueError: unknown name, or the model cannot read the samples.

    """
    make = look_up("data", name, {"digits": _digits, "synthetic": _synthetic})
    dataset = make(model, torch.device(device), samples)
    known = architecture(model)
    if not known.accepts(dataset.sample):
        raise ValueError(
            f"{model} reads samples of shape {known.sample}, {name} has {dataset.sample}: "
            "use --data synthetic or another model"
        )
    return dataset


def _digits(model: str, device: torch.device, samples: int) -> Dataset:
    """One fifth of every class is held out, always the same; pixels are standardised."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels, labels, test_size=0.2, stratify=labels, random_state=0)
    mean, std = parts[0].mean(), parts[0].std()
    train_x, test_x = (
        torch.tensor((part - mean) / std, dtype=torch.float32, device=device).view(-1, 1, 8, 8)
        for part in parts[:2]
    )
    train_y, test_y = (torch.tensor(part, dtype=torch.int64, device=device) for part in parts[2:])
    return Dataset("digits", Split(train_x, train_y), Split(test_x, test_y), classes=10)


def _synthetic(model: str, device: torch.device, samples: int) -> Dataset:
    """Samples shaped for `model`: a noisy image of its class, or tokens with a fixed successor each."""
    if samples < 4:
        raise ValueError(f"samples must be at least 4, got {samples}")
    known = architecture(model)
    generator = torch.Generator(device).manual_seed(0)
    count = samples + samples // 4
    if known.reads_tokens:
        inputs = torch.randint(known.classes, (count, *known.sample), generator=generator, device=device)
        successor = torch.randperm(known.classes, generator=generator, device=device)
        targets = successor[inputs]
    else:
        targets = torch.randint(known.classes, (count,), generator=generator, device=device)
        prototypes = torch.randn(known.classes, *known.sample, generator=generator, device=device)
        inputs = torch.randn(count, *known.sample, generator=generator, device=device)
        inputs += 0.2 * prototypes[targets]
    train, test = (Split(inputs[part], targets[part]) for part in (slice(samples), slice(samples, None)))
    return Dataset("synthetic", train, test, known.classes)
