"""The code of teams of CUDA threads is right, gives the same bits in any order, and lacks no barrier."""

import ctypes
import os
import subprocess

import numpy as np
import pytest
import scipy.linalg
from clock import PATIENCE
from emulated import ORDERS, ROOT, compile_cpp

from rmsgd import reference
from rmsgd.backends import cuda_teams
from rmsgd.backends.base import CONDITION_NUMBER, NOISE_VARIANCE, RANK, STABLE_RANK

SIZES = (1, 32, 256)
SOURCES = ROOT / "tests" / "emulator"


@pytest.fixture(scope="session")
def fibers(tmp_path_factory):
    target = tmp_path_factory.mktemp("team") / "fibers.so"
    compile_cpp(SOURCES / "team_fibers.cpp", target, "-O2", "-fPIC", "-shared")
    return ctypes.CDLL(str(target))


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def reduce_and_measure(fibers, A, precision, members, order):
    """The Gram matrix of A (L, M) with trace 1, its tridiagonal form, its row, and if that is decided."""
    L, M = A.shape
    gram = np.ascontiguousarray(A @ A.T)
    gram /= np.trace(gram)
    tridiagonal, row = np.zeros((2, L)), np.zeros(7)
    decided = getattr(fibers, f"measure_{precision}")(
        pointer(gram),
        L,
        ctypes.c_double(M),
        members,
        ORDERS.index(order),
        pointer(tridiagonal),
        pointer(row),
    )
    return gram, tridiagonal, row, bool(decided)


def random_matrix(L, M, seed=0):
    return np.random.default_rng(seed).standard_normal((L, M))


def graded(L, M, condition):
    rng = np.random.default_rng(1)
    left, _ = np.linalg.qr(rng.standard_normal((L, L)))
    right, _ = np.linalg.qr(rng.standard_normal((M, L)))
    return left * np.geomspace(1, 1 / condition, L) @ right.T


MATRICES = {
    "2 x 2": lambda: random_matrix(2, 2),
    "3 x 9": lambda: random_matrix(3, 9),
    "odd": lambda: random_matrix(61, 67),
    "wide": lambda: random_matrix(40, 900),
    "graded": lambda: graded(48, 90, 1e3),
    "rank one": lambda: np.outer(np.arange(1.0, 31.0), np.ones(40)),
    "equal values": lambda: np.eye(20, 25),
    "diagonal": lambda: np.diag(np.arange(1.0, 18.0)),
    "decoupled": lambda: scipy.linalg.block_diag(random_matrix(9, 12), random_matrix(8, 11)),
}


@pytest.mark.parametrize("members", SIZES)
@pytest.mark.parametrize("precision", ["f32", "f64"])
@pytest.mark.parametrize("name", MATRICES)
def test_the_reduction_keeps_the_eigenvalues_and_no_order_changes_a_bit(fibers, name, precision, members):
    A = MATRICES[name]()
    gram, tridiagonal, row, decided = reduce_and_measure(fibers, A, precision, members, "forward")
    unit = 2.0**-24 if precision == "f32" else 2.0**-53
    expected = np.linalg.eigvalsh(gram)
    found = scipy.linalg.eigvalsh_tridiagonal(tridiagonal[0], tridiagonal[1, :-1])
    # The guard relies on an error of 8 u lambda_1, which includes rounding the matrix to the format.
    assert np.abs(found - expected).max() <= 8 * unit * expected.max() + 1e-15
    for order in ORDERS[1:]:
        again = reduce_and_measure(fibers, A, precision, members, order)
        assert np.array_equal(again[1], tridiagonal)
        assert np.array_equal(again[2], row)
        assert again[3] == decided


@pytest.mark.parametrize("blocks", [1, 3, 8, 32])
def test_the_planner_and_the_kernels_agree_about_the_rows_in_registers(fibers, blocks):
    kept = np.zeros(3, np.int32)
    for rows in (4 * blocks, 130, 131, 512, 1024, 2047, 8192):
        packs = cuda_teams.slab_packs(rows, blocks)
        fibers.kept_rows(rows, packs, cuda_teams.THREADS, pointer(kept))
        assert tuple(kept) == cuda_teams.kept_rows(rows, 4, blocks)
        first, each, depth = kept.tolist()
        assert first + each * depth == rows
        assert depth * packs <= cuda_teams.THREADS or each == 0


@pytest.mark.parametrize("members", SIZES)
@pytest.mark.parametrize("noise", [1.0, 0.2, 1e-2])
def test_a_decided_row_is_the_references(fibers, noise, members):
    rng = np.random.default_rng(3)
    L, M = 45, 80
    A = rng.standard_normal((L, 4)) @ rng.standard_normal((4, M)) + noise * rng.standard_normal((L, M))
    *_, row, decided = reduce_and_measure(fibers, A, "f64", members, "shuffled")
    assert decided
    A /= np.sqrt((A * A).sum())
    rank, variance, stable_rank, condition, _ = reference.measure_singular_values(
        reference.singular_values(A), L, M
    )
    assert row[RANK] == rank
    np.testing.assert_allclose(row[NOISE_VARIANCE], variance, rtol=1e-9)
    np.testing.assert_allclose(row[STABLE_RANK], stable_rank, atol=1e-11)
    np.testing.assert_allclose(row[CONDITION_NUMBER], condition, atol=1e-11)


@pytest.mark.parametrize("members", SIZES)
@pytest.mark.parametrize("name", MATRICES)
def test_singular_values_are_right_far_below_the_square_root_of_rounding(fibers, name, members):
    A = np.ascontiguousarray(MATRICES[name]())
    L, M = A.shape
    expected = scipy.linalg.svdvals(A)
    results = []
    for order in ORDERS:
        gamma = np.zeros(L)
        fibers.singular_values(pointer(A), L, M, members, ORDERS.index(order), pointer(gamma))
        results.append(gamma)
    np.testing.assert_allclose(results[0], expected, rtol=0, atol=L * 2.0**-52 * expected[0])
    assert all(np.array_equal(gamma, results[0]) for gamma in results)


@pytest.mark.parametrize("members", SIZES)
@pytest.mark.parametrize("order", ORDERS)
def test_evbmf_by_a_team_is_the_references(fibers, members, order):
    gamma = np.sort(np.random.default_rng(2).exponential(size=150))[::-1].copy()
    row = np.zeros(7)
    fibers.evbmf(pointer(gamma), 150, ctypes.c_double(400), members, ORDERS.index(order), pointer(row))
    np.testing.assert_allclose(row[:5], reference.measure_singular_values(gamma, 150, 400), rtol=1e-10)


@pytest.fixture(scope="session")
def threads(tmp_path_factory):
    target = tmp_path_factory.mktemp("team") / "threads"
    try:
        compile_cpp(SOURCES / "team_threads.cpp", target, "-O1", "-g", "-fsanitize=thread", "-pthread")
    except subprocess.CalledProcessError:
        pytest.skip("this compiler has no ThreadSanitizer")
    return target


def races(program, members, skip=-1, skip_sum=-1):
    """Whether ThreadSanitizer reports a data race, and what it said."""
    environment = {**os.environ, "TSAN_OPTIONS": "exitcode=66"}
    command = [program, *map(str, (members, skip, skip_sum))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer cannot run under this kernel's address randomisation")
    assert done.returncode in (0, 66), done.stderr
    return done.returncode == 66, done.stderr


def test_no_barrier_is_missing(threads):
    found, said = races(threads, 5)
    assert not found, said


@pytest.mark.parametrize("fault", [{"skip": 0}, {"skip": 1}, {"skip": 20}, {"skip_sum": 3}], ids=str)
def test_a_missing_barrier_of_a_block_or_of_blocks_is_found(threads, fault):
    found, said = races(threads, 5, **fault)
    assert found
    assert "data race" in said


def test_the_barriers_of_a_gram_block_suffice_and_none_is_there_in_vain(threads):
    found, said = races(threads, 0)
    assert not found, said
    for barrier in (1, 5):
        assert races(threads, 0, skip=barrier)[0]
