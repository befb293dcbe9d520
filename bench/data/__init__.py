"""Data that is already where the network is: no loader processes, no transfer inside an epoch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.data import archive, image_folder
from bench.data.split import Split
from bench.errors import UnavailableError, UsageError
from bench.models import architecture
from bench.names import look_up
from rmsgd.extras import install_command

NAMES = ("digits", "synthetic")


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
        UsageError: the split holds less than one batch.

    """

    def __init__(self, split: Split, size: int, seed: int) -> None:
        if not 1 <= size <= len(split):
            raise UsageError(f"batch must be between 1 and the {len(split)} training samples, got {size}")
        self._split, self._size = split, size
        self._generator = torch.Generator(split.inputs.device).manual_seed(seed)

    def __len__(self) -> int:
        return len(self._split) // self._size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self._split.inputs.device
        order = torch.randperm(len(self._split), generator=self._generator, device=device)
        for chosen in order[: len(self) * self._size].view(len(self), self._size):
            yield self._split.inputs[chosen], self._split.targets[chosen]


def load(
    name: str,
    model: str,
    device: str | torch.device = "cpu",
    samples: int | None = None,
    cache: Path | None = None,
) -> Dataset:
    """The data set called `name`, in a form that `model` reads.

    Args:
        name: "digits", scikit-learn's 1797 images of 8x8 handwritten digits; "synthetic"; or the path
            of a folder in one of `bench.data.image_folder.LAYOUTS`, or of `bench.data.archive.LAYOUT`.
        model: a key of `bench.models.ARCHITECTURES`.
        device: where the tensors are put.
        samples: size of the synthetic training set (2048 by default; the test set is a quarter of
            it), or the most images that are read of each split of a folder or archive.
        cache: folder for what an archive is decoded to; None keeps nothing.

    Raises:
        UsageError: unknown name, a folder that is not what it claims, or samples that the model
            cannot read.

    """
    if samples is not None and samples < 4:
        raise UsageError(f"samples must be at least 4, got {samples}")
    device = torch.device(device)
    if name not in NAMES and (Path(name).is_dir() or Path(name).is_file() or name.lower().endswith(".zip")):
        dataset = _images(name, model, device, samples, cache)
    else:
        make = look_up("data", name, {"digits": _digits, "synthetic": _synthetic})
        dataset = make(model, device, samples)
    known = architecture(model)
    if not known.accepts(dataset.sample):
        raise UsageError(
            f"{model} reads samples of shape {known.sample}, {name} has {dataset.sample}: "
            "use --data synthetic or another model"
        )
    return dataset


def _standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Images (n, channels, height, width) as float32, each channel to mean 0 and deviation 1."""
    train, test = train.float(), test.float()
    mean = train.mean((0, 2, 3), keepdim=True)
    deviation = train.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
    return (train - mean) / deviation, (test - mean) / deviation


def _digits(model: str, device: torch.device, samples: int | None) -> Dataset:
    """One fifth of every class is held out, always the same fifth."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise UnavailableError(f"the digits need scikit-learn: {install_command('bench')}") from error

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels, labels, test_size=0.2, stratify=labels, random_state=0)
    images = _standardised(*(torch.tensor(part).view(-1, 1, 8, 8) for part in parts[:2]))
    targets = [torch.tensor(part, dtype=torch.int64) for part in parts[2:]]
    return _dataset("digits", images, targets, 10, device)


def _images(name: str, model: str, device: torch.device, samples: int | None, cache: Path | None) -> Dataset:
    known = architecture(model)
    if known.reads_tokens:
        raise UsageError(f"{model} reads tokens, {name} holds images")
    _, height, width = known.sample
    if Path(name).is_dir():
        train, test, classes = image_folder.read(Path(name), (height, width), samples)
    else:
        train, test, classes = archive.read(Path(name), (height, width), cache)
        train, test = ((pixels[:samples], targets[:samples]) for pixels, targets in (train, test))
    return _dataset(name, _standardised(train[0], test[0]), (train[1], test[1]), classes, device)


def _dataset(
    name: str, images: Sequence[Tensor], targets: Sequence[Tensor], classes: int, device: torch.device
) -> Dataset:
    train, test = (Split(x.to(device), y.to(device)) for x, y in zip(images, targets, strict=True))
    return Dataset(name, train, test, classes)


def _synthetic(model: str, device: torch.device, samples: int | None) -> Dataset:
    """Samples shaped for `model`: a noisy image of its class, or tokens with a fixed successor each."""
    known = architecture(model)
    generator = torch.Generator(device).manual_seed(0)
    kept = 2048 if samples is None else samples
    count = kept + kept // 4
    if known.reads_tokens:
        inputs = torch.randint(known.classes, (count, *known.sample), generator=generator, device=device)
        successor = torch.randperm(known.classes, generator=generator, device=device)
        targets = successor[inputs]
    else:
        targets = torch.randint(known.classes, (count,), generator=generator, device=device)
        prototypes = torch.randn(known.classes, *known.sample, generator=generator, device=device)
        inputs = torch.randn(count, *known.sample, generator=generator, device=device)
        inputs += 0.2 * prototypes[targets]
    train, test = (Split(inputs[part], targets[part]) for part in (slice(kept), slice(kept, None)))
    return Dataset("synthetic", train, test, known.classes)
