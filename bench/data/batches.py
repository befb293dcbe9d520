"""Shuffled mini-batches of samples that lie on the network's device."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.data.source import whole_batches
from bench.data.split import Split


class Batches:
    """Shuffled mini-batches of a split; every pass draws a new order from the seed.

    All batches have the same size, so that all steps cost the same. What is left over at the end of a pass is
    not used in that pass.

    Raises:
        UsageError: the split holds less than one batch.

    """

    def __init__(self, split: Split, size: int, seed: int) -> None:
        self._split, self._size, self._count = split, size, whole_batches(len(split), size)
        self._generator = torch.Generator(split.inputs.device).manual_seed(seed)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self._split.inputs.device
        order = torch.randperm(len(self._split), generator=self._generator, device=device)
        for chosen in order[: len(self) * self._size].view(len(self), self._size):
            yield self._split.inputs[chosen], self._split.targets[chosen]
