"""Large matrices, which are reduced to a band first, have the values and ranks that LAPACK finds.

``csrc/spectrum/tridiagonal_cpu.h`` says from which size on, ``band_error`` in ``csrc/spectrum/stage.h`` how
exact they are.
"""

import numpy as np
import pytest
import torch
from test_spectrum import FP32_GRAM, NATIVE, run

from rmsgd import reference
from rmsgd.backends.base import RANK, STAGE
from rmsgd.backends.spectra import measure_spectra
from rmsgd.layers import whole_matrix

ROWS = {torch.float32: 1449, torch.float64: 1027}
"""Sizes that are banded in either precision, and no multiples of the vectors and tiles of a kernel."""


def noise(rng, L, M):
    return rng.standard_normal((L, M))


def with_values(gamma, M, rng):
    """A matrix of these singular values, whose vectors are products of a few reflections: quick to make."""
    L = len(gamma)
    matrix = np.zeros((L, M))
    matrix[np.arange(L), np.arange(L)] = gamma
    for _ in range(4):
        for axis, n in enumerate(matrix.shape):
            v = rng.standard_normal(n)
            v *= np.sqrt(2.0) / np.linalg.norm(v)
            matrix -= np.outer(v, v @ matrix) if axis == 0 else np.outer(matrix @ v, v)
    return matrix


def with_zero_rows(rng, L, M):
    weight = noise(rng, L, M)
    weight[rng.choice(L, L // 3, replace=False)] = 0.0
    return weight


def with_outlier_columns(rng, L, M):
    weight = noise(rng, L, M)
    weight[:, rng.choice(M, 6, replace=False)] *= 40.0
    return weight


KINDS = {
    "noise": noise,
    "mean": lambda rng, L, M: 5.0 + noise(rng, L, M),
    "outlier columns": with_outlier_columns,
    "zero rows": with_zero_rows,
    "graded": lambda rng, L, M: with_values(np.geomspace(1.0, 1e-6, L), M, rng),
    "half equal": lambda rng, L, M: with_values(np.r_[np.ones(L // 2), rng.random(L - L // 2) * 0.3], M, rng),
    "all equal": lambda rng, L, M: with_values(np.ones(L), M, rng),
    "block of an identity": lambda rng, L, M: np.eye(L, M),
}


@pytest.mark.parametrize("dtype", ROWS, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_values_and_ranks_are_those_of_lapack(name, dtype):
    L, M = ROWS[dtype], ROWS[dtype] + 40
    weight = torch.from_numpy(KINDS[name](np.random.default_rng(7), L, M)).to(dtype)
    wide = weight.double().numpy()
    expected = np.maximum(np.linalg.eigvalsh(wide @ wide.T)[::-1], 0.0)
    table, (gamma,) = measure_spectra([(weight, whole_matrix((L, M)))], "half")
    u = 2.0**-24 if table[0, STAGE] == FP32_GRAM else 2.0**-53
    bound = 8.0 * u * expected[0] + max(8.0 * u * expected[0], 64.0 * u * np.sqrt(np.mean(expected**2)))
    # What LAPACK is off by; it grows with the root of the size.
    bound += 128.0 * 2.0**-53 * expected[0]
    np.testing.assert_allclose(gamma.numpy() ** 2, expected, rtol=0, atol=bound)
    singular = np.sqrt(np.where(expected > 1e-13 * expected[0], expected, 0.0))
    assert int(table[0, RANK]) == reference.measure_singular_values(singular, L, M)[0]


def test_the_number_of_threads_changes_no_bit_of_a_banded_matrix():
    weight = torch.randn(1030, 1034, dtype=torch.float64)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(NATIVE.spectra([(weight, whole_matrix(weight.shape))], "all")[1][0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


SETS = """
    import json, sys
    sys.path[:0] = ["tests"]
    import numpy as np, torch, test_banded_reduction as t
    weight = t.with_outlier_columns(np.random.default_rng(1), 1025, 1030)
    expected = np.linalg.eigvalsh(weight @ weight.T)[::-1]
    matrix = (torch.from_numpy(weight), t.whole_matrix(weight.shape))
    found = t.measure_spectra([matrix], "all")[1][0].numpy() ** 2
    print(json.dumps([t.NATIVE.description, float(abs(found - expected).max() / expected[0])]))
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_reduces_to_a_band(isa):
    from rmsgd import _cpu

    sets = ["baseline", "avx2", "avx512"]
    if isa != "baseline" and sets.index(isa) > sets.index(_cpu.isa()):
        pytest.skip(f"this CPU has no {isa}")
    description, error = run(SETS, RMSGD_ISA=isa)
    assert isa in description
    assert error < 144.0 * 2.0**-53
