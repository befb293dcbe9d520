"""How the weight of a layer is made from several stored tensors. Each way to store it has a module here."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rmsgd.inspection.reading.stored import CheckpointError, NotMeasurableError, StoredTensor, plain_numbers


@dataclass(frozen=True)
class Stored:
    """The tensors of a source that are not part of a weight yet, and the settings beside them."""

    tensors: Mapping[str, StoredTensor]
    settings: Mapping[str, Any]

    def get(self, name: str) -> StoredTensor | None:
        """The tensor of that name, if it is there and may be read."""
        found = self.tensors.get(name)
        return None if found is None or found.skip else found


@dataclass(frozen=True)
class Weight:
    """A weight that is stored in parts, in a source that may have many of them."""

    name: str
    """The name of the weight in its module."""
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    """Makes the weight; raises the errors of ``StoredTensor.read``."""
    parts: Mapping[str, str]
    """From the name of each part to its role, such as "the scales". The weight replaces the first part."""
    skip: str | None = None
    """Why the weight cannot be made, where that is known. The first part then keeps place and name."""


Rule = Callable[[Stored], Iterator[Weight]]
"""Finds the weights of one kind."""


def numbers(stored: StoredTensor) -> Tensor:
    """The numbers of a part in its shape, in double precision if it has that, else in single precision.

    Raises:
        NotMeasurableError: they are not plain numbers.
        CheckpointError: they cannot be read.
    """
    tensor = plain_numbers(stored.read())
    return tensor if tensor.itemsize == 8 and tensor.is_floating_point() else tensor.float()


def small_numbers(stored: StoredTensor | None, most: int = 8) -> list[int] | None:
    """The few integers of a part that say how to read the others; None where the part has none."""
    if stored is None or len(stored.shape) != 1 or stored.shape[0] > most:
        return None
    try:
        return [int(n) for n in plain_numbers(stored.read()).tolist()]
    except (NotMeasurableError, CheckpointError, OverflowError, ValueError):
        return None


def split(name: str) -> tuple[str, str]:
    """A name as the path of its module with the dot, and its name in the module."""
    outer, dot, last = name.rpartition(".")
    return outer + dot, last
