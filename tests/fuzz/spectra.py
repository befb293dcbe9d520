"""Random spectra and weights, above all hostile ones, are compared with ``rmsgd/reference.py``."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from rmsgd import _cpu, reference
from rmsgd.backends import backend_for, numba_
from rmsgd.backends.base import CONDITION_NUMBER, NOISE_VARIANCE, NUCLEAR, RANK, STABLE_RANK, STATUS
from rmsgd.element_types import rounding
from rmsgd.layers import as_matrix, unfoldings

Array = NDArray[np.float64]


class Case(NamedTuple):
    """The L singular values of an L x M matrix."""

    gamma: Array
    M: int


# -- spectra -------------------------------------------------------------------------------------


def gaussian(rng: np.random.Generator, L: int) -> Array:
    return np.abs(rng.standard_normal(L))


def power_law(rng: np.random.Generator, L: int) -> Array:
    return np.arange(1.0, L + 1) ** -rng.uniform(0.05, 3)


def exponential(rng: np.random.Generator, L: int) -> Array:
    return np.exp(-np.arange(L) * 10 ** rng.uniform(-3, 1))


def equal(rng: np.random.Generator, L: int) -> Array:
    return rng.choice(rng.uniform(0.1, 3.0, int(rng.integers(1, 5))), L)


def nearly_equal(rng: np.random.Generator, L: int) -> Array:
    return 1.0 + rng.integers(0, 4, L) * 2.0 ** -rng.integers(20, 53)


def any_size(rng: np.random.Generator, L: int) -> Array:
    return 10.0 ** rng.uniform(-300, 300, L)


def subnormal(rng: np.random.Generator, L: int) -> Array:
    return rng.integers(0, 50, L) * 5e-324


def around_the_threshold(rng: np.random.Generator, L: int) -> Array:
    """Noise, and values close to the threshold at which a value begins to count."""
    noise = 1.0 + 0.2 * rng.standard_normal(L)
    outliers = int(rng.integers(0, L + 1))
    noise[:outliers] = 1.6 + 1e-3 * rng.standard_normal(outliers)
    return np.abs(noise)


def few_large(rng: np.random.Generator, L: int) -> Array:
    gamma = 10 ** rng.uniform(-12, -1) * np.abs(rng.standard_normal(L))
    gamma[: int(rng.integers(1, 1 + max(1, L // 4)))] = rng.exponential(1)
    return gamma


def log_normal(rng: np.random.Generator, L: int) -> Array:
    return np.exp(rng.standard_normal(L) * rng.uniform(0.1, 5))


KINDS: tuple[Callable[[np.random.Generator, int], Array], ...] = (
    gaussian,
    power_law,
    exponential,
    equal,
    nearly_equal,
    any_size,
    subnormal,
    around_the_threshold,
    few_large,
    log_normal,
)


def draw(seed: int) -> Case:
    """The spectrum with this number: 0 to 300 values of one kind, then zeros, sometimes with a bad value."""
    rng = np.random.default_rng(seed)
    longest = (4, 16, 16, 64, 64, 300)[int(rng.integers(6))]
    L = int(rng.integers(0, longest + 1))
    gamma = np.sort(KINDS[int(rng.integers(len(KINDS)))](rng, L))[::-1].copy()
    if rng.random() < 0.3:
        gamma[L - int(rng.integers(0, L + 1)) :] = 0.0
    if rng.random() < 0.3:
        with np.errstate(over="ignore", under="ignore"):
            gamma = np.minimum(gamma * 10.0 ** rng.uniform(-300, 300), 1e300)
    if L and rng.random() < 0.02:
        gamma[int(rng.integers(L))] = rng.choice([math.nan, math.inf, -1.0, -math.inf])
    M = max(L, 1)
    if rng.random() < 0.8:
        M = int(M * 10 ** rng.uniform(0, rng.choice([0.3, 2, 5])))
    return Case(gamma, M)


class Oracle:
    """The reference compiled by numba, from the same source and some fifty times faster."""

    def __init__(self) -> None:
        self._measure = numba_._compile_reference()["measure_singular_values"]

    def __call__(self, gamma: Array, M: int) -> Any:
        return self._measure(gamma, len(gamma), M)


def scaled(gamma: Array, M: int) -> tuple[Array, int]:
    """``c`` of the values brought to a largest one in [1/2, 1), and the exponent that did it."""
    exponent = math.frexp(gamma[0])[1]
    return np.ldexp(gamma, -exponent) ** 2 / M, exponent


def energy(rank: int, variance: float, c: Array, M: int) -> float:
    """Omega; -inf where there is no noise at all."""
    if variance == 0.0:
        return -math.inf
    tails = np.concatenate([np.cumsum(c[::-1])[::-1], [0.0]])
    return reference.free_energy_of_rank(rank, 1.0 / variance, c, tails[rank], len(c), len(c) / M)


def check(case: Case, oracle: Oracle) -> None:
    """Raise AssertionError if the core and the reference do not agree."""
    gamma, M = case
    bad = len(gamma) == 0 or not (np.isfinite(gamma).all() and (gamma >= 0).all())
    if bad or (np.diff(gamma) > 0).any():
        try:
            _cpu.measure_spectrum(gamma, M)
        except ValueError:
            return
        raise AssertionError("bad values were accepted")
    row = _cpu.measure_spectrum(gamma, M)
    rank, variance, stable_rank, condition, nuclear = oracle(gamma, M)
    if row[RANK] != rank:
        # Two minima may be equally deep, and then both energies are equal.
        c, exponent = scaled(gamma, M)
        ours = energy(int(row[RANK]), math.ldexp(row[NOISE_VARIANCE], -2 * exponent), c, M)
        best = energy(rank, math.ldexp(variance, -2 * exponent), c, M)
        assert math.isclose(ours, best, rel_tol=1e-11, abs_tol=1e-11), (row.tolist(), rank, ours - best)
        return
    found = row[[NOISE_VARIANCE, STABLE_RANK, CONDITION_NUMBER, NUCLEAR]]
    expected = [variance, stable_rank, condition, nuclear]
    # A subnormal sigma^2 has fewer digits.
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11 if variance > 1e-290 else 1e-4)


# -- weights -------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def draw_weight(seed: int) -> torch.Tensor:
    """The weight with this number: two to five dimensions, any dtype and strides, some values not finite."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    most = (4, 12, 40)[int(rng.integers(3))]
    shape = [int(n) for n in rng.integers(1, most + 1, 2)]
    shape += [int(n) for n in rng.integers(1, 4, int(rng.integers(0, 4)))]
    kind = int(rng.integers(8))
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == 1:
        left = torch.randn(shape[0], 2, generator=generator, dtype=torch.float64)
        weight += 3 * (left @ torch.randn(2, weight[0].numel(), generator=generator).double()).view(shape)
    elif kind == 2:
        weight = weight[:1].expand(shape) * 1.0
    elif kind == 3:
        weight = torch.eye(shape[0], weight[0].numel()).double().view(shape)
    elif kind == 4:
        weight *= torch.from_numpy(10.0 ** rng.uniform(-9, 0, shape))
    elif kind == 5:
        weight = weight.clone()
        weight[rng.random(shape) < 0.7] = 0.0
    elif kind == 6:
        dead = torch.from_numpy(rng.random(shape[0]) < rng.random())
        weight = weight.clone()
        weight[dead] *= float(rng.choice([0.0, 10.0 ** rng.uniform(-40, -1)]))
    if rng.random() < 0.3:
        weight = weight * 10.0 ** rng.uniform(-60, 60)
    weight = weight.to(DTYPES[int(rng.integers(4))])
    if rng.random() < 0.05:
        weight.view(-1)[int(rng.integers(weight.numel()))] = float(
            rng.choice([math.nan, math.inf, -math.inf])
        )
    layout = int(rng.integers(4))
    if layout == 1:
        order = [int(d) for d in rng.permutation(len(shape))]
        weight = weight.permute(order).contiguous().permute([order.index(d) for d in range(len(shape))])
    elif layout == 2:
        weight = torch.stack([weight, weight], dim=-1)[..., 0]
    elif layout == 3:
        weight = weight.flip(0).contiguous().flip(0)
    return weight


def check_weight(weight: torch.Tensor) -> None:
    """Raise AssertionError if the compiled backend and a float64 SVD with the reference do not agree."""
    matrices = [(weight, u) for u in unfoldings(weight.shape)]
    table = backend_for(torch.device("cpu")).measure(matrices)
    for row, (_, u) in zip(table.numpy(), matrices, strict=True):
        matrix = as_matrix(weight, u).double().numpy()
        if not np.isfinite(matrix).all():
            assert row[STATUS] == 1
            assert np.isnan(row[:STATUS]).all()
            continue
        gamma = reference.singular_values(matrix, rounding(weight.dtype))
        rank, variance, stable_rank, condition, _ = reference.measure_singular_values(gamma, u.L, u.M)
        if row[RANK] != rank:
            c, exponent = scaled(gamma, u.M)
            ours = energy(int(row[RANK]), math.ldexp(row[NOISE_VARIANCE], -2 * exponent), c, u.M)
            best = energy(rank, math.ldexp(variance, -2 * exponent), c, u.M)
            assert math.isclose(ours, best, rel_tol=1e-9, abs_tol=1e-9), (row.tolist(), rank, ours - best)
            continue
        # The accuracy guard promises this. An SVD has only a digit or two of values just above numerical
        # zero.
        last_digit = u.M * (2.0**-52 * gamma[0]) ** 2
        np.testing.assert_allclose(row[NOISE_VARIANCE], variance, rtol=1e-3, atol=0.1 * last_digit)
        np.testing.assert_allclose(row[CONDITION_NUMBER], condition, atol=2e-5)
        np.testing.assert_allclose(row[STABLE_RANK], stable_rank, atol=2e-6)
