"""Walking the layers of a model or a checkpoint, a batch at a time, for whatever measures them."""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from rmsgd.element_types import ELEMENT_TYPES
from rmsgd.inspection.reading.sources import open_source
from rmsgd.inspection.reading.stored import CheckpointError, NotMeasurableError, StoredTensor, plain_numbers
from rmsgd.inspection.selection import EVERYTHING, Selection, usable_device
from rmsgd.inspection.weights.constants import constant_by_name, constant_by_value
from rmsgd.inspection.weights.effective import effective_weights, lora_products
from rmsgd.layers import unfoldings

BATCH_BYTES = 64 << 20
"""The size of weights that are measured together: enough to keep every core busy, and little memory."""

ProbeSource = nn.Module | Mapping[str, Any] | str | os.PathLike[str]

Result = TypeVar("Result")
"""What is known of one layer."""


class Measuring(ABC, Generic[Result]):
    """A measurement of every layer under way; may be interrupted; see ``probe.probe`` for sources.

    ``results`` and ``errors`` tell at any time what has been measured so far, and what could not be read.
    """

    @abstractmethod
    def measured(self, layers: Sequence[StoredTensor], weights: Sequence[Tensor]) -> Sequence[Result]:
        """What is known of these layers, whose weights lie on one device."""

    @abstractmethod
    def skipped(self, layer: StoredTensor, reason: str) -> Result:
        """What is known of a layer that is not measured."""

    def __init__(self, source: ProbeSource, selection: Selection = EVERYTHING) -> None:
        self._device = None if selection.device is None else usable_device(selection.device)
        self._include_buffers = selection.include_buffers
        opened = open_source(source, selection.key)
        self._errors = list(opened.errors)
        self.notes = opened.notes
        tensors = effective_weights(opened)
        products = lora_products(tensors)
        self._stored = {stored.name: stored for stored in (*tensors, *products)}
        listed = [*tensors, *products] if selection.merge_lora else tensors
        layers = [stored for stored in listed if stored.skip or len(stored.shape) > 1]
        wanted = [stored for stored in layers if selection.is_wanted(stored.name)]
        self._layers = [stored for stored in wanted if not selection.is_excluded(stored.name)]
        self._results: dict[int, Result] = {}
        if not self._layers:
            raise CheckpointError(_nothing(source, opened.tensors, layers, wanted, selection))

    def run(self, progress: Callable[[float], object] | None = None) -> None:
        """Measure everything. After an exception has interrupted it, it must not be run again.

        ``progress`` is called with the share of the work that is done, in [0, 1].
        """
        costs = [_cost(stored) for stored in self._layers]
        total, done, batch_cost = sum(costs) or 1, 0, 0
        batch: list[tuple[int, Tensor]] = []
        for index, (stored, cost) in enumerate(zip(self._layers, costs, strict=True)):
            weight = self._weight(index, stored)
            if weight is None:
                done += cost
                continue
            if batch and (
                weight.device != batch[0][1].device
                or sum(w.nbytes for _, w in batch) + weight.nbytes > BATCH_BYTES
            ):
                self._measure(batch)
                batch, done, batch_cost = [], done + batch_cost, 0
                if progress:
                    progress(done / total)
            batch.append((index, weight))
            batch_cost += cost
        if batch:
            self._measure(batch)
        if progress:
            progress(1.0)

    @property
    def results(self) -> tuple[Result, ...]:
        """What is known of the layers that are done so far, in the order of the source."""
        return tuple(self._results[i] for i in sorted(self._results))

    @property
    def errors(self) -> tuple[str, ...]:
        """What could not be read so far, one line each."""
        return tuple(self._errors)

    def weight(self, name: str) -> Tensor:
        """The weight of one layer in a dtype that the backends take, on the device that measures.

        Raises:
            NotMeasurableError: the layer is not a weight in plain numbers.
            CheckpointError: it cannot be read.
        """
        stored = self._stored[name]
        if stored.skip:
            raise NotMeasurableError(stored.skip)
        _check_shape(stored.shape)
        weight = _check_numbers(stored.read())
        if weight.dtype not in ELEMENT_TYPES:  # floats of 8 bits
            weight = weight.float()
        return weight if self._device is None else weight.to(self._device)

    def _weight(self, index: int, stored: StoredTensor) -> Tensor | None:
        """The weight of a layer. Where there is none, this enters a skipped layer and returns None."""
        try:
            if not self._include_buffers and (reason := constant_by_name(stored)):
                raise NotMeasurableError(stored.skip or reason)
            weight = self.weight(stored.name)
            if not self._include_buffers and (reason := constant_by_value(stored, weight)):
                raise NotMeasurableError(reason)
            return weight
        except NotMeasurableError as reason:
            self._results[index] = self.skipped(stored, str(reason))
        except CheckpointError as error:
            self._errors.append(str(error))
            self._results[index] = self.skipped(stored, "could not be read")
        return None

    @torch.no_grad()
    def _measure(self, batch: Sequence[tuple[int, Tensor]]) -> None:
        layers, weights = [self._layers[index] for index, _ in batch], [weight for _, weight in batch]
        for (index, _), result in zip(batch, self.measured(layers, weights), strict=True):
            self._results[index] = result


def _nothing(
    source: object,
    tensors: Sequence[StoredTensor],
    layers: Sequence[StoredTensor],
    wanted: Sequence[StoredTensor],
    selection: Selection,
) -> str:
    what = os.fspath(source) if isinstance(source, str | os.PathLike) else f"this {type(source).__name__}"
    if wanted:
        excluded = f"{selection.exclude!r}, which is excluded"
        return f"{what}: every layer's name matches {excluded} (of {len(wanted)} layers)"
    if layers:
        return f"{what}: no layer's name matches {selection.filter!r} (of {len(layers)} layers)"
    if tensors:
        return f"{what}: no weights in it (none of {len(tensors)} tensors has two or more dimensions)"
    return f"{what}: no weights in it (no named tensors of a model)"


def _cost(stored: StoredTensor) -> int:
    if stored.skip or not 2 <= len(stored.shape) <= 5:
        return 0
    return sum(unfolding.cost for unfolding in unfoldings(stored.shape))


def _check_shape(shape: Sequence[int]) -> None:
    if len(shape) > 5:
        raise NotMeasurableError("more than five dimensions")
    if 0 in shape:
        raise NotMeasurableError("empty")
    if not unfoldings(shape):
        raise NotMeasurableError("a single row or column has no spectrum")


def _check_numbers(tensor: Tensor) -> Tensor:
    """The tensor itself, if its memory holds the weight's numbers."""
    kind = str(tensor.dtype).removeprefix("torch.")
    if plain_numbers(tensor).dtype not in ELEMENT_TYPES and not re.match(r"float8_e[45]", kind):
        raise NotMeasurableError(f"{kind}: quantised or packed weights, or indices")
    return tensor
