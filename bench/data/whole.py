"""A data set in the form that `bench train` takes: all on one device, standardised, without augmentation."""

from dataclasses import dataclass
from pathlib import Path

import torch

from bench.data import registry
from bench.data.dataset import Request
from bench.data.sets.digits import standardised
from bench.data.split import Split
from bench.errors import UsageError
from bench.models import architecture
from bench.names import look_up


@dataclass(frozen=True)
class Dataset:
    """The training set of a network and the test set that judges it, both on one device."""

    name: str
    train: Split
    test: Split
    classes: int

    @property
    def sample(self) -> tuple[int, ...]:
        return tuple(self.train.inputs.shape[1:])


def load(
    name: str,
    model: str,
    device: str | torch.device = "cpu",
    samples: int | None = None,
    cache: Path | None = None,
) -> Dataset:
    """The data set called `name`, or at that path, in a form that `model` reads.

    Args:
        name: one of `registry.TRAINED`, or the path of a folder or archive that `registry` recognises.
        model: a key of `bench.models.ARCHITECTURES`.
        device: the device of the tensors.
        samples: the size of the synthetic training set (2048 by default; the test set is a quarter of
            it), or the most images that are read of each split of a folder or archive.
        cache: a folder for the images that an archive is decoded to; None keeps nothing.

    Raises:
        UsageError: the name is unknown, a folder does not hold what it should, or the model cannot read the
            samples.

    """
    if samples is not None and samples < 4:
        raise UsageError(f"samples must be at least 4, got {samples}")
    network, device, path = architecture(model), torch.device(device), Path(name)
    request = Request(network, limit=samples, cache=cache, device=device, complete=False)
    if name in registry.TRAINED:
        known = registry.DATASETS[name]
    elif path.exists() or path.suffix.lower() == ".zip":
        if network.reads_tokens:
            raise UsageError(f"{model} reads tokens, {name} holds images")
        known, request = registry.recognised(path)[1], request.at(path)
    else:
        known = look_up("data", name, {entry: registry.DATASETS[entry] for entry in registry.TRAINED})
    assert known.read is not None
    train, test, classes = known.read(request)
    if train[0].dtype == torch.uint8:
        pixels = standardised(train[0], test[0])
        train, test = (pixels[0], train[1]), (pixels[1], test[1])
    dataset = Dataset(name, Split(*train).to(device), Split(*test).to(device), classes)
    if not network.accepts(dataset.sample):
        raise UsageError(
            f"{model} reads samples of shape {network.sample}, {name} has {dataset.sample}: "
            "use --data synthetic or another model"
        )
    return dataset


def sizes(path: Path) -> tuple[int, int]:
    """The numbers of training and test samples at a path that `load` accepts, without reading them."""
    known = registry.recognised(path)[1]
    assert known.sizes is not None
    return known.sizes(path)
