"""The study's data sets by name: where they are looked for, and what they become."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench import data, models
from bench.data import archive, cifar, pathology, streaming
from bench.data.source import Augmentation, DatasetError, InMemory, Source
from bench.data.split import Split
from bench.names import look_up

Load = Callable[["Where", tuple[int, int], torch.device], Source]


@dataclass(frozen=True)
class Where:
    """Where a data set is, and where what is made of it once may be kept (None: nowhere)."""

    path: Path
    cache: Path | None = None


@dataclass(frozen=True)
class Kind:
    """A data set.

    Attributes:
        load: makes it from its folder, the size of the images and the device.
        layout: what the folder given by --data must hold, and where it comes from; empty: built in.

    """

    load: Load
    layout: str = ""


def _digits(where: Where, size: tuple[int, int], device: torch.device) -> InMemory:
    digits = data.load("digits", "resnet14-digits", device)
    return InMemory(digits.train, digits.test, digits.classes, Augmentation(pad=1))


# Properties of the digits 0 to 9, for the loss and the accuracy of images with several labels.
PROPERTIES = ({1, 3, 5, 7, 9}, {2, 3, 5, 7}, {5, 6, 7, 8, 9}, {0, 3, 6, 9}, {0, 4, 6, 8, 9})


def _digits_properties(where: Where, size: tuple[int, int], device: torch.device) -> InMemory:
    digits = data.load("digits", "resnet14-digits", device)
    table = torch.tensor(
        [[float(digit in kind) for kind in PROPERTIES] for digit in range(10)], device=device
    )
    parts = [Split(split.inputs, table[split.targets]) for split in (digits.train, digits.test)]
    return InMemory(parts[0], parts[1], len(PROPERTIES), Augmentation(pad=1), several=True)


def _synthetic(where: Where, size: tuple[int, int], device: torch.device) -> InMemory:
    made = data.load("synthetic", "resnet18", device)
    return InMemory(made.train, made.test, made.classes, Augmentation(pad=4, flip=True))


def _cifar(name: str) -> Load:
    def load(where: Where, size: tuple[int, int], device: torch.device) -> InMemory:
        if where.path.suffix.lower() == ".zip":
            train, test, classes = archive.read(where.path, size, where.cache)
            if classes != cifar.FORMS[name].classes:
                raise DatasetError(
                    f"{where.path} holds {classes} classes of images, and {name} has another number"
                )
        else:
            train, test, classes = cifar.read(where.path, name)
        return InMemory(_on(device, train), _on(device, test), classes, Augmentation(pad=4, flip=True))

    return load


def _cifar_layout(name: str) -> str:
    return f"{cifar.FORMS[name].layout}; or {archive.LAYOUT}"


def _imagenet(where: Where, size: tuple[int, int], device: torch.device) -> streaming.Streamed:
    return streaming.load(where.path, size, device)


def _pathology(read: Callable[..., pathology.Images], several: bool) -> Load:
    def load(where: Where, size: tuple[int, int], device: torch.device) -> InMemory:
        train, test, classes = read(where.path, size)
        return InMemory(
            _on(device, train), _on(device, test), classes, Augmentation(pad=4, flip=True), several
        )

    return load


def _on(device: torch.device, part: tuple[Tensor, Tensor]) -> Split:
    return Split(part[0].to(device), part[1].to(device))


DATASETS: dict[str, Kind] = {
    "digits": Kind(_digits),
    "digits-properties": Kind(_digits_properties),
    "synthetic": Kind(_synthetic),
    "cifar10": Kind(_cifar("cifar10"), _cifar_layout("cifar10")),
    "cifar100": Kind(_cifar("cifar100"), _cifar_layout("cifar100")),
    "imagenet": Kind(_imagenet, streaming.LAYOUT),
    "mhist": Kind(_pathology(pathology.mhist, several=False), pathology.MHIST),
    "adp": Kind(_pathology(pathology.adp, several=True), pathology.ADP),
}


def load(
    name: str, folder: Path | None, network: str, device: torch.device, cache: Path | None = None
) -> Source:
    """The data set called `name` for `network`.

    Args:
        name: a key of `DATASETS`.
        folder: what the user gave as --data; it, or a folder of the data set's name in it, holds it.
        network: a key of `bench.models.ARCHITECTURES`: images are brought to the size that it reads.
        device: where batches are wanted.
        cache: folder for what an archive is decoded to; None keeps nothing.

    Raises:
        DatasetError: the folder is missing or does not hold the data set; the layout is named.
        UsageError: unknown name.

    """
    kind = look_up("data set", name, DATASETS)
    height, width = models.architecture(network).sample[1:]
    if not kind.layout:
        return kind.load(Where(Path()), (height, width), device)
    if folder is None:
        raise DatasetError(f"{name} needs --data FOLDER. Expected: {kind.layout}")
    inner = folder / name
    try:
        return kind.load(Where(inner if inner.is_dir() else folder, cache), (height, width), device)
    except DatasetError as error:
        raise DatasetError(f"{error}. Expected for {name}: {kind.layout}") from error
    except OSError as error:
        raise DatasetError(f"{error}. Expected for {name}: {kind.layout}") from error
