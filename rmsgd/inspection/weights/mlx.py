"""MLX's weights of two to eight bits."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rmsgd.inspection.reading.stored import StoredTensor, plain_numbers
from rmsgd.inspection.weights.bits import unpack
from rmsgd.inspection.weights.rule import Stored, Weight, numbers, split


def packed(stored: Stored) -> Iterator[Weight]:
    """MLX: "weight" in uint32, with "scales" and "biases" for groups of the columns: codes * scale + bias.

    The tensors do not show how many bits a code has. config.json does.
    """
    for name, codes in stored.tensors.items():
        outer, last = split(name)
        scales, biases = stored.get(f"{outer}scales"), stored.get(f"{outer}biases")
        if last != "weight" or codes.dtype != torch.uint32 or scales is None:
            continue
        parts = {name: "the codes", scales.name: "the scales", f"{outer}biases": "the biases"}
        said = _mlx_settings(stored.settings, outer.rstrip("."))
        if biases is None or said is None or len(codes.shape) < 2:
            why = "MLX's packed codes, and no config.json beside them says of how many bits"
            if said is not None:
                why = "MLX's packed codes in a mode that is not read"
            yield Weight(name, (), codes.read, parts, f"uint32: {why}")
            continue
        bits, group = said
        columns = codes.shape[-1] * 32 // bits
        groups = (*codes.shape[:-1], columns // group)
        if columns % group or scales.shape != groups or biases.shape != groups:
            yield Weight(
                name, (), codes.read, parts, "uint32: MLX's packed codes, which do not fit config.json"
            )
            continue

        def read(
            codes: StoredTensor = codes,
            scales: StoredTensor = scales,
            biases: StoredTensor = biases,
            bits: int = bits,
            group: int = group,
            columns: int = columns,
        ) -> Tensor:
            words = plain_numbers(codes.read())
            weight = unpack(words.flatten(0, -2), bits, columns).float().reshape(*scales.shape, group)
            weight = weight * numbers(scales)[..., None] + numbers(biases)[..., None]
            return weight.reshape(*codes.shape[:-1], columns)

        yield Weight(name, (*codes.shape[:-1], columns), read, parts)


def channels_last(stored: Stored) -> Iterator[Weight]:
    """MLX's convolutions in two and three dimensions, (o, *k, i)."""
    if stored.settings.get("format") != "mlx":
        return
    for name, weight in stored.tensors.items():
        if len(weight.shape) not in (4, 5) or not weight.dtype or not weight.dtype.is_floating_point:
            continue
        order = (0, len(weight.shape) - 1, *range(1, len(weight.shape) - 1))

        def read(weight: StoredTensor = weight, order: tuple[int, ...] = order) -> Tensor:
            return plain_numbers(weight.read()).permute(order)

        yield Weight(name, tuple(weight.shape[d] for d in order), read, {name: "the weight"})


def _mlx_settings(settings: Mapping[str, Any], module: str) -> tuple[int, int] | None:
    """Bits and group size of a module, for which config.json may have settings of its own."""
    config = settings.get("config.json")
    said = config.get("quantization") if isinstance(config, dict) else None
    if isinstance(said, dict) and isinstance(said.get(module), dict):
        said = {**said, **said[module]}
    if not isinstance(said, dict) or said.get("mode", "affine") != "affine":
        return None
    bits, group = said.get("bits"), said.get("group_size")
    if type(bits) is not int or type(group) is not int or bits not in range(2, 9) or not 1 <= group <= 1024:
        return None
    return bits, group
