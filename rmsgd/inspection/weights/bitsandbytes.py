"""bitsandbytes' weights: eight bits with a scale per row, and four bits with a scale per block."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rmsgd.inspection.reading.stored import NotMeasurableError, StoredTensor, plain_numbers
from rmsgd.inspection.weights.rule import Stored, Weight, numbers, split

_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def eight_bits(stored: Stored) -> Iterator[Weight]:
    """LLM.int8(): codes, and the largest magnitude of each row ("SCB"), for which the code 127 stands."""
    for name, rows in stored.tensors.items():
        outer, last = split(name)
        if last != "SCB":
            continue
        codes = stored.get(f"{outer}weight")
        if codes is None or codes.dtype != torch.int8 or rows.shape != codes.shape[:1]:
            continue
        order = f"{outer}weight_format"
        parts = {codes.name: "the codes", name: "the scales", order: "the layout"}

        def read(codes: StoredTensor = codes, rows: StoredTensor = rows) -> Tensor:
            return numbers(codes) * (numbers(rows) / 127)[:, None]

        yield Weight(codes.name, codes.shape, read, parts)


def four_bits(stored: Stored) -> Iterator[Weight]:
    """bitsandbytes NF4 and FP4: two codes in a byte, the first in the high half, and a table of 16 values.

    Each block has its largest magnitude ("absmax"), which may itself be coded in a table of 256 values. Other
    settings are JSON in a tensor of bytes.
    """
    for name, codes in stored.tensors.items():
        state = next(
            (s for k in ("nf4", "fp4") if (s := stored.get(f"{name}.quant_state.bitsandbytes__{k}"))), None
        )
        if state is None or codes.dtype != torch.uint8:
            continue
        parts = {
            name: "the codes",
            state.name: "the settings",
            **{f"{name}.{part}": f"the {part}" for part in _PARTS},
        }
        said = _bytes_as_json(state)
        shape = said.get("shape")
        sound = (
            isinstance(shape, list) and 0 < len(shape) <= 5 and all(type(n) is int and n > 0 for n in shape)
        )
        if not sound or type(said.get("blocksize")) is not int or said["blocksize"] < 1:
            yield Weight(
                name, (), codes.read, parts, "uint8: bitsandbytes' packed codes, without what they mean"
            )
            continue

        def read(
            stored: Stored = stored,
            name: str = name,
            codes: StoredTensor = codes,
            said: dict[str, Any] = said,
        ) -> Tensor:
            data = plain_numbers(codes.read()).reshape(-1)
            shape = torch.Size(said["shape"])
            table = _part(stored, f"{name}.quant_map", 16)
            pairs = torch.stack((data >> 4, data & 15), 1).reshape(-1)
            if pairs.numel() < shape.numel():
                raise NotMeasurableError("packed weights with fewer codes than the weight has entries")
            largest = _largest(stored, name, said)
            scale = _repeated(largest, said["blocksize"], shape.numel())
            return (table[pairs[: shape.numel()].int()] * scale).reshape(shape)

        yield Weight(name, tuple(said["shape"]), read, parts)


def _largest(stored: Stored, name: str, said: Mapping[str, Any]) -> Tensor:
    """The largest magnitude of every block."""
    largest = stored.get(f"{name}.absmax")
    if largest is None:
        raise NotMeasurableError("packed weights without their absmax")
    if f"{name}.nested_absmax" not in stored.tensors:
        return numbers(largest)
    size, offset = said.get("nested_blocksize"), said.get("nested_offset")
    outer, table = (
        numbers(stored.tensors[f"{name}.nested_absmax"]),
        _part(stored, f"{name}.nested_quant_map", 256),
    )
    codes = plain_numbers(largest.read())
    if type(size) is not int or size < 1 or not isinstance(offset, float) or codes.dtype != torch.uint8:
        raise NotMeasurableError("packed weights whose absmax is packed in a layout that is not read")
    return table[codes.int()] * _repeated(outer, size, codes.numel()) + offset


def _repeated(scale: Tensor, block: int, count: int) -> Tensor:
    """The scale of each of ``count`` entries."""
    if -(-count // block) > scale.numel():
        raise NotMeasurableError("packed weights with fewer scales than they have blocks")
    return scale[: -(-count // block)].repeat_interleave(min(block, count))[:count]


def _part(stored: Stored, name: str, count: int) -> Tensor:
    part = stored.get(name)
    if part is None or part.shape != (count,):
        raise NotMeasurableError(f"packed weights without the table {name}")
    return numbers(part)


def _bytes_as_json(stored: StoredTensor) -> dict[str, Any]:
    if stored.dtype != torch.uint8 or len(stored.shape) != 1 or stored.shape[0] > 1 << 16:
        return {}
    try:
        said = json.loads(bytes(plain_numbers(stored.read()).tolist()))
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}
