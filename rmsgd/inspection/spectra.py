"""``rmsgd.spectra``: the singular values of every layer of a network, or of a list of matrices, at once."""

import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rmsgd.backends.base import NOISE_VARIANCE, RANK, why_not_measured
from rmsgd.backends.spectra import measure_spectra
from rmsgd.inspection.measuring import Measuring, ProbeSource
from rmsgd.inspection.reading.stored import StoredTensor, as_tensor, is_plain
from rmsgd.inspection.selection import Selection, usable_device
from rmsgd.layers import Unfolding, check_matrix, unfoldings, whole_matrix
from rmsgd.reference import threshold


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one matrix, and the noise that EVBMF finds in it."""

    name: str
    """The key under which the weight is stored; of a list of matrices the index, "0", "1" and so on."""
    shape: tuple[int, ...]
    """The shape of the weight."""
    mode: str
    """"matrix"; "in" or "out", an unfolding of a kernel; "in and out" of one of 1 x 1, where they are
    transposes of each other. Empty where the weight was not measured."""
    singular_values: Tensor
    """float64 on the weight's device, in its units, descending, as they are (``evbmf`` shrinks them): (rank,)
    with "top", (L,) with "all", L being the smaller side. Empty where the weight was not measured."""
    rank: int
    """How many of them are above the noise threshold."""
    noise_variance: float
    """Per entry, in squared units of the weight: where the free energy is least. NaN where not measured."""
    noise_threshold: float
    """``sqrt(M x_ noise_variance)`` in units of the weight, M being the larger side and x_ the threshold that
    the docs on rank selection give. NaN where not measured."""
    skipped: str | None = None
    """Why the weight was not measured; None where it was."""


def spectra(
    source: ProbeSource | Sequence[Tensor],
    values: Literal["top", "all"] = "top",
    exact: bool = False,
    *,
    filter: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    key: str | None = None,
    include_buffers: bool = False,
    merge_lora: bool = False,
    device: torch.device | str | None = None,
) -> tuple[Spectrum, ...]:
    """The singular values of every layer of a network, or of a list of matrices of any shapes, all at once.

    They come from the Gram matrix of the smaller side, for all matrices in one call of the compiled core. A
    value g that stands for gamma is exact to ``|g^2 - gamma^2| <= 16 u gamma_1^2``, gamma_1 being the
    largest (of 1024 values and more, to 64 u times the root mean square of all gamma^2 if that is more). With
    "all", u is 2^-53: what is below some 4e-8 gamma_1 is rounding, or 0. With "top", u is 2^-53 or, where
    that settles how many values there are, 2^-24: g is within 5e-7 gamma_1^2 / gamma. Where a Gram matrix
    cannot settle the rank, as in a weight of low rank, the values are those of an SVD in float64.

    Args:
        source: a list of matrices (m, n), either side the larger, of any real floating dtype, any strides, on
            any devices; or whatever ``probe`` reads, whose layers are seen as ``probe`` sees them: a kernel
            in its two unfoldings, a pruned or quantised weight as the network uses it.
        values: "top", those above the noise threshold, or "all", as many as the smaller side is long.
        exact: take an SVD in float64 of every matrix, which is several times as slow. Values are then right
            to a few 2^-53 of gamma_1, and those that are numerically zero are 0.
        filter: as in ``probe``, and so are exclude, key, include_buffers and merge_lora. A list of matrices
            takes none of them.
        exclude: see filter.
        key: see filter.
        include_buffers: see filter.
        merge_lora: see filter.
        device: where to measure. By default each tensor is measured where it lies; files, on the CPU.

    Returns:
        One spectrum per unfolding, in the order of the source. A layer of a network that cannot be measured
        has a single one, with the reason in ``skipped``.

    Warns:
        UserWarning: something of a checkpoint could not be read; the rest is measured.

    Raises:
        TypeError: ``source`` is none of these, or one of a list is no dense tensor of floating-point numbers.
        ValueError: ``values`` is neither "top" nor "all"; one of a list is not a matrix with at least one
            entry, or has a NaN or an Inf; a list was given with arguments for networks; or as ``probe``.
        CheckpointError: as ``probe`` (a ValueError).
    """
    if values not in ("top", "all"):
        raise ValueError(f'values must be "top" or "all", got {values!r}')
    if not isinstance(source, nn.Module | Mapping | str | os.PathLike | Sequence):
        hint = ": give [tensor]" if isinstance(source, Tensor) else f", got {type(source).__name__}"
        raise TypeError(
            "source must be a list of matrices, a torch.nn.Module, a mapping of names to tensors or NumPy "
            f"arrays, or a path{hint}"
        )
    selection = Selection(filter, exclude, key, include_buffers, merge_lora, device)
    if isinstance(source, Sequence) and not isinstance(source, str):
        if given := selection.given_for_networks():
            raise ValueError(f"{', '.join(given)} are for networks, and source is a list of matrices")
        return _of_matrices(source, values, exact, device)
    measuring = _SpectraOfLayers(source, selection, values, exact)
    measuring.run()
    for error in measuring.errors:
        warnings.warn(error, stacklevel=2)
    return tuple(spectrum for layer in measuring.results for spectrum in layer)


def _of_matrices(
    source: Sequence[Tensor], values: Literal["top", "all"], exact: bool, device: torch.device | str | None
) -> tuple[Spectrum, ...]:
    for index, weight in enumerate(source):
        check_matrix(weight, f"source[{index}]")
    source = [as_tensor(weight) for weight in source]
    for index, weight in enumerate(source):
        if not is_plain(weight):
            raise TypeError(f"source[{index}] must be a plain tensor, got a {type(weight).__name__}")
    if device is not None:
        target = usable_device(device)
        source = [weight.to(target) for weight in source]
    matrices = [(weight, whole_matrix(weight.shape)) for weight in source]
    found = list(_spectra([str(index) for index in range(len(source))], matrices, values, exact))
    for spectrum in found:
        if spectrum.skipped:
            raise ValueError(f"source[{spectrum.name}] has NaN or infinite entries")
    return tuple(found)


class _SpectraOfLayers(Measuring[tuple[Spectrum, ...]]):
    def __init__(
        self, source: ProbeSource, selection: Selection, values: Literal["top", "all"], exact: bool
    ) -> None:
        super().__init__(source, selection)
        self._values, self._exact = values, exact

    def measured(
        self, layers: Sequence[StoredTensor], weights: Sequence[Tensor]
    ) -> Sequence[tuple[Spectrum, ...]]:
        names, matrices = [], []
        for layer, weight in zip(layers, weights, strict=True):
            for unfolding in unfoldings(weight.shape):
                names.append(layer.name)
                matrices.append((weight, unfolding))
        found = _spectra(names, matrices, self._values, self._exact)
        results = []
        for weight in weights:
            mine = [next(found) for _ in unfoldings(weight.shape)]
            # A weight that is not finite is so in all its modes.
            results.append(tuple(mine[:1] if mine[0].skipped else mine))
        return results

    def skipped(self, layer: StoredTensor, reason: str) -> tuple[Spectrum, ...]:
        return (_skipped(layer.name, tuple(layer.shape), reason),)


def _spectra(
    names: Sequence[str],
    matrices: Sequence[tuple[Tensor, Unfolding]],
    values: Literal["top", "all"],
    exact: bool,
) -> Iterator[Spectrum]:
    table, gammas = measure_spectra(matrices, values, exact)
    for name, (weight, u), row, gamma in zip(names, matrices, table.tolist(), gammas, strict=True):
        shape = tuple(weight.shape)
        if reason := why_not_measured([row]):
            yield _skipped(name, shape, reason)
            continue
        variance = row[NOISE_VARIANCE]
        limit = math.sqrt(u.M * threshold(u.L, u.M)[2]) * math.sqrt(variance)
        yield Spectrum(name, shape, " and ".join(u.modes), gamma, int(row[RANK]), variance, limit)


def _skipped(name: str, shape: tuple[int, ...], reason: str) -> Spectrum:
    empty = torch.empty(0, dtype=torch.float64, device="cpu")
    return Spectrum(name, shape, "", empty, 0, math.nan, math.nan, reason)
