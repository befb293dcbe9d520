"""The tail exponents of many weights at once, which say how heavy the tail of a layer's spectrum is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rmsgd.backends.base import MEASURED, NOT_FINITE
from rmsgd.backends.spectra import eigenvalues
from rmsgd.metrics import plain
from rmsgd.reference import hill_alpha

ALPHA, TAIL_STATUS = range(2)
"""Columns of a table of tail exponents, which has a row per weight."""


class Slices(NamedTuple):
    """A weight as the matrices whose eigenvalues are its spectrum: a 2-D weight is one, and a kernel (o, i,
    *k) is one (o, i) for each position of k.
    """

    matrices: int
    rows: int
    columns: int

    @classmethod
    def of(cls, shape: Sequence[int]) -> "Slices":
        """The slices of a weight of this shape, of two or more dimensions."""
        return cls(math.prod(shape[2:]), shape[0], shape[1])

    @property
    def values(self) -> int:
        """The number of eigenvalues."""
        return self.matrices * min(self.rows, self.columns)

    @property
    def cost(self) -> int:
        """Estimated time to measure them, in multiplications; see ``Unfolding.cost``."""
        L, M = sorted((self.rows, self.columns))
        return self.matrices * L**2 * (M + 3 * L)


@dataclass(frozen=True)
class LayerTail:
    """The tail of one weight's spectrum."""

    name: str
    shape: tuple[int, ...]
    values: int
    """The number of eigenvalues of its spectrum."""
    alpha: float
    """The tail exponent, above 1: see ``rmsgd.reference.hill_alpha``. NaN where there is none."""
    skipped: str | None = None
    """Why the weight was not measured; None where it was."""


@dataclass(frozen=True)
class TailReport:
    """The tail exponents of a network's layers, in the order of its parameters."""

    layers: tuple[LayerTail, ...]

    @property
    def measured(self) -> tuple[LayerTail, ...]:
        """The layers that were not skipped."""
        return tuple(layer for layer in self.layers if layer.skipped is None)

    def to_dict(self) -> dict[str, Any]:
        """Return ``{"layers": [fields]}``, ready for JSON, with None for an undefined exponent."""
        return {"layers": [{k: plain(v) for k, v in vars(layer).items()} for layer in self.layers]}


def tail_exponents(weights: Sequence[tuple[Tensor, Slices]]) -> Tensor:
    """The table (weights, 2) of ``ALPHA`` and ``TAIL_STATUS``, float64 on the host; waits for a GPU.

    The eigenvalues of all slices of a kernel are one spectrum, as in TempBalance. A weight with a NaN or an
    Inf has the status ``NOT_FINITE``.
    """
    slices = [_slices(weight) for weight, _ in weights]
    found = iter(eigenvalues([part for parts in slices for part in parts]))
    spectra = [torch.stack(list(islice(found, len(parts)))).cpu() for parts in slices]
    doubtful = [(i, k) for i, values in enumerate(spectra) for k in _doubtful(values)]
    exact = eigenvalues([slices[i][k] for i, k in doubtful], all_known=True) if doubtful else []
    for (i, k), values in zip(doubtful, exact, strict=True):
        spectra[i][k] = values
    table = torch.full((len(weights), 2), math.nan, dtype=torch.float64, device="cpu")
    for row, (weight, _), values in zip(table, weights, spectra, strict=True):
        row[TAIL_STATUS] = NOT_FINITE if values.isnan().any() else MEASURED
        row[ALPHA] = hill_alpha(_significant(values, weight).sqrt().numpy().ravel())
    return table


def _doubtful(spectra: Tensor) -> list[int]:
    """The slices of a weight, of eigenvalues (slices, values), whose unknown ones may be in the upper half.

    Of each slice the larger half is known, and what is not known is 0. The upper half of all of them may
    reach further down in a slice with large values.
    """
    if len(spectra) == 1 or spectra.isnan().any():
        return []
    least = spectra.flatten().kthvalue(spectra.numel() // 2 + 1).values
    last_known = torch.where(spectra > 0.0, spectra, math.inf).amin(1)
    unknown = (spectra == 0.0).any(1) & (last_known > least) & (last_known < math.inf)
    return unknown.nonzero().flatten().tolist()


def _significant(spectra: Tensor, weight: Tensor) -> Tensor:
    """The eigenvalues (slices, values), 0 where the rounding of float32, or of float64, may be all."""
    dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
    rounding = max(weight.shape[:2]) * torch.finfo(dtype).eps
    return torch.where(spectra <= rounding**2 * spectra.amax(1, keepdim=True), 0.0, spectra)


def _slices(weight: Tensor) -> list[Tensor]:
    """The matrices of a weight, views of it where its layout allows them."""
    weight = weight.detach()
    return list(weight.flatten(2).permute(2, 0, 1)) if weight.ndim > 2 else [weight]
