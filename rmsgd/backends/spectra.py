"""Metrics and singular values of any matrices, wherever they lie, all at once."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rmsgd.backends import backend_for
from rmsgd.backends.base import FIELDS, MEASURED, RANK, STATUS, MeasuresSpectra, Values
from rmsgd.backends.svd import measure_by_svd
from rmsgd.layers import Unfolding, whole_matrix

Matrix = tuple[Tensor, Unfolding]


@torch.no_grad()
def measure_spectra(
    matrices: Sequence[Matrix], values: Values, exact: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """The metrics table of these matrices, float64 on the host, and their singular values.

    Args:
        matrices: weights of a dtype that backends take, with at least one entry, and how each is seen as a
            matrix; on any devices.
        values: see ``base.Values``. Of a matrix whose rank only an SVD could tell, as of one of low rank, the
            values are always those of the SVD.
        exact: an SVD in float64 of every matrix.

    Returns:
        (matrices, FIELDS) as ``base.Backend.measure`` gives it, and for every matrix its L singular values,
        descending, float64 on its device, NaN where an entry is not finite. With "top", those above the noise
        threshold alone.

    Raises:
        ValueError: RMSGD_BACKEND names what does not run on one of the devices.
    """
    table = torch.empty(len(matrices), FIELDS, dtype=torch.float64, device="cpu")
    found: list[Tensor] = [table] * len(matrices)
    for device in {weight.device for weight, _ in matrices}:
        here = [i for i, (weight, _) in enumerate(matrices) if weight.device == device]
        backend = backend_for(device)
        mine = [matrices[i] for i in here]
        if isinstance(backend, MeasuresSpectra) and not exact:
            rows, gammas = backend.spectra(mine, values)
        else:
            rows, gammas = measure_by_svd(mine, backend.measure_spectrum)
        table[here] = rows.to(table.device)
        for i, gamma in zip(here, gammas, strict=True):
            found[i] = gamma
    for i, row in enumerate(table.tolist()):
        if row[STATUS] != MEASURED:
            found[i] = torch.full_like(found[i], math.nan)
        elif values == "top":
            found[i] = found[i][: int(row[RANK])]
    return table, found


def eigenvalues(weights: Sequence[Tensor], all_known: bool = False) -> list[Tensor]:
    """All eigenvalues of ``W W^T``, or of ``W^T W`` if that is smaller, of every matrix at once.

    Args:
        weights: matrices (m, n) of any shapes and strides, slices of a kernel too, on any devices, of the
            dtypes that backends take.
        all_known: measure in float64, for about twice the time.

    Returns:
        For each (min(m, n),) float64 on its device, descending, never below 0; NaN where a weight has a NaN
        or an Inf. The larger half is known to three digits; each of the others is too, or it is 0. With
        ``all_known`` none is 0 for that. Below 1e-12 of the largest eigenvalue no digit is promised.
    """
    values: Values = "all" if all_known else "bulk"
    _, gammas = measure_spectra([(weight, whole_matrix(weight.shape)) for weight in weights], values)
    return [gamma * gamma for gamma in gammas]
