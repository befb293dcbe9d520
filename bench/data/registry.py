"""Every data set by name, for `bench train` and `bench study` alike.

Every module of `bench.data.sets` has a dictionary `DATASETS` and is found automatically, so a new data set is
one new module there.
"""

import importlib
import pkgutil
from dataclasses import replace
from pathlib import Path

import torch

from bench import models
from bench.data import sets
from bench.data.dataset import DataSet, Request
from bench.data.source import DatasetError, InMemory, Source
from bench.data.split import Split
from bench.errors import UsageError
from bench.names import look_up


def _found() -> dict[str, DataSet]:
    found: dict[str, DataSet] = {}
    for entry in pkgutil.iter_modules(sets.__path__):
        module = importlib.import_module(f"{sets.__name__}.{entry.name}")
        found.update(module.DATASETS)
    return found


DATASETS: dict[str, DataSet] = _found()

TRAINED = tuple(name for name, known in DATASETS.items() if known.trains)
"""The data sets that `bench train` knows by name. It recognises the others by the content of a path."""


def recognised(path: Path) -> tuple[str, DataSet]:
    """The name of the data set at a path, and the data set.

    Raises:
        UsageError: the path holds no data set that is known.

    """
    for name, known in DATASETS.items():
        if known.recognises(path):
            return name, known
    raise UsageError(f"{path} holds no images that are known here: expected {layouts()}")


def layouts() -> str:
    """The layouts that are recognised at a path without a name."""
    return "; or ".join(known.layout for known in DATASETS.values() if known.sizes)


def source(
    name: str, path: Path | None, network: str, device: torch.device, cache: Path | None = None
) -> Source:
    """The data set called `name` for a run of `network`, as batches.

    Args:
        name: a key of `DATASETS`.
        path: the argument of --data, which holds the data set itself or a folder of its name.
        network: a key of `bench.models.ARCHITECTURES`; images are resized to the size that it reads.
        device: the device of the batches.
        cache: a folder for the images that an archive is decoded to; None keeps nothing.

    Raises:
        DatasetError: the path is missing or does not hold the data set; the message gives the layout.
        UsageError: the name is unknown.

    """
    known = look_up("data set", name, DATASETS)
    request = Request(models.architecture(network), cache=cache, device=device)
    if not known.layout:
        return _source(known, request, device)
    if path is None:
        raise DatasetError(f"{name} needs --data PATH. Expected: {known.layout}")
    inner = path / name
    try:
        return _source(known, replace(request, path=inner if inner.is_dir() else path), device)
    except (DatasetError, OSError) as error:
        raise DatasetError(f"{error}. Expected for {name}: {known.layout}") from error


def _source(known: DataSet, request: Request, device: torch.device) -> Source:
    if known.stream is not None:
        return known.stream(request, device)
    assert known.read is not None
    train, test, classes = known.read(request)
    on_device = [Split(*part).to(device) for part in (train, test)]
    return InMemory(on_device[0], on_device[1], classes, known.augmentation, known.several)
