"""GPTQ's and AWQ's weights of two to eight bits."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rmsgd.inspection.reading.stored import NotMeasurableError, StoredTensor, plain_numbers
from rmsgd.inspection.weights.bits import unpack
from rmsgd.inspection.weights.rule import Stored, Weight, numbers, split

_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # the order of the eight codes in an integer


def gptq_and_awq(stored: Stored) -> Iterator[Weight]:
    """GPTQ and AWQ: "qweight", "qzeros" and "scales", (code - zero) * scale, with the inputs as rows.

    GPTQ packs the rows, and AWQ packs the columns in an order of its own. The first of GPTQ's two versions
    stores zero points one too small. quantize_config.json gives the version; without it, zero points in the
    middle of the codes do.
    """
    for name, codes in stored.tensors.items():
        outer, last = split(name)
        scales, zeros = stored.get(f"{outer}scales"), stored.get(f"{outer}qzeros")
        if last != "qweight" or codes.dtype != torch.int32 or scales is None or zeros is None:
            continue
        if any(len(x.shape) != 2 or 0 in x.shape for x in (codes, scales, zeros)):
            continue
        order = stored.get(f"{outer}g_idx")
        parts = {name: "the codes", scales.name: "the scales", zeros.name: "the zero points"}
        parts |= {order.name: "the groups"} if order is not None else {}
        groups, outputs = scales.shape
        if codes.shape[1] == outputs:
            yield _gptq(f"{outer}weight", stored.settings, codes, scales, zeros, order, parts)
        elif codes.shape[1] * 8 == outputs and zeros.shape == (groups, codes.shape[1]):
            yield _awq(f"{outer}weight", codes, scales, zeros, parts)
        else:
            yield Weight(name, (), codes.read, parts, "int32: packed codes that do not fit their scales")


def _gptq(
    name: str,
    settings: Mapping[str, Any],
    codes: StoredTensor,
    scales: StoredTensor,
    zeros: StoredTensor,
    order: StoredTensor | None,
    parts: dict[str, str],
) -> Weight:
    groups, outputs = scales.shape
    bits, odd = divmod(zeros.shape[1] * 32, outputs)
    if odd or bits not in (2, 3, 4, 8) or zeros.shape[0] != groups:
        return Weight(
            name, (), codes.read, parts, "int32: GPTQ's packed codes that do not fit their zero points"
        )
    inputs = codes.shape[0] * 32 // bits
    if inputs % groups if order is None else order.shape != (inputs,):
        return Weight(name, (), codes.read, parts, "int32: GPTQ's packed codes that do not fit their groups")

    def read() -> Tensor:
        q = unpack(plain_numbers(codes.read()).t(), bits, inputs)
        zero = unpack(plain_numbers(zeros.read()), bits, outputs).int()
        zero = zero + _zero_offset(settings, zero, bits)
        group = torch.arange(inputs) // (inputs // groups)
        if order is not None:
            group = plain_numbers(order.read()).long()
            if int(group.min()) < 0 or int(group.max()) >= groups:
                raise NotMeasurableError("int32: GPTQ's packed codes with groups that have no scales")
        scale = numbers(scales)
        return (q - zero[group].t()) * scale[group].t()

    return Weight(name, (outputs, inputs), read, parts)


def _zero_offset(settings: Mapping[str, Any], zeros: Tensor, bits: int) -> int:
    """1 where the zero points are stored one too small, as GPTQ's first version does, else 0."""
    said = _gptq_format(settings)
    if said is not None:
        return 0 if said == "gptq_v2" else 1
    middle = 2 ** (bits - 1)
    if bool((zeros == middle).all()):
        return 0
    if bool((zeros == middle - 1).all()):
        return 1
    raise NotMeasurableError("int32: GPTQ's packed codes, and no quantize_config.json says of which version")


def _gptq_format(settings: Mapping[str, Any]) -> str | None:
    config = settings.get("config.json")
    inner = config.get("quantization_config") if isinstance(config, dict) else None
    for said in (settings.get("quantize_config.json"), settings.get("quant_config.json"), inner):
        if isinstance(said, dict):
            return str(said.get("checkpoint_format", "gptq"))
    return None


def _awq(
    name: str, codes: StoredTensor, scales: StoredTensor, zeros: StoredTensor, parts: dict[str, str]
) -> Weight:
    groups, outputs = scales.shape
    inputs = codes.shape[0]
    if inputs % groups:
        return Weight(name, (), codes.read, parts, "int32: AWQ's packed codes that do not fit their scales")

    def in_order(words: StoredTensor) -> Tensor:
        unpacked = unpack(plain_numbers(words.read()), 4, outputs)
        return unpacked.reshape(unpacked.shape[0], -1, 8)[..., _AWQ_ORDER].reshape(unpacked.shape)

    def read() -> Tensor:
        group = torch.arange(inputs) // (inputs // groups)
        zero, scale = in_order(zeros).int(), numbers(scales)
        return ((in_order(codes) - zero[group]) * scale[group]).t()

    return Weight(name, (outputs, inputs), read, parts)
