"""From weights to metrics on a CPU, the compiled core agrees with a float64 SVD."""

import json
import os
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from clock import PATIENCE

from rmsgd import backends, reference
from rmsgd.backends.base import (
    CONDITION_NUMBER,
    MEASURED,
    NOISE_VARIANCE,
    NOT_FINITE,
    NUCLEAR,
    RANK,
    STABLE_RANK,
    STAGE,
    STATUS,
    BackendUnavailable,
)
from rmsgd.backends.native import PARTS
from rmsgd.element_types import rounding
from rmsgd.layers import Unfolding, as_matrix, unfoldings

try:
    NATIVE = next(entry for entry in backends.ENTRIES if entry.name == "native").load()
except BackendUnavailable as reason:
    pytest.skip(f"no compiled core: {reason}", allow_module_level=True)

FP32_GRAM, FP64_GRAM, SVD = range(3)
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def whole(matrix):
    """The unfolding of a matrix that may have a single row."""
    rows, columns = matrix.shape
    small, large = ((0,), (1,)) if rows <= columns else ((1,), (0,))
    return Unfolding(small, large, min(rows, columns), max(rows, columns), ("matrix",), (rows,))


def measure(weight, unfolding=None):
    return NATIVE.measure([(weight, unfolding or whole(weight))])[0].tolist()


def oracle(weight, unfolding=None):
    """The metrics of the float64 singular values, and the condition number of the matrix."""
    unfolding = unfolding or whole(weight)
    matrix = as_matrix(weight, unfolding).double().numpy()
    gamma = reference.singular_values(matrix, rounding(weight.dtype))
    condition = gamma[0] / gamma[-1] if gamma[-1] > 0.0 else np.inf
    return reference.measure_singular_values(gamma, unfolding.L, unfolding.M), condition


def assert_within_promise(row, weight, unfolding=None):
    """Check against the oracle: the rank, stable rank within 1e-6, condition within 1e-5 (1e-4 above 1e3)."""
    (rank, variance, stable_rank, condition, nuclear), condition_number = oracle(weight, unfolding)
    assert row[STATUS] == MEASURED
    assert row[RANK] == rank
    assert row[STABLE_RANK] == pytest.approx(stable_rank, abs=1e-6)
    assert row[CONDITION_NUMBER] == pytest.approx(condition, abs=1e-5 if condition_number <= 1e3 else 1e-4)
    assert row[NOISE_VARIANCE] == pytest.approx(variance, rel=1e-3, abs=0.0)
    assert row[NUCLEAR] == pytest.approx(nuclear, rel=1e-3)


def generator(seed):
    return np.random.default_rng(seed)


def orthonormal(rng, rows, columns):
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


def with_singular_values(gamma, columns, seed=0):
    """A matrix (L, columns) of singular values ``gamma`` (L,) and random singular vectors, float64."""
    rng = generator(seed)
    rows = len(gamma)
    return torch.from_numpy(orthonormal(rng, rows, rows) * gamma @ orthonormal(rng, columns, rows).T)


def noise_and_low_rank(rows, columns, rank, strength=1.0, seed=0):
    rng = generator(seed)
    low = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, columns))
    return torch.from_numpy(rng.standard_normal((rows, columns)) + strength * low)


def integers(rows, columns, rank, seed=0):
    """An integer matrix of this rank, which every format here holds without rounding."""
    rng = generator(seed)
    return torch.from_numpy(
        (rng.integers(-2, 3, (rows, rank)) @ rng.integers(-2, 3, (rank, columns))).astype(float)
    )


HOSTILE = {
    "one value": lambda: torch.tensor([[2.0]]),
    "one row": lambda: torch.arange(1.0, 8.0).reshape(1, 7),
    "one column": lambda: torch.arange(1.0, 8.0).reshape(7, 1),
    "zero": lambda: torch.zeros(5, 9),
    "rank 1": lambda: integers(12, 30, 1),
    "rank 1, one row not zero": lambda: torch.eye(9, 14)[:1].expand(9, 14) * torch.eye(9)[:, :1],
    "equal entries": lambda: torch.full((33, 70), 0.3),
    "rank-deficient": lambda: integers(20, 33, 6),
    "just too full to be rank-deficient": lambda: integers(20, 30, 13),
    "orthogonal": lambda: torch.from_numpy(orthonormal(generator(1), 40, 40)),
    "orthogonal rows": lambda: torch.from_numpy(orthonormal(generator(2), 90, 17).T.copy()),
    "identity": lambda: torch.eye(6),
    "two groups of equal values": lambda: with_singular_values(np.repeat([3.0, 1.0], [4, 20]), 60),
    "signs": lambda: torch.sign(noise_and_low_rank(64, 200, 3)) * 0.7,
    "zeros and ones": lambda: (noise_and_low_rank(50, 60, 2) > 0).double(),
    "one huge row": lambda: noise_and_low_rank(24, 50, 2) * torch.tensor([1e4] + [1.0] * 23)[:, None],
    "one huge last row": lambda: noise_and_low_rank(24, 50, 2) * torch.tensor([1.0] * 23 + [1e4])[:, None],
    "rows of all sizes": lambda: noise_and_low_rank(30, 80, 2) * torch.logspace(-4, 0, 30)[:, None],
    "decoupled blocks": lambda: torch.block_diag(noise_and_low_rank(9, 12, 1), noise_and_low_rank(8, 11, 1)),
    "repeated rows": lambda: noise_and_low_rank(10, 70, 2).repeat_interleave(4, dim=0),
    "mostly zeros": lambda: noise_and_low_rank(40, 60, 1) * (noise_and_low_rank(40, 60, 1, seed=5) > 1.5),
    "large mean": lambda: 100 + noise_and_low_rank(30, 64, 2),
    "wide": lambda: noise_and_low_rank(3, 5000, 1),
    "tall": lambda: noise_and_low_rank(700, 9, 2),
    "sizes off every vector": lambda: noise_and_low_rank(61, 523, 7),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_matrix_is_measured_as_by_the_oracle(name, dtype):
    weight = HOSTILE[name]().to(dtype)
    assert_within_promise(measure(weight), weight)


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-10, 1e30, 2e37])
def test_the_scale_of_an_fp32_weight_does_not_matter(scale):
    weight = (noise_and_low_rank(20, 60, 2) * scale).float()
    assert bool(torch.isfinite(weight).all())
    assert_within_promise(measure(weight), weight)


@pytest.mark.parametrize("scale", [1e-310, 1e-200, 1e-30, 1e30, 1e200, 1e300])
def test_the_scale_of_an_fp64_weight_does_not_matter(scale):
    unscaled = noise_and_low_rank(20, 60, 2)
    row, expected = measure(unscaled * scale), measure(unscaled)
    assert row[RANK] == expected[RANK]
    # Subnormal numbers have lost most of their digits.
    tolerance = 1e-4 if scale < 1e-300 else 1e-9
    for field in (STABLE_RANK, CONDITION_NUMBER, NUCLEAR):
        assert row[field] == pytest.approx(expected[field], rel=tolerance)


def test_subnormal_halves_are_upcast_before_anything_else():
    weight = (integers(16, 40, 16) * 2.0**-24).half()  # the smallest fp16 numbers there are
    assert_within_promise(measure(weight), weight)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_no_number_is_reported_and_the_others_go_on(value, dtype):
    good = noise_and_low_rank(20, 40, 2).to(dtype)
    bad = good.clone()
    bad[13, 27] = value
    table = NATIVE.measure([(m, whole(m)) for m in (good, bad, good)])
    assert table[:, STATUS].tolist() == [MEASURED, NOT_FINITE, MEASURED]
    assert bool(torch.isnan(table[1, :STATUS]).all())
    assert torch.equal(table[0], table[2])


def test_a_weight_without_rows_has_no_spectrum():
    assert unfoldings((0, 3)) == ()
    assert NATIVE.measure([]).shape == (0, 7)


LAYOUTS = {
    "transposed": lambda m: m.T,
    "every second row, every third column": lambda m: m[::2, ::3],
    "reversed dimensions of a 4-D tensor": lambda m: m.reshape(6, 10, 9, 20).permute(3, 2, 1, 0),
    "a slice of columns": lambda m: m[:, 5:44],
    "one column, expanded": lambda m: m[:, :1].expand(60, 70),
    "channels last": lambda m: m.reshape(20, 60, 3, 3).contiguous(memory_format=torch.channels_last),
    "a window that overlaps itself": lambda m: m.flatten().as_strided((30, 40), (1, 3)),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_view_is_measured_where_it_lies(name, dtype):
    view = LAYOUTS[name](noise_and_low_rank(60, 180, 3).to(dtype))
    for unfolding in unfoldings(view.shape):
        assert_within_promise(measure(view, unfolding), view, unfolding)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (64, 3, 7, 7),
        (24, 16, 3, 3),
        (33, 17, 3, 3),
        (40, 24, 1, 1),
        (96, 1, 3, 3),
        (12, 8, 5),
        (8, 6, 3, 3, 3),
    ],
    ids=str,
)
def test_both_modes_of_a_convolution_are_the_oracles(shape, dtype):
    flat = noise_and_low_rank(shape[0], int(np.prod(shape[1:])), 2, 0.5)
    weight = (flat / 20).reshape(shape).to(dtype)
    for unfolding in unfoldings(shape):
        assert_within_promise(measure(weight, unfolding), weight, unfolding)


def test_the_modes_of_a_1_x_1_convolution_are_one_spectrum():
    (unfolding,) = unfoldings((40, 24, 1, 1))
    assert unfolding.modes == ("in", "out")


# ---- the accuracy guard ----


@pytest.mark.parametrize("decades", range(1, 9))
@pytest.mark.parametrize("size", [(12, 12), (24, 60), (64, 64), (100, 400)], ids=str)
def test_fp32_weights_keep_the_promise_up_to_a_condition_number_of_1e8(size, decades):
    L, M = size
    for seed, gamma in enumerate(
        [
            np.geomspace(1.0, 10.0**-decades, L),
            np.r_[np.geomspace(10.0**decades, 10.0, L // 4), np.linspace(1.2, 1.0, L - L // 4)],
            np.r_[1.0, np.full(L - 2, 0.1), 10.0**-decades],
        ]
    ):
        weight = with_singular_values(gamma, M, seed).float()
        assert_within_promise(measure(weight), weight)


@pytest.mark.parametrize(
    ("gamma", "stage"),
    [
        (np.r_[np.full(3, 2.0), np.linspace(1.0, 0.5, 37)], FP32_GRAM),
        (np.r_[3e4, np.full(3, 2.0), np.linspace(1.0, 0.5, 36)], FP64_GRAM),
        (np.r_[1e9, np.full(3, 2.0), np.linspace(1.0, 0.5, 36)], SVD),
    ],
    ids=["fp32 Gram", "fp64 Gram", "SVD"],
)
def test_each_stage_of_the_guard_is_reached_and_reported(gamma, stage):
    weight = with_singular_values(gamma, 90)
    row = measure(weight if stage == SVD else weight.float())
    assert row[STAGE] == stage
    assert_within_promise(row, weight if stage == SVD else weight.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-17])
def test_dead_rows_leave_no_noise_and_need_no_svd(size, dtype):
    weight = noise_and_low_rank(60, 400, 3)
    weight[::5] *= size
    weight = weight.to(dtype)
    row = measure(weight)
    assert row[STAGE] == (FP64_GRAM if dtype == torch.float64 else FP32_GRAM)
    assert (row[RANK], row[NOISE_VARIANCE]) == (48, 0.0)
    assert_within_promise(row, weight)


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e17])
@pytest.mark.parametrize(
    ("size", "dtype", "stage", "rank"),
    [
        (0.5, torch.float32, FP32_GRAM, 48),
        (1e-5, torch.float32, FP64_GRAM, 48),
        (1e-9, torch.float32, FP64_GRAM, 36),
        (1e-9, torch.float64, SVD, 48),
        (1e-12, torch.float64, SVD, 48),
        (0.5, torch.bfloat16, FP32_GRAM, 48),
        (1e-5, torch.bfloat16, FP32_GRAM, 36),
    ],
    ids=str,
)
def test_small_rows_beside_dead_ones_are_values_unless_the_dtypes_rounding_is_as_large(
    size, dtype, stage, rank, scale
):
    weight = noise_and_low_rank(60, 400, 3)
    weight[::5] = 0.0
    weight[1::5] *= size
    weight = (weight * scale).to(dtype)
    row = measure(weight)
    assert row[STAGE] == stage
    assert row[RANK] == rank
    assert_within_promise(row, weight)


def test_few_dead_rows_leave_the_noise_of_the_others():
    weight = noise_and_low_rank(60, 400, 3).float()
    weight[::10] = 0.0
    row = measure(weight)
    assert row[STAGE] == FP32_GRAM
    assert row[NOISE_VARIANCE] > 0.5
    assert_within_promise(row, weight)


def test_an_fp64_weight_never_sees_an_fp32_gram_matrix():
    assert measure(noise_and_low_rank(20, 40, 2))[STAGE] == FP64_GRAM


def test_initial_weights_of_a_layer_need_nothing_but_fp32():
    weight = torch.empty(128, 64, 3, 3)
    torch.nn.init.kaiming_uniform_(weight)
    assert {measure(weight, u)[STAGE] for u in unfoldings(weight.shape)} == {FP32_GRAM}


@pytest.fixture(scope="module")
def flip():
    """Singular values, and the value of a third at which the oracle's rank turns from 2 into 3."""
    L, M = 30, 75
    noise = np.linalg.svd(generator(3).standard_normal((L - 3, M)), compute_uv=False)

    def spectrum(third):
        return np.r_[60.0, 40.0, third, np.minimum(noise, third * 0.999)]

    below, above = noise[0], 39.0
    for _ in range(60):
        middle = 0.5 * (below + above)
        gamma = spectrum(middle)
        if reference.minimise_free_energy(gamma**2 / M, L, M)[0] > 2:
            above = middle
        else:
            below = middle
    return spectrum, above


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-5, 1e-6, 1e-7, 3e-8, 1e-10])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_rank_is_the_oracles_however_near_the_threshold(flip, sign, distance, dtype):
    spectrum, value = flip
    weight = with_singular_values(spectrum(value * (1 + sign * distance)), 75).to(dtype)
    gamma = reference.singular_values(weight.double().numpy())
    rng = generator(4)
    ranks = {
        reference.minimise_free_energy((gamma * (1 + 1e-13 * rng.standard_normal(30))) ** 2 / 75, 30, 75)[0]
        for _ in range(8)
    }
    if len(ranks) > 1:
        pytest.skip("here the oracle's own rank depends on its last digits")
    assert {measure(weight)[RANK]} == ranks
    if dtype == torch.float64:
        assert ranks == {2 if sign < 0 else 3}


# ---- threads, instruction sets, memory ----


def test_the_number_of_threads_changes_no_bit():
    shapes = [(1030, 1100), (64, 32, 3, 3), (300, 500), (40, 24, 1, 1), (9, 2000), (128, 128)]
    weights = [torch.randn(shape) for shape in shapes]
    weights += [noise_and_low_rank(50, 70, 4).float(), with_singular_values(np.geomspace(1, 1e-6, 40), 80)]
    matrices = [(w, u) for w in weights for u in unfoldings(w.shape)]
    before = torch.get_num_threads()
    try:
        tables = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            tables.append(NATIVE.measure(matrices))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(tables[0], tables[1])
    assert torch.equal(tables[0], tables[2])


def test_the_time_of_the_parts_adds_up_to_less_than_the_call_takes():
    weights = [torch.randn(60, 90) for _ in range(20)]
    start = time.perf_counter()
    seconds = NATIVE.seconds_by_part([(w, whole(w)) for w in weights])
    elapsed = time.perf_counter() - start
    assert len(seconds) == len(PARTS)
    assert (seconds > 0).all()
    assert seconds.sum() < elapsed * torch.get_num_threads()


def run(script, **environment):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


SETS = """
    import json, sys
    sys.path[:0] = ["tests"]
    import test_spectrum as t
    weights = [t.HOSTILE[name]().float() for name in t.HOSTILE]
    weights += [t.noise_and_low_rank(L, M, 3).float() for L, M in ((129, 300), (16, 900), (97, 97))]
    for weight in weights:
        for dtype in t.FLOATS:
            t.assert_within_promise(t.measure(weight.to(dtype)), weight.to(dtype))
    print(json.dumps([t.NATIVE.description, len(weights)]))
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_keeps_the_promise(isa, monkeypatch):
    from rmsgd import _cpu

    sets = ["baseline", "avx2", "avx512"]
    if isa != "baseline" and sets.index(isa) > sets.index(_cpu.isa()):
        pytest.skip(f"this CPU has no {isa}")
    description, measured = run(SETS, RMSGD_ISA=isa)
    assert isa in description
    assert measured == len(HOSTILE) + 3


MEMORY = """
    import json, resource, sys
    import torch
    sys.path[:0] = ["tests"]
    import test_spectrum as t
    torch.set_num_threads(2)
    small, large = torch.randn(64, 64), torch.randn(512, 700)
    t.NATIVE.measure([(small, t.whole(small))] * 8)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    gram = 512 * 512 * 8
    measured = []
    for room, count in ((gram, 4), (2 * 2 * gram + 2**20, 4), (2 * 2 * gram + 2**20, 60)):
        resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
        try:
            measured.append(len(t.NATIVE.measure([(large, t.whole(large))] * count)))
        except MemoryError:
            measured.append(None)
    print(json.dumps(measured))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
def test_memory_is_two_of_the_largest_gram_matrices_for_each_thread_and_no_more():
    too_little, few, many = run(MEMORY)
    assert too_little is None
    assert few == 4
    assert many == 60
