"""Weights with a strong mean or outliers: ranks are those of an SVD, and fp32 decides where it can.

A few eigenvalues far above the others are taken off the Gram matrix in double, before the rest is reduced in
fp32 (``csrc/spectrum/deflate_cpu.h``). Such weights meet the promise of all others.
"""

import numpy as np
import pytest
import torch
from test_spectrum import FP32_GRAM, FP64_GRAM, NATIVE, assert_within_promise, measure

from rmsgd import reference
from rmsgd.backends.base import RANK, STAGE
from rmsgd.backends.spectra import measure_spectra
from rmsgd.element_types import rounding
from rmsgd.layers import whole_matrix

SIZES = [(40, 90), (64, 64), (80, 500), (256, 256), (300, 700)]


def noise(rng, L, M):
    return rng.standard_normal((L, M))


def power_law(rng, L, M):
    """A spectrum with more large values than are taken off, none far from its neighbours."""
    left, right = (np.linalg.qr(rng.standard_normal((n, L)))[0] for n in (L, M))
    return left * (100.0 * np.arange(1, L + 1) ** -1.2) @ right.T


def equal_large(rng, L, M):
    """Twelve equal large values."""
    left, right = (np.linalg.qr(rng.standard_normal((n, 12)))[0] for n in (L, M))
    return noise(rng, L, M) + 60.0 * np.sqrt(M) * left @ right.T


def with_outliers(columns, strength):
    def weight(rng, L, M):
        w = noise(rng, L, M)
        w[:, rng.choice(M, columns, replace=False)] *= strength
        return w

    return weight


def outlier_rows(rng, L, M):
    w = noise(rng, L, M)
    w[rng.choice(L, 3, replace=False)] *= 100.0
    return w


def near_copies(rng, L, M):
    """Rows of four kinds, whose products round alike, and a little noise."""
    return 10.0 * rng.standard_normal((4, M))[rng.integers(0, 4, L)] + noise(rng, L, M)


def levels(rng, L, M):
    """Sixteen levels, as a quantised weight has, and a mean: products of few kinds."""
    return np.clip(np.round(noise(rng, L, M) * 2.0), -8, 7) * 0.1 + 1.5


def signs(rng, L, M):
    return 3.0 + 0.7 * np.sign(noise(rng, L, M))


def orthonormal(rng, rows, columns):
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


def low_rank(rng, L, M, gamma):
    return (orthonormal(rng, L, len(gamma)) * gamma) @ orthonormal(rng, M, len(gamma)).T


def of_a_language_model(rng, L, M, strong_rows=False):
    """Noise, a low-rank part of a power law, a mean, and six columns that are far stronger."""
    edge = np.sqrt(L) + np.sqrt(M)
    w = 2.0 + noise(rng, L, M) + low_rank(rng, L, M, 4.0 * edge * np.arange(1, min(64, L // 2) + 1) ** -0.7)
    strong = w.T if strong_rows else w
    strong[:, rng.choice(strong.shape[1], 6, replace=False)] *= 30.0
    return w


def with_strong_rows(rng, L, M):
    """The same in a layer with more outputs than inputs, whose inputs are rows of the unfolding."""
    return of_a_language_model(rng, L, M, strong_rows=True)


def with_many_strong_rows(rng, L, M):
    """More large values than are looked for at first, of much the same size."""
    w = 0.5 + noise(rng, L, M)
    w[rng.choice(L, min(20, L // 4), replace=False)] *= 30.0
    return w


def at_the_threshold(rng, L, M):
    """A cluster of values where EVBMF begins to keep them, and a mean."""
    limit = M * reference.threshold(L, M)[2] - L - M
    signal = np.sqrt((limit + np.sqrt(max(limit**2 - 4.0 * L * M, 0.0))) / 2.0)
    return 3.0 + noise(rng, L, M) + low_rank(rng, L, M, signal * (1.0 + 0.003 * rng.standard_normal(8)))


def graded(rng, L, M):
    return low_rank(rng, L, M, np.geomspace(1.0, 1e-3, L))


def rows_of_many_sizes(rng, L, M):
    return np.exp(1.5 * rng.standard_normal((L, 1))) * noise(rng, L, M)


def with_strong_neighbours(rng, L, M):
    """Strong columns in one block of a product."""
    return np.where(np.arange(M) < 20, 50.0, 1.0) * noise(rng, L, M)


HOSTILE = {
    "mean 1": lambda rng, L, M: 1.0 + noise(rng, L, M),
    "mean 5": lambda rng, L, M: 5.0 + noise(rng, L, M),
    "mean 30": lambda rng, L, M: 30.0 + noise(rng, L, M),
    "mean 300": lambda rng, L, M: 300.0 + noise(rng, L, M),
    "means of rows": lambda rng, L, M: 8.0 * rng.standard_normal((L, 1)) + noise(rng, L, M),
    "mean and low rank": lambda rng, L, M: (
        4.0 + noise(rng, L, M) + rng.standard_normal((L, 5)) @ rng.standard_normal((5, M))
    ),
    "6 columns, 20": with_outliers(6, 20.0),
    "6 columns, 300": with_outliers(6, 300.0),
    "20 columns, 100": with_outliers(20, 100.0),
    "rows": outlier_rows,
    "power law": power_law,
    "equal large values": equal_large,
    "near copies": near_copies,
    "16 levels": levels,
    "signs": signs,
    "language model": of_a_language_model,
    "strong rows": with_strong_rows,
    "many strong rows": with_many_strong_rows,
    "threshold": at_the_threshold,
    "graded": graded,
    "rows of many sizes": rows_of_many_sizes,
    "strong neighbours": with_strong_neighbours,
}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", HOSTILE)
def test_ranks_and_metrics_are_those_of_an_svd(name, size):
    for seed in range(2):
        weight = torch.from_numpy(0.02 * HOSTILE[name](np.random.default_rng(seed), *size)).float()
        assert_within_promise(measure(weight), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["mean 5", "6 columns, 20", "16 levels"])
def test_so_are_those_of_half_precision(name, dtype):
    weight = torch.from_numpy(HOSTILE[name](np.random.default_rng(3), 260, 400)).to(dtype)
    assert_within_promise(measure(weight), weight)


@pytest.mark.parametrize("size", [(80, 500), (256, 256), (300, 700), (520, 600)], ids=str)
@pytest.mark.parametrize(
    "name", ["mean 5", "means of rows", "mean and low rank", "6 columns, 20", "16 levels"]
)
def test_a_product_in_fp32_decides(name, size):
    weight = torch.from_numpy(HOSTILE[name](np.random.default_rng(1), *size)).float()
    assert measure(weight)[STAGE] == FP32_GRAM


@pytest.mark.parametrize("size", [(300, 1200), (520, 2000)], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "language model",
        "strong rows",
        "many strong rows",
        "threshold",
        "strong neighbours",
        "20 columns, 100",
    ],
)
def test_strong_rows_and_columns_cost_a_product_in_fp32_no_digits(name, size):
    weight = torch.from_numpy(HOSTILE[name](np.random.default_rng(1), *size)).float()
    assert measure(weight)[STAGE] == FP32_GRAM


def test_a_mean_beyond_the_errors_of_the_product_takes_one_in_fp64():
    weight = torch.from_numpy(HOSTILE["mean 300"](np.random.default_rng(1), 256, 300)).float()
    assert measure(weight)[STAGE] == FP64_GRAM


@pytest.mark.parametrize("name", HOSTILE)
def test_values_are_within_the_error_of_a_product_in_fp32(name):
    L, M = 280, 400
    weight = torch.from_numpy(HOSTILE[name](np.random.default_rng(2), L, M)).float()
    table, (found,) = measure_spectra([(weight, whole_matrix((L, M)))], "half")
    gamma = reference.singular_values(weight.double().numpy(), rounding(weight.dtype))
    gram = weight.double() @ weight.double().T
    u = 2.0**-24 if table[0, STAGE] == FP32_GRAM else 2.0**-53
    whole = (16.0 * u + 32.0 * 2.0**-53) * gamma[0] ** 2
    # product_error in csrc/spectrum/stage.h, and for the reduction 8 u of the largest value left.
    part = u * (10.0 * float(gram.trace() * gram.diagonal().max()) ** 0.5 + 8.0 * gamma[8] ** 2)
    error = np.abs(found.numpy() ** 2 - gamma**2)
    assert error[: L - L // 2].max() <= whole
    # Rounding errors of one sign, as with signs, move the largest value alone.
    assert error[8 : L - L // 2].max() <= min(whole, part + 32.0 * 2.0**-53 * gamma[0] ** 2)
    assert int(table[0, RANK]) == reference.measure_singular_values(gamma, L, M)[0]


@pytest.mark.parametrize("name", HOSTILE)
def test_values_are_within_the_error_of_what_is_left_of_a_product(name):
    L, M = 250, 1500
    weight = torch.from_numpy(HOSTILE[name](np.random.default_rng(4), L, M)).float()
    table, (found,) = measure_spectra([(weight, whole_matrix((L, M)))], "half")
    if table[0, STAGE] != FP32_GRAM:
        pytest.skip("a product in fp32 does not decide")
    matrix = weight.double().numpy()
    values, vectors = (x[..., ::-1] for x in np.linalg.eigh(matrix @ matrix.T))
    rest = np.cumsum(values[::-1])[::-1]
    large = int(np.argmin(values[:33] * (L - np.arange(33)) > 32.0 * rest[:33]))  # what is taken off
    bound = reference.product_error(matrix, vectors[:, :large]) + 8.0 * 2.0**-24 * values[large]
    error = np.abs(found.numpy() ** 2 - values)[large : L - L // 2]
    assert error.max() <= bound + 128.0 * 2.0**-53 * values[0]


@pytest.mark.parametrize("size", [(64, 90), (257, 300), (300, 700)], ids=str)
def test_a_search_ends_however_far_the_largest_value_is_above_the_others(size):
    rng = np.random.default_rng(5)
    for mean in np.geomspace(50.0, 5e4, 25):
        weight = torch.from_numpy(mean + noise(rng, *size)).float()
        assert measure(weight)[RANK] <= 1


def test_the_number_of_threads_changes_no_bit_of_a_weight_with_a_mean():
    weight = 3.0 + torch.randn(1030, 1100)
    before = torch.get_num_threads()
    try:
        tables = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            tables.append(NATIVE.measure([(weight, whole_matrix(weight.shape))]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(tables[0], tables[1])
