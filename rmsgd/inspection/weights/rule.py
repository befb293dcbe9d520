"""How the weight of a layer is made of several stored tensors. Each way of it has a module here."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rmsgd.inspection.reading.stored import CheckpointError, NotMeasurableError, StoredTensor, plain_numbers


@dataclass(frozen=True)
class Stored:
    """The tensors of a source that no weight was made of yet, and what is written beside them."""

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
    """What the weight is called in its module."""
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    """Raises as ``StoredTensor.read`` does."""
    parts: Mapping[str, str]
    """The tensors that it is made of, and what each is, "the scales". It is listed in place of the first."""
    skip: str | None = None
    """Why it cannot be made, where that is known: then the first part keeps its place and its name."""


Rule = Callable[[Stored], Iterator[Weight]]
"""The weights of one kind."""


def numbers(stored: StoredTensor) -> Tensor:
    """The numbers of a part, in single precision or, where it has it, in double.

    Raises:
        NotMeasurableError: they are no plain numbers.
        CheckpointError: they cannot be read.
    """
    tensor = plain_numbers(stored.read())
    return tensor if tensor.itemsize == 8 and tensor.is_floating_point() else tensor.float()


def small_numbers(stored: StoredTensor | None, most: int = 8) -> list[int] | None:
    """The few integers of a part, which say how the others are to be read; None where it is no such part."""
    if stored is None or len(stored.shape) != 1 or stored.shape[0] > most:
        return None
    try:
        return [int(n) for n in plain_numbers(stored.read()).tolist()]
    except (NotMeasurableError, CheckpointError, OverflowError, ValueError):
        return None


def split(name: str) -> tuple[str, str]:
    """A name as the path of its module with the dot, and what it is called in it."""
    outer, dot, last = name.rpartition(".")
    return outer + dot, last
