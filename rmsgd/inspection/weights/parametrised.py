"""Weights that a module makes from other tensors when it runs: pruned, weight-normed, spectrally normed."""

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from rmsgd.inspection.reading.stored import NotMeasurableError, StoredTensor
from rmsgd.inspection.weights.rule import Stored, Weight, numbers


def weight_norm(stored: Stored) -> Iterator[Weight]:
    """weight_norm: "weight_g" and "weight_v", or "original0" and "original1", is g v / |v|."""
    parametrised = _parametrised(stored)
    for name, direction in stored.tensors.items():
        weight, size = name.removesuffix("_v"), f"{name.removesuffix('_v')}_g"
        if name.endswith(".original1") and (stem := name.removesuffix("original1")) in parametrised:
            weight, inside = parametrised[stem]
            size = f"{stem}original0" if inside == {"original0", "original1"} else ""
        magnitude = stored.get(size)
        if weight == name or magnitude is None or not _is_norm(magnitude.shape, direction.shape):
            continue

        def read(direction: StoredTensor = direction, magnitude: StoredTensor = magnitude) -> Tensor:
            v, g = numbers(direction), numbers(magnitude)
            over = [d for d in range(v.ndim) if g.ndim != v.ndim or g.shape[d] == 1]
            norm: Tensor = torch.linalg.vector_norm(v, dim=over, keepdim=True)
            return g * (v / norm)

        yield Weight(weight, direction.shape, read, {name: "the directions", size: "the magnitudes"})


def _is_norm(magnitude: tuple[int, ...], direction: tuple[int, ...]) -> bool:
    """Whether these are the magnitudes of the slices along one dimension, or of the whole tensor."""
    if len(direction) < 2 or magnitude == ():
        return len(direction) > 1
    if len(magnitude) != len(direction):
        return False
    kept = [m for m, n in zip(magnitude, direction, strict=True) if m != 1]
    return len(kept) < 2 and all(m in (1, n) for m, n in zip(magnitude, direction, strict=True))


def pruned_or_normed(stored: Stored) -> Iterator[Weight]:
    """ "weight_orig" with a mask (pruning) or with "weight_u" and "weight_v" (spectral_norm)."""
    for name, original in stored.tensors.items():
        weight = name.removesuffix("_orig")
        if weight == name or len(original.shape) < 2:
            continue
        mask, u, v = (stored.get(f"{weight}_{part}") for part in ("mask", "u", "v"))
        if mask is not None and mask.shape == original.shape:
            yield _masked(weight, original, mask)
        elif u is not None and v is not None:
            yield _spectral(weight, original, u, v)
        else:
            parts = {name: "the original"}
            yield Weight(
                weight, (), original.read, parts, "a part of a weight, of which the rest is not here"
            )


def parametrizations(stored: Stored) -> Iterator[Weight]:
    """torch's parametrizations: a mask or spectral_norm. Others store nothing that tells what they do."""
    for stem, (weight, inside) in _parametrised(stored).items():
        name = next((f"{stem}{last}" for last in sorted(inside) if re.fullmatch(r"original\d*", last)), "")
        original = stored.tensors.get(name)
        if original is None or len(original.shape) < 2:
            continue
        others = inside - {name.removeprefix(stem)}
        mask, u, v = (stored.get(f"{stem}0.{part}") for part in ("mask", "_u", "_v"))
        if others == {"0.mask"} and mask is not None and mask.shape == original.shape:
            yield _masked(weight, original, mask)
        elif others == {"0._u", "0._v"} and u is not None and v is not None:
            yield _spectral(weight, original, u, v)
        else:
            why = "what a parametrization makes a weight of, and which one does not show in the file"
            parts = {f"{stem}{other}": "a constant" for other in sorted(others) if "lora" not in other}
            yield Weight(weight, (), original.read, {name: "the original", **parts}, why)


def _parametrised(stored: Stored) -> dict[str, tuple[str, set[str]]]:
    """From the path of the parts of every parametrised weight to its name and its parts."""
    found: dict[str, tuple[str, set[str]]] = {}
    for name in stored.tensors:
        if match := re.fullmatch(r"((.*?)parametrizations\.([^.]+)\.)(.+)", name):
            found.setdefault(match[1], (match[2] + match[3], set()))[1].add(match[4])
    return found


def _masked(weight: str, original: StoredTensor, mask: StoredTensor) -> Weight:
    parts = {original.name: "the original", mask.name: "the mask"}
    return Weight(weight, original.shape, lambda: numbers(original) * numbers(mask), parts)


def _spectral(weight: str, original: StoredTensor, u: StoredTensor, v: StoredTensor) -> Weight:
    """The original over its largest singular value, u W v, by the vectors of the last power iteration.

    W has the rows of the first dimension, or of the second where the module is a transposed convolution.
    """
    parts = {original.name: "the original", u.name: "a singular vector", v.name: "a singular vector"}

    def read() -> Tensor:
        w, left, right = numbers(original), numbers(u).to(torch.float64), numbers(v).to(torch.float64)
        rows = (w.transpose(0, d).flatten(1) for d in (0, 1) if w.shape[d] == left.numel())
        fitting = [m.double() for m in rows if left.ndim == right.ndim == 1 and m.shape[1] == right.numel()]
        if not fitting:
            raise NotMeasurableError("a spectrally normed weight whose singular vectors do not fit it")
        # Where both fit, the wrong one gives the small value of unrelated vectors.
        sigma = max((float(left @ m @ right) for m in fitting), key=abs)
        if sigma == 0 or sigma != sigma:
            raise NotMeasurableError("a spectrally normed weight whose norm is 0")
        return w / sigma

    return Weight(weight, original.shape, read, parts)
