"""Weights of eight bits, integers or floats, whose scales are stored beside them."""

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from rmsgd.inspection.reading.stored import NotMeasurableError, StoredTensor
from rmsgd.inspection.weights.rule import Stored, Weight, numbers, split

EIGHT_BITS = {
    torch.int8,
    torch.uint8,
    *(getattr(torch, name) for name in dir(torch) if name.startswith(("float8_e4", "float8_e5"))),
}

_LONGEST = 200
"""The most letters of a part's name in its module."""


def torchao(stored: Stored) -> Iterator[Weight]:
    """torchao: "0._weight_qdata" with "0._weight_scale" and "0._weight_zero_point" is "0.weight"."""
    beside = _torchao_parts(stored)
    for name, codes in stored.tensors.items():
        outer, last = split(name)
        stem = name.removesuffix("qdata")
        if stem not in beside:
            continue
        weight = f"{outer}{last[1:].removesuffix('_qdata')}"
        parts = {name: "the codes", f"{stem}scale": "the scales", f"{stem}zero_point": "the zero points"}
        parts |= {other: "a constant" for other in beside[stem] if other not in parts}
        scale, zero = stored.get(f"{stem}scale"), stored.get(f"{stem}zero_point")
        if codes.dtype not in EIGHT_BITS or scale is None:
            yield Weight(
                weight, (), codes.read, parts, f"{_kind(codes)}: torchao's codes, in a layout of its own"
            )
        else:
            yield _scaled(weight, codes, scale, zero, parts)


def _torchao_parts(stored: Stored) -> dict[str, list[str]]:
    """From the beginning of the names of each of torchao's weights to all parts that it is stored in."""
    found: dict[str, list[str]] = {
        name.removesuffix("qdata"): []
        for name in stored.tensors
        if re.fullmatch(r"_.+_qdata", name.rpartition(".")[2][:_LONGEST])
    }
    for name in stored.tensors if found else ():
        outer, last = split(name)
        if last.startswith("_") and len(last) <= _LONGEST:
            stems = (f"{outer}{last[: underscore.end()]}" for underscore in re.finditer("_", last))
            for stem in stems:
                if stem in found:
                    found[stem].append(name)
    return found


def quanto(stored: Stored) -> Iterator[Weight]:
    """quanto: "0.weight._data" with "0.weight._scale" is "0.weight"; with a "_shift" the codes are packed."""
    for name, codes in stored.tensors.items():
        weight = name.removesuffix("._data").removesuffix("._data")
        scale = stored.get(f"{weight}._scale")
        if weight == name or not name.endswith("._data") or scale is None:
            continue
        parts = {name: "the codes", scale.name: "the scales", f"{weight}._shift": "the shifts"}
        packed = f"{weight}._shift" in stored.tensors or name.endswith("._data._data")
        if packed or codes.dtype not in EIGHT_BITS:
            yield Weight(weight, (), codes.read, parts, f"{_kind(codes)}: quanto's packed codes")
        else:
            yield _scaled(weight, codes, scale, None, parts)


def eight_bits(stored: Stored) -> Iterator[Weight]:
    """A weight with scales of a usual name: that of compressed-tensors, DeepSeek, ComfyUI or gpt-fast."""
    for name, codes in stored.tensors.items():
        if codes.dtype not in EIGHT_BITS or len(codes.shape) < 2:
            continue
        outer, last = split(name)
        names = [f"{name}_scale_inv", f"{name}_scale", f"{name}.scale", f"{outer}scale_{last}"]
        names += [f"{outer}scales"] if last == "weight" else []
        scales = [scale for scale in map(stored.tensors.get, names) if scale is not None]
        if not scales:
            continue
        seconds = (f"{name}_scale_2", f"{name}_global_scale")
        zero = stored.tensors.get(f"{name}_zero_point")
        parts = {name: "the codes", f"{name}_zero_point": "the zero points"}
        parts |= dict.fromkeys([*(scale.name for scale in scales), *seconds], "the scales")
        if any(second in stored.tensors for second in seconds):
            yield Weight(name, (), codes.read, parts, f"{_kind(codes)}: packed weights with scales of scales")
        elif codes.dtype == torch.uint8:
            yield Weight(name, (), codes.read, parts, "uint8: quantised or packed weights")
        elif len(scales) > 1:
            yield Weight(name, (), codes.read, parts, f"{_kind(codes)}: codes with scales of several names")
        else:
            yield _scaled(name, codes, scales[0], zero, parts)


def _scaled(
    name: str, codes: StoredTensor, scale: StoredTensor, zero: StoredTensor | None, parts: dict[str, str]
) -> Weight:
    def read() -> Tensor:
        weight = numbers(codes)
        if zero is not None and zero.shape != (0,):
            weight = weight - over_blocks(_of_scale(zero), weight.shape)
        return weight * over_blocks(_of_scale(scale).to(weight), weight.shape)

    return Weight(name, codes.shape, read, parts)


def _of_scale(scale: StoredTensor) -> Tensor:
    try:
        return numbers(scale)
    except NotMeasurableError as reason:
        raise NotMeasurableError(f"8-bit values whose scales are {reason}") from None


def over_blocks(scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A scale for every entry, from one for the tensor, one for each row or one for each block.

    Raises:
        NotMeasurableError: the scale's shape does not fit such blocks.
    """
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.shape == shape[:1]:
        return scale.reshape(-1, *(1 for _ in shape[1:]))
    if scale.ndim == len(shape) and scale.numel():
        for d, (size, blocks) in enumerate(zip(shape, scale.shape, strict=True)):
            block = _block(size, blocks)
            if block is None:
                break
            scale = scale.repeat_interleave(block, d).narrow(d, 0, size)
        else:
            return scale
    raise NotMeasurableError(f"8-bit values with scales of shape {tuple(scale.shape)}, which fit no blocks")


def _block(size: int, blocks: int) -> int | None:
    """How many of ``size`` entries share a scale where there are ``blocks`` scales; None if no number fits.

    Formats have blocks of 16, 32 or 128, of which the last may be smaller: 576 rows have 5 scales.
    """
    powers = [2**k for k in range(8)]
    equal = [size // blocks] if blocks and size % blocks == 0 else []
    return next((block for block in powers + equal if blocks and -(-size // block) == blocks), None)


def _kind(codes: StoredTensor) -> str:
    return str(codes.dtype).removeprefix("torch.")
