"""What a data set is to the commands, and what they ask of it. `bench.data.registry` finds them all."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from bench.data.source import Augmentation, Source
from bench.data.split import Parts
from bench.models import Architecture

CPU = torch.device("cpu")
AS_THEY_ARE = Augmentation()


@dataclass(frozen=True)
class Request:
    """What is wanted of a data set.

    Attributes:
        network: that is to read it: images are brought to the size that it reads.
        path: where it is; empty for one that is built in.
        cache: folder for what is decoded once; None keeps nothing.
        limit: the most samples of each split, or the training samples of one that is made; None: all.
        device: where a data set that is made is made.
        complete: refuse a published data set that has not all of its images.

    """

    network: Architecture
    path: Path = Path()
    cache: Path | None = None
    limit: int | None = None
    device: torch.device = CPU
    complete: bool = True

    def at(self, path: Path) -> "Request":
        """The same at a path."""
        return replace(self, path=path)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images that the network reads."""
        height, width = self.network.sample[-2:]
        return height, width


class Read(Protocol):
    """Reads a data set that memory holds."""

    def __call__(self, request: Request) -> Parts:
        """Its parts: uint8 images, or floats that are standardised already, or tokens."""


class Stream(Protocol):
    """Opens a data set that is too large for memory."""

    def __call__(self, request: Request, device: torch.device) -> Source:
        """It, as batches on the device."""


@dataclass(frozen=True)
class DataSet:
    """A data set that `bench train` or `bench study` can use.

    A module of `bench.data.sets` offers some by a dictionary `DATASETS`, name to data set: that module is all
    that a new one needs.

    Attributes:
        read: for what memory holds, else None.
        stream: for what it does not hold, else None.
        layout: what the path given by --data must hold, and where it comes from; empty: built in.
        recognises: whether a path given by --data alone is this data set.
        sizes: training and test samples of a path that `recognises` accepts, without reading them.
        augmentation: of training images.
        several: see `bench.data.source.Source`.
        trains: `bench train` may be asked for it by name.

    """

    read: Read | None = None
    stream: Stream | None = None
    layout: str = ""
    recognises: Callable[[Path], bool] = lambda path: False
    sizes: Callable[[Path], tuple[int, int]] | None = None
    augmentation: Augmentation = AS_THEY_ARE
    several: bool = False
    trains: bool = False
