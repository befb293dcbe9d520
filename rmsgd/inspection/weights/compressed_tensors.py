"""The packed weights of compressed-tensors (llm-compressor, vLLM), of one to eight bits."""

from collections.abc import Iterator

import torch
from torch import Tensor

from rmsgd.inspection.reading.stored import NotMeasurableError, StoredTensor, plain_numbers
from rmsgd.inspection.weights.bits import unpack
from rmsgd.inspection.weights.rule import Stored, Weight, numbers, small_numbers


def compressed_tensors(stored: Stored) -> Iterator[Weight]:
    """compressed-tensors: "weight_packed" in int32, with the shape and the scales beside it.

    Codes are stored with half of their range added. Zero points, if there are any, are packed in the same
    way.
    """
    for name, codes in stored.tensors.items():
        weight = name.removesuffix("_packed")
        scale = stored.get(f"{weight}_scale")
        if weight == name or scale is None:
            continue
        others = ("shape", "zero_point", "g_idx", "global_scale")
        parts = {name: "the codes", scale.name: "the scales"}
        parts |= {f"{weight}_{other}": f"the {other}" for other in others}
        shape = small_numbers(stored.get(f"{weight}_shape"), 2)
        zero, order = stored.get(f"{weight}_zero_point"), stored.get(f"{weight}_g_idx")
        bits = _bits_of(codes, shape)
        if shape is None or bits is None or not _fits(shape, scale, order):
            what = f"{str(codes.dtype).removeprefix('torch.')}: packed codes in a layout that is not read"
            yield Weight(weight, (), codes.read, parts, what)
            continue

        def read(
            codes: StoredTensor = codes,
            scale: StoredTensor = scale,
            zero: StoredTensor | None = zero,
            order: StoredTensor | None = order,
            bits: int = bits,
            shape: list[int] = shape,
        ) -> Tensor:
            rows, columns = shape
            half, scales = 2 ** (bits - 1), numbers(scale)
            q = unpack(plain_numbers(codes.read()), bits, columns).float() - half
            groups = scales.shape[1]
            group = torch.arange(columns) // (columns // groups)
            if order is not None:
                group = plain_numbers(order.read()).long()
                if int(group.min()) < 0 or int(group.max()) >= groups:
                    raise NotMeasurableError("packed codes with groups that have no scales")
            if zero is not None:
                zeros = plain_numbers(zero.read())
                if zeros.dtype == torch.int32 and zeros.shape != scales.shape:
                    zeros = unpack(zeros.t(), bits, rows).t().float() - half
                q = q - zeros.float().expand(rows, groups)[:, group]
            scaled: Tensor = q * scales.expand(rows, groups)[:, group]
            return scaled

        yield Weight(weight, tuple(shape), read, parts)


def _fits(shape: list[int], scale: StoredTensor, order: StoredTensor | None) -> bool:
    """Whether there is a scale for every group of columns, and a group for every column."""
    if len(scale.shape) != 2 or scale.shape[0] not in (1, shape[0]) or not 0 < scale.shape[1] <= shape[1]:
        return False
    return shape[1] % scale.shape[1] == 0 if order is None else order.shape == (shape[1],)


def _bits_of(codes: StoredTensor, shape: list[int] | None) -> int | None:
    """The number of bits of a code, if only one number fits, else None."""
    if shape is None or len(shape) != 2 or codes.dtype != torch.int32 or len(codes.shape) != 2:
        return None
    if min(shape) < 1 or codes.shape[0] != shape[0]:
        return None
    fitting = [bits for bits in range(1, 9) if -(-shape[1] * bits // 32) == codes.shape[1]]
    return fitting[0] if len(fitting) == 1 else None
