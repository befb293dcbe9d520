"""The form of a data set, and of a command's request to it. `bench.data.registry` finds all of them."""

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
    """A request for a data set.

    Attributes:
        network: the network that will read it; images are resized to the size that it reads.
        path: where the data set is; empty for one that is built in.
        cache: a folder for decoded images, so that they are decoded once; None keeps nothing.
        limit: the most samples of each split, or the number of training samples of a synthetic one; None:
            all.
        device: the device on which a synthetic data set is made.
        complete: whether to refuse a published data set that lacks some of its images.

    """

    network: Architecture
    path: Path = Path()
    cache: Path | None = None
    limit: int | None = None
    device: torch.device = CPU
    complete: bool = True

    def at(self, path: Path) -> "Request":
        """The same request with another path."""
        return replace(self, path=path)

    @property
    def size(self) -> tuple[int, int]:
        """The (height, width) of the images that the network reads."""
        height, width = self.network.sample[-2:]
        return height, width


class Read(Protocol):
    """Reads a data set that fits into memory."""

    def __call__(self, request: Request) -> Parts:
        """Its parts: uint8 images, or floats that are standardised already, or tokens."""


class Stream(Protocol):
    """Opens a data set that is too large for memory."""

    def __call__(self, request: Request, device: torch.device) -> Source:
        """The data set as batches on the device."""


@dataclass(frozen=True)
class DataSet:
    """A data set that `bench train` or `bench study` can use.

    A module of `bench.data.sets` offers data sets in a dictionary `DATASETS`, from name to data set. A new
    data set needs nothing but such a module.

    Attributes:
        read: reads a data set that fits into memory, else None.
        stream: opens a data set that does not fit into memory, else None.
        layout: what the path given by --data must hold, and where to get it; empty for one that is built in.
        recognises: whether a path given by --data without a name is this data set.
        sizes: the training and test samples of a path that `recognises` accepts, without reading them.
        augmentation: how training images vary.
        several: see `bench.data.source.Source`.
        trains: whether `bench train` knows it by name.

    """

    read: Read | None = None
    stream: Stream | None = None
    layout: str = ""
    recognises: Callable[[Path], bool] = lambda path: False
    sizes: Callable[[Path], tuple[int, int]] | None = None
    augmentation: Augmentation = AS_THEY_ARE
    several: bool = False
    trains: bool = False
