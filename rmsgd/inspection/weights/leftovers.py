"""Packed weights that no rule knows, and their scales, which are not layers."""

import re
from collections.abc import Iterator

import torch

from rmsgd.inspection.weights.rule import Stored, Weight, split

_CODES = (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32)
_SCALES = re.compile(
    r"(^|[._])(scales?|zeros?|zero_points?|absmax|shifts?|biases|codebooks?|norms?|lut|range|meta)($|[._])"
)


def packed(stored: Stored) -> Iterator[Weight]:
    """Integers with scales beside them, or with a name that begins with theirs."""
    scales: dict[str, list[str]] = {}
    for name, tensor in stored.tensors.items():
        if len(tensor.shape) > 1 and tensor.dtype is not None and tensor.dtype.is_floating_point:
            outer, last = split(name)
            if _SCALES.search(last):
                scales.setdefault(outer, []).append(name)
    for name, codes in stored.tensors.items():
        if len(codes.shape) < 2 or codes.dtype not in _CODES or codes.skip:
            continue
        outer, _ = split(name)
        beside = [*scales.pop(outer, ()), *scales.pop(f"{name}.", ())]
        if beside:
            kind = str(codes.dtype).removeprefix("torch.")
            parts = {name: "the codes", **dict.fromkeys(beside, "the scales")}
            yield Weight(name, (), codes.read, parts, f"{kind}: quantised or packed weights, or indices")
