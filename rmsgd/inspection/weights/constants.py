"""Tensors of a checkpoint that were not trained: masks, tables, fixed filters.

A state dict does not distinguish parameters from buffers. This module recognises constants by names and
numbers. Each of its answers is the reason that a report gives.
"""

import math
import re

import torch
from torch import Tensor

from rmsgd.inspection.reading.stored import StoredTensor

_NAMES = {
    "a mask": r"(.*_)?masks?|masked_bias|causal_mask|tril",
    "indices": r"(.*_)?(position_ids|position_index|indices|idx)|g_idx",
    "a table of positions": r"relative_coords_table|(.*_)?(cos|sin)_cached|freqs_(cis|cos|sin)|inv_freq|"
    r"pos_table|anchors?|anchor_grid|anchor_points|grid|coords_table",
    "a fixed filter": r"filt|blur_(filter|kernel)|resample_filter|mel_(filters?|basis|fb)|filter_bank|"
    r"(forward|inverse)_basis(_buffer)?|dct_(mat|matrix)|gaussian_kernel|sobel_[xy]|"
    r"mel_scale\.fb",
    "constants of rotation groups": r"_?w3j(_.*)?|U_matrix_.*|clebsch_gordan|(.*_)?cg(_.*)?|J_?dense|"
    r"wigner_.*",
    "statistics": r"running_(mean|var|cov.*)|embed_avg|cluster_size|ema_w",
}
_COMPILED = {reason: re.compile(pattern) for reason, pattern in _NAMES.items()}

_LOOK_FIRST = 4096
"""How many entries are looked at first: they decide for almost every weight."""
_LARGEST_ROTATION = 33


def constant_by_name(stored: StoredTensor) -> str | None:
    """Why a tensor must not be measured, by its name; None if its name does not tell."""
    if stored.role == "buffer":
        return "a buffer, not a parameter"
    if stored.role == "parameter":
        return None
    last = stored.name.rpartition(".")[2]
    last_two = ".".join(stored.name.rsplit(".", 2)[-2:])
    for reason, pattern in _COMPILED.items():
        if pattern.fullmatch(last) or pattern.fullmatch(last_two):
            return f"by its name {reason}, not a weight"
    # A causal mask: GPT-2's "attn.bias" has as many rows as columns, behind dimensions of 1.
    if (
        last == "bias"
        and len(stored.shape) == 4
        and stored.shape[:2] == (1, 1)
        and len({*stored.shape[2:]}) == 1
    ):
        return "by its name and shape a mask, not a weight"
    return None


def constant_by_value(stored: StoredTensor, weight: Tensor) -> str | None:
    """Why a tensor must not be measured, by its numbers, or None. ``weight`` has a floating dtype.

    A weight that is all zero counts as one that was not trained yet.
    """
    if stored.role is not None or weight.numel() < 2:
        return None
    return (
        _whole_numbers(weight)
        or _repeated_kernels(weight)
        or _symmetric_kernels(weight)
        or _sines(weight)
        or _couplings(weight)
    )


def _whole_numbers(weight: Tensor) -> str | None:
    for part in (weight.reshape(-1)[:_LOOK_FIRST], weight):
        if not bool((part == part.round()).all()):
            return None
    low, high = weight.min().item(), weight.max().item()
    if not math.isfinite(low) or not math.isfinite(high):
        return None
    if low == high:
        return None if low == 0 else f"every entry is {low:g}: a constant, not a weight"
    if {low, high} == {0, 1}:
        return "only zeros and ones: a mask or indices, not a weight"
    # A number so large that its type has no fractions there tells nothing.
    if 2 * (weight.abs() < 1.0 / torch.finfo(weight.dtype).eps).sum() < weight.numel():
        return None
    return "only whole numbers: a table or codes, not a weight"


def _kernels(weight: Tensor) -> Tensor | None:
    """The kernels of a convolution, one per row, if they have three entries or more along some side."""
    if weight.ndim < 3 or max(weight.shape[2:]) < 3:
        return None
    return weight.flatten(0, 1).flatten(1)


def _repeated_kernels(weight: Tensor) -> str | None:
    kernels = _kernels(weight)
    if kernels is None or kernels.shape[0] < 2 or not bool(kernels[0].any()):
        return None
    if not torch.equal(kernels[0], kernels[1]) or not bool((kernels == kernels[0]).all()):
        return None
    return "the same kernel for all channels: a fixed filter, not a weight"


def _symmetric_kernels(weight: Tensor) -> str | None:
    kernels = _kernels(weight)
    if kernels is None or not bool(kernels.any()):
        return None
    sides = [d for d in range(2, weight.ndim) if weight.shape[d] > 2]
    if not torch.equal(kernels[0], weight[0, 0].flip([d - 2 for d in sides]).flatten()):
        return None
    if not all(torch.equal(weight, weight.flip([d])) for d in sides):
        return None
    return "kernels that are exactly symmetric: fixed filters, not a weight"


def _sines(weight: Tensor) -> str | None:
    """Recognise a table of positions: sines beside the cosines of the same angles, a pair in two columns."""
    table = weight.reshape(-1, weight.shape[-1])
    columns = table.shape[1]
    if columns < 4 or columns % 2 or table.shape[0] < 2:
        return None
    table = table[:_LOOK_FIRST]
    table = table[table.any(dim=1)].float()  # a class token has a row of zeros
    halves = table[:, : columns // 2], table[:, columns // 2 :]
    if not len(table):
        return None
    layouts = [(table[:, 0::2], table[:, 1::2]), halves]
    if columns % 4 == 0:  # the positions may be rows and columns of an image
        quarters = table.reshape(len(table), 4, -1)
        layouts.append((quarters[:, 0::2], quarters[:, 1::2]))
    for a, b in layouts:
        if bool(((a**2 + b**2 - 1).abs() < 0.02).all()):
            return "sines and cosines: a table of positions, not a weight"
    return None


def _couplings(weight: Tensor) -> str | None:
    """Recognise Clebsch-Gordan coefficients, with slices along three odd dimensions orthogonal and alike."""
    shape = weight.shape
    if weight.ndim != 3 or any(n % 2 == 0 or n > _LARGEST_ROTATION for n in shape) or max(shape) == 1:
        return None
    for d in range(3):
        rows = weight.transpose(0, d).flatten(1).double()
        gram = rows @ rows.t()
        size = gram[0, 0]
        if size <= 0 or not bool(
            (gram - size * torch.eye(len(gram), device=gram.device)).abs().max() < 1e-3 * size
        ):
            return None
    return "orthogonal along three odd dimensions: Clebsch-Gordan coefficients, not a weight"
