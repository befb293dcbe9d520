"""The fused momentum step on a GPU: its launches, and their arguments.

The structs are those of ``csrc/sgd/step_cuda.h``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rmsgd.backends.base import StepGroup, StepTables
from rmsgd.backends.kernels import Kernels, upload
from rmsgd.backends.streams import Streams, named_range
from rmsgd.element_types import NUMBERS

THREADS = 256
WARP = 32
ITEM = 2048
"""The elements of a warp's item: enough for the reading of its tables to cost next to nothing."""
SMALL_ITEM = 512
"""The elements of the last items, so that the warps of the last turn end soon after each other."""
NESTEROV, MAXIMIZE, VELOCITY = 1, 2, 4

_GROUP = np.dtype(
    [
        ("device_multiplier", "u8"),
        ("multiplier", "f8"),
        ("momentum", "f8"),
        ("dampening", "f8"),
        ("weight_decay", "f8"),
        ("flags", "i8"),
    ]
)
_TENSOR = np.dtype([("weight", "u8"), ("buffer", "u8"), ("dtype", "i4"), ("group", "i4"), ("eta", "i8")])
_ITEM = np.dtype([("begin", "i8"), ("count", "i4"), ("tensor", "i4")])
_GROUP_WORDS = _GROUP.itemsize // 8


def _arguments(words: int) -> np.dtype[np.void]:
    pointers = ("item", "tensor", "fresh_item", "fresh", "eta", "grad_scale", "found_inf")
    numbers = ("first_item", "items", "first_tensor", "tensors", "first_group", "groups")
    return np.dtype([*((p, "u8") for p in pointers), *((n, "i4") for n in numbers), ("payload", "u8", words)])


_SIZES = {"rmsgd_step": 500, "rmsgd_step_large": 4000}
"""Words of payload that a kernel's argument has room for."""


@dataclass(frozen=True)
class _Launch:
    """Tensors [tensors.start, tensors.stop) and the groups that they belong to, in one kernel."""

    kernel: str
    tensors: slice
    groups: slice
    arguments: NDArray[np.void]
    """The argument, an array of one element, which the launch copies."""
    payload: NDArray[np.uint64]
    """A view of its gradients' addresses in the argument."""
    hyper: NDArray[np.void]
    """A view of its groups in the argument."""
    blocks: int


class CudaStepper:
    """Takes a step of the whole network in one launch, or in more beyond 4000 tensors.

    Nothing here waits for the GPU once the tables are there. In a CUDA graph a step keeps the
    gradients' addresses and the hyper-parameters that it was captured with; rates, tensor learning
    rates, gradient scale and overflow flag are read at every replay. It keeps the addresses of these tables
    too: after ``load_state_dict``, ``add_param_group`` or another set of trainable parameters, capture anew.
    """

    def __init__(self, kernels: Kernels, streams: Streams, tables: StepTables) -> None:
        self._kernels = kernels
        self._streams = streams
        self._tables = tables  # keeps the memory alive that the launches point to
        self._device = tables.eta.device
        self._parameters = list(tables.parameters)
        self._bufferless = [i for i, buffer in enumerate(tables.buffers) if buffer is None]
        self._grad_scale: Tensor | None = None
        self._found_inf: Tensor | None = None
        tensors = np.zeros(len(self._parameters), _TENSOR)
        for i, (p, buffer, group) in enumerate(
            zip(self._parameters, tables.buffers, tables.groups, strict=True)
        ):
            address = 0 if buffer is None else buffer.data_ptr()
            tensors[i] = (p.data_ptr(), address, NUMBERS[p.dtype], group, i)
        index = self._device.index or 0
        resident = kernels.resident_blocks("rmsgd_step_large", index, THREADS, 0) * (THREADS // WARP)
        items, first_items = step_items([p.numel() for p in self._parameters], resident)
        self._on_device = [upload(tensors, self._device), upload(items, self._device)]
        of_item = torch.from_numpy(items["tensor"].astype(np.int64)).to(self._device)
        self._fresh_items = tables.fresh.to(torch.uint8)[of_item]
        self._launches = [
            self._launch(kernel, span, tables.groups, first_items)
            for kernel, span in _spans(tables.groups)
            if first_items[span.stop] > first_items[span.start]
        ]

    def _launch(
        self, kernel: str, span: slice, groups: Sequence[int], first_items: NDArray[np.int64]
    ) -> _Launch:
        arguments = np.zeros(1, _arguments(_SIZES[kernel]))
        within = groups[span]
        first, end = min(within), max(within) + 1
        n = span.stop - span.start
        tensors, items = self._on_device
        head = arguments[0]
        head["item"], head["tensor"] = items.data_ptr(), tensors.data_ptr()
        head["fresh_item"], head["fresh"] = self._fresh_items.data_ptr(), self._tables.fresh.data_ptr()
        head["eta"] = self._tables.eta.data_ptr()
        head["first_item"] = first_items[span.start]
        head["items"] = first_items[span.stop] - first_items[span.start]
        head["first_tensor"], head["tensors"] = span.start, n
        head["first_group"], head["groups"] = first, end - first
        payload = head["payload"]
        hyper = payload[n : n + (end - first) * _GROUP_WORDS].view(_GROUP)
        blocks = -(-int(head["items"]) // (THREADS // WARP))
        return _Launch(kernel, span, slice(first, end), arguments, payload[:n], hyper, blocks)

    def scaling(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> float:
        """See ``base.Stepper``. The kernel reads both numbers, and divides or skips."""
        self._grad_scale, self._found_inf = (
            None if t is None else t.to(self._device, torch.float32, non_blocking=True)
            for t in (grad_scale, found_inf)
        )
        return 1.0

    def step(
        self, gradients: Sequence[Tensor | None], groups: Sequence[StepGroup], grad_scale: float = 1.0
    ) -> None:
        """See ``base.Stepper``. Raises ValueError for a gradient whose buffer is missing."""
        for i in self._bufferless:
            if gradients[i] is not None and groups[self._tables.groups[i]].momentum != 0.0:
                raise ValueError(f"parameter {i} has no buffer, but the momentum of its group is not 0")
        scale, found_inf = self._grad_scale, self._found_inf
        if grad_scale != 1.0:
            scale = torch.full((1,), grad_scale, dtype=torch.float32, device=self._device)
        self._streams.wait_side_stream()  # the rates may still be on their way
        # The address is made odd for a float32 gradient of a weight of half precision, which might not hold
        # it.
        pointers = [
            0 if g is None else g.data_ptr() + (g.dtype != p.dtype)
            for g, p in zip(gradients, self._parameters, strict=True)
        ]
        hyper = [_hyper(group) for group in groups]
        for launch in self._launches:
            launch.payload[:] = pointers[launch.tensors]
            launch.hyper[:] = hyper[launch.groups]
            launch.arguments["grad_scale"] = 0 if scale is None else scale.data_ptr()
            launch.arguments["found_inf"] = 0 if found_inf is None else found_inf.data_ptr()
            with named_range("rmsgd: step"):
                self._kernels.launch(
                    launch.kernel,
                    self._device.index or 0,
                    launch.blocks,
                    THREADS,
                    0,
                    self._streams.current(),
                    launch.arguments,
                )

    def step_parameters(self, groups: Sequence[StepGroup], grad_scale: float = 1.0) -> list[int] | None:
        """See ``base.Stepper``."""
        gradients = [p.grad for p in self._parameters]
        for p, grad in zip(self._parameters, gradients, strict=True):
            if grad is not None and (
                grad.dtype is not p.dtype
                or grad.layout is not torch.strided
                or grad.stride() != p.stride()
                or grad.is_neg()
            ):
                return None
        self.step(gradients, groups, grad_scale)
        return [i for i, grad in enumerate(gradients) if grad is None]


def _hyper(group: StepGroup) -> tuple[int, float, float, float, float, int]:
    flags = NESTEROV * group.nesterov + MAXIMIZE * group.maximize + VELOCITY * group.velocity
    multiplier: object = group.multiplier
    if isinstance(multiplier, Tensor):
        return multiplier.data_ptr(), 0.0, group.momentum, group.dampening, group.weight_decay, flags
    return 0, group.multiplier, group.momentum, group.dampening, group.weight_decay, flags


def step_items(numels: Sequence[int], resident: int) -> tuple[NDArray[np.void], NDArray[np.int64]]:
    """All tensors cut into items, and where each tensor's begin among them (one more than tensors).

    Where there are more items than the ``resident`` warps that run at once, as many of the last ones are cut
    into smaller ones.
    """
    sizes = np.asarray(numels, np.int64)
    counts = -(-sizes // ITEM)
    tensor = np.repeat(np.arange(len(sizes)), counts)
    begin = (np.arange(len(tensor)) - np.repeat(np.cumsum(counts) - counts, counts)) * ITEM
    whole = len(tensor) - resident if len(tensor) > resident else len(tensor)
    parts = np.where(np.arange(len(tensor)) < whole, 1, ITEM // SMALL_ITEM)
    length = ITEM // parts
    part = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    tensor, length = np.repeat(tensor, parts), np.repeat(length, parts)
    begin = np.repeat(begin, parts) + part * length
    kept = begin < sizes[tensor]
    items = np.zeros(int(kept.sum()), _ITEM)
    items["tensor"], items["begin"] = tensor[kept], begin[kept]
    items["count"] = np.minimum(sizes[items["tensor"]] - items["begin"], length[kept])
    return items, np.searchsorted(items["tensor"], np.arange(len(sizes) + 1)).astype(np.int64)


def _spans(groups: Sequence[int]) -> Iterator[tuple[str, slice]]:
    """The tensors in as few launches as their gradients' addresses and their groups have room for."""
    room = _SIZES["rmsgd_step_large"]
    start = 0
    while start < len(groups):
        stop, low, high = start, groups[start], groups[start]
        words = 0
        while stop < len(groups):
            low, high = min(low, groups[stop]), max(high, groups[stop])
            grown = stop + 1 - start + (high + 1 - low) * _GROUP_WORDS
            if grown > room:
                break
            stop, words = stop + 1, grown
        kernel = "rmsgd_step" if words <= _SIZES["rmsgd_step"] else "rmsgd_step_large"
        yield kernel, slice(start, stop)
        start = stop
