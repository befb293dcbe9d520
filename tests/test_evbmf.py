"""The EVBMF noise variance is the global minimiser of the free energy, and evbmf() returns what follows."""

import math

import numpy as np
import pytest
import torch

import rmsgd
from rmsgd import backends, reference
from rmsgd.backends.base import NOISE_VARIANCE, RANK

CPU = torch.device("cpu")


def spectrum(kind, L, M, rng):
    """Singular values of one kind and of a scale between 1e-20 and 1e20, descending."""
    if kind == "gaussian":
        gamma = np.linalg.svd(rng.standard_normal((L, min(M, 4 * L))), compute_uv=False)
    elif kind == "low rank and noise":
        r = max(1, L // int(rng.integers(2, 12)))
        low = rng.standard_normal((L, r)) @ rng.standard_normal((r, min(M, 4 * L)))
        noise = rng.standard_normal((L, min(M, 4 * L)))
        gamma = np.linalg.svd(noise + rng.uniform(0.05, 4) * low, compute_uv=False)
    elif kind == "power law":
        gamma = np.arange(1.0, L + 1) ** -rng.uniform(0.1, 2.5)
    elif kind == "exponential":
        gamma = np.exp(-np.arange(L) * rng.uniform(0.005, 0.5))
    elif kind == "equal groups":
        gamma = rng.choice(rng.uniform(0.1, 3.0, int(rng.integers(1, 6))), L)
    elif kind == "nearly singular":
        gamma = np.abs(rng.standard_normal(L)) * 10 ** rng.uniform(-9, 0, L)
    else:
        gamma = np.exp(rng.standard_normal(L) * rng.uniform(0.1, 3))
    gamma = np.sort(gamma)[::-1] * 10 ** rng.uniform(-20, 20)
    gamma[gamma <= M * 2.0**-52 * gamma[0]] = 0.0  # numerically zero
    return gamma


KINDS = [
    "gaussian",
    "low rank and noise",
    "power law",
    "exponential",
    "equal groups",
    "nearly singular",
    "log-normal",
]


def dense_scan(c, L, M, points=2000):
    """The lowest free energy on a grid from below the smallest breakpoint to above the mean."""
    alpha, _, x_threshold = reference.threshold(L, M)
    low = max(c[-1] / x_threshold, c.sum() * 1e-24) / 10
    grid = np.geomspace(low, 3 * c.sum() / L, points)[:, None]
    x = c / grid
    tau = reference.tau_of(np.maximum(x, x_threshold), alpha)
    kept = 1 + alpha + alpha / tau + np.log1p(tau) + alpha * np.log1p(tau / alpha)
    return float((np.where(x > x_threshold, kept, x).sum(axis=1) + L * np.log(grid[:, 0])).min())


@pytest.mark.parametrize("kind", KINDS)
def test_no_point_of_a_dense_scan_has_a_lower_free_energy(kind):
    rng = np.random.default_rng(KINDS.index(kind))
    native = backends.backend_for(CPU)
    for _ in range(300):  # 2100 spectra over all kinds
        L = round(2 ** rng.uniform(0, 9 if rng.random() < 0.03 else 6))  # 1 to 512
        M = int(L * rng.uniform(1, 50 if rng.random() < 0.5 else 2))
        gamma = spectrum(kind, L, M, rng)
        row = native.measure_spectrum(torch.from_numpy(gamma), M)
        c = gamma * gamma / M
        found = float(row[NOISE_VARIANCE])
        if found == 0.0:
            assert np.count_nonzero(c) < L / (1 + L / M)
            continue
        energy = reference.free_energy(found * (1 + 1e-13), c, L, M), reference.free_energy(found, c, L, M)
        assert min(energy) <= dense_scan(c, L, M) + 1e-9 * (1 + abs(energy[0])), (L, M)


@pytest.mark.parametrize("kind", KINDS)
def test_rank_equals_the_oracles_wherever_the_oracles_is_stable(kind):
    rng = np.random.default_rng(100 + KINDS.index(kind))
    native = backends.backend_for(CPU)
    compared = 0
    for _ in range(120):
        L = round(2 ** rng.uniform(1, 7))
        M = int(L * rng.uniform(1, 20))
        gamma = spectrum(kind, L, M, rng)
        rank = int(native.measure_spectrum(torch.from_numpy(gamma), M)[RANK])
        c = gamma * gamma / M
        oracle = {
            reference.minimise_free_energy(c * (1 + 1e-13 * rng.standard_normal(L)), L, M)[0]
            for _ in range(3)
        }
        if len(oracle) == 1:
            compared += 1
            assert {rank} == oracle
    assert compared > 60


@pytest.mark.parametrize("scale", [1e-200, 1e-20, 1e-6, 1.0, 1e20, 1e200, 1e306])
def test_scaling_a_matrix_scales_what_is_found(scale):
    torch.manual_seed(1)
    matrix = (
        torch.randn(20, 60, dtype=torch.float64)
        + 3 * torch.randn(20, 2).double() @ torch.randn(2, 60).double()
    )
    one, scaled = rmsgd.evbmf(matrix), rmsgd.evbmf(matrix * scale)
    assert scaled.rank == one.rank == 2
    expected = one.noise_variance * scale * scale  # no double, but 0 or infinite, at the ends
    assert scaled.noise_variance == pytest.approx(expected, rel=1e-12, abs=0.0)
    torch.testing.assert_close(scaled.singular_values / scale, one.singular_values, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(30, 80), (80, 30), (50, 50)], ids=str)
def test_vectors_rebuild_the_low_rank_part(shape, dtype):
    m, n = shape
    low = torch.randn(m, 3) @ torch.randn(3, n)
    weight = (low + 0.1 * torch.randn(m, n)).to(dtype)
    result = rmsgd.evbmf(weight, vectors=True)
    assert result.rank == 3
    assert result.U.shape == (m, 3)
    assert result.Vh.shape == (3, n)
    rebuilt = result.U @ torch.diag(result.singular_values) @ result.Vh
    assert torch.linalg.matrix_norm(rebuilt - low) < 0.15 * torch.linalg.matrix_norm(low)
    assert result.noise_variance == pytest.approx(0.01, rel=0.25)
    plain = rmsgd.evbmf(weight)
    assert plain.U is None
    assert plain.Vh is None
    torch.testing.assert_close(plain.singular_values, result.singular_values, rtol=1e-10, atol=0)


def test_singular_values_are_shrunk_as_the_analytic_solution_says():
    weight = (
        torch.randn(12, 30, dtype=torch.float64)
        + 4 * torch.randn(12, 1).double() @ torch.randn(1, 30).double()
    )
    result = rmsgd.evbmf(weight)
    gamma = np.linalg.svd(weight.numpy(), compute_uv=False)[: result.rank]
    L, M, v = 12, 30, result.noise_variance
    b = 1 - (L + M) * v / gamma**2
    d = gamma / 2 * (b + np.sqrt(b**2 - 4 * L * M * v**2 / gamma**4))
    np.testing.assert_allclose(result.singular_values.numpy(), d, rtol=1e-12)


@pytest.mark.parametrize(
    ("weight", "rank", "variance"),
    [
        (torch.zeros(4, 7), 0, 0.0),
        (torch.tensor([[3.0, 4.0]]), 0, 12.5),  # one row: all of it is noise
        (torch.tensor([[2.0]]), 0, 4.0),
        (torch.ones(5, 8), 1, 0.0),  # rank 1, exactly: no noise at all
        (torch.eye(6), 0, 1 / 6),  # equal values: nothing stands out
    ],
    ids=["zero", "one row", "1 x 1", "rank 1", "orthogonal"],
)
def test_special_matrices(weight, rank, variance):
    result = rmsgd.evbmf(weight)
    assert result.rank == rank
    assert len(result.singular_values) == rank
    assert result.noise_variance == pytest.approx(variance, rel=1e-12, abs=1e-30)


def test_rows_and_columns_of_zeros_are_zero_singular_values_and_no_more():
    matrix = torch.zeros(30, 70, dtype=torch.float64)
    matrix[::2, ::3] = torch.randn(15, 24, dtype=torch.float64)
    gamma = reference.singular_values(matrix.numpy())
    result = rmsgd.evbmf(matrix)
    rank, variance, *_ = reference.measure_singular_values(gamma, 30, 70)
    assert (result.rank, result.noise_variance) == (rank, variance) == (15, 0.0)
    np.testing.assert_allclose(result.singular_values, gamma[:15], rtol=1e-12)


def test_strided_and_subnormal_matrices():
    base = torch.randn(40, 60)
    assert (
        rmsgd.evbmf(base[::2, ::3]).noise_variance == rmsgd.evbmf(base[::2, ::3].contiguous()).noise_variance
    )
    tiny = base * 2.0**-140  # subnormal in float32
    assert 0 < rmsgd.evbmf(tiny).noise_variance < 1e-80


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.zeros(0, 3), ValueError, r"at least one entry, got shape \(0, 3\)"),
        (torch.zeros(3), ValueError, r"got shape \(3,\)"),
        (torch.zeros(2, 2, 2), ValueError, "must be a matrix"),
        (torch.tensor([[1.0, math.nan]]), ValueError, "NaN or infinite"),
        (torch.tensor([[1.0, math.inf]]), ValueError, "NaN or infinite"),
        (torch.ones(2, 2, dtype=torch.int64), TypeError, "real floating-point tensor, got torch.int64"),
        (torch.ones(2, 2, dtype=torch.complex64), TypeError, "complex64"),
        (torch.ones(2, 2, device="meta"), ValueError, "meta device"),
        (torch.eye(2).to_sparse(), TypeError, "must be dense, got layout torch.sparse_coo"),
        (np.ones((2, 2)), TypeError, "must be a torch.Tensor, got ndarray"),
        (torch.nn.LazyLinear(3).weight, ValueError, "has no shape yet"),
        (torch.nested.nested_tensor([torch.ones(2, 2)]), TypeError, "got a nested tensor"),
    ],
)
def test_bad_input_is_named(weight, error, message):
    with pytest.raises(error, match=message):
        rmsgd.evbmf(weight)
