"""The CUDA backend agrees with the reference, whatever the order in which its threads run."""

import ctypes
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from emulated import ORDERS, EmulatedKernels, OneStream, compile_cpp, emulated_backend
from matrices import low_rank
from torch.nn import Parameter

import rmsgd
from rmsgd import reference
from rmsgd.backends import cuda, cuda_spectra, cuda_step, cuda_teams
from rmsgd.backends.base import (
    CHANGED,
    CONDITION_NUMBER,
    FIELDS,
    MEASURED,
    NOISE_VARIANCE,
    NOT_FINITE,
    NUCLEAR,
    RANK,
    STABLE_RANK,
    STAGE,
    STATUS,
    RateGroup,
    RateTables,
    StepGroup,
    StepTables,
)
from rmsgd.backends.cuda import _RATES_ARGUMENTS, _VALUES_ARGUMENTS
from rmsgd.backends.cuda_spectra import _ARGUMENTS
from rmsgd.backends.cuda_step import _SIZES, _arguments
from rmsgd.backends.cuda_teams import Team, Teams, Wave
from rmsgd.backends.kernels import TEAM_SHARED
from rmsgd.backends.numpy_ import NumpyBackend
from rmsgd.element_types import rounding
from rmsgd.layers import as_matrix, unfoldings
from rmsgd.optim import device_rates, device_step
from rmsgd.rules import RULES, update_rates


@pytest.fixture
def backend(library):
    return emulated_backend(library)


ORACLE = NumpyBackend("", "", reference.measure_singular_values, reference.momentum_update)


# -- spectra ---------------------------------------------------------------------------------------


def spectra(*weights):
    return [(w, u) for w in weights for u in unfoldings(w.shape)]


def assert_measured(table, matrices):
    expected = ORACLE.measure(matrices)
    assert table[:, STATUS].tolist() == expected[:, STATUS].tolist()
    good = expected[:, STATUS] == MEASURED
    ours, theirs = table[good].numpy(), expected[good].numpy()
    assert ours[:, RANK].tolist() == theirs[:, RANK].tolist()
    np.testing.assert_allclose(ours[:, NOISE_VARIANCE], theirs[:, NOISE_VARIANCE], rtol=1e-4)
    np.testing.assert_allclose(ours[:, STABLE_RANK], theirs[:, STABLE_RANK], atol=1e-6)
    np.testing.assert_allclose(ours[:, CONDITION_NUMBER], theirs[:, CONDITION_NUMBER], atol=1e-5)
    np.testing.assert_allclose(ours[:, NUCLEAR], theirs[:, NUCLEAR], rtol=1e-4)


WEIGHTS = pytest.mark.parametrize(
    "weight",
    [
        pytest.param(lambda: torch.randn(2, 3), id="tiny"),
        pytest.param(lambda: torch.randn(24, 8, 3, 3), id="convolution"),
        pytest.param(lambda: torch.randn(6, 5, 1, 1), id="1x1"),
        pytest.param(
            lambda: torch.randn(8, 6, 3, 3).to(memory_format=torch.channels_last), id="channels last"
        ),
        pytest.param(lambda: torch.randn(3, 4, 2, 3, 2), id="3-D convolution"),
        pytest.param(lambda: torch.randn(90, 20).t(), id="transposed"),
        pytest.param(lambda: torch.randn(130, 129), id="three tiles a side"),
        pytest.param(lambda: torch.randn(66, 4200), id="split columns"),
        pytest.param(lambda: torch.randn(40, 60)[::2, ::3], id="with gaps"),
        pytest.param(lambda: low_rank(40, 100, 5, 0.1), id="low rank and noise"),
        pytest.param(lambda: low_rank(40, 100, 5, 1e-3).half(), id="float16"),
        pytest.param(lambda: low_rank(40, 100, 5, 1e-2).bfloat16(), id="bfloat16"),
        pytest.param(lambda: low_rank(40, 100, 5, 1e-2).double(), id="float64"),
        pytest.param(lambda: torch.zeros(5, 7), id="zero"),
        pytest.param(lambda: torch.eye(9, 12), id="equal values"),
        pytest.param(lambda: torch.full((4, 9), torch.nan), id="NaN"),
        pytest.param(lambda: torch.randn(4, 9).index_fill_(1, torch.tensor(3), torch.inf), id="infinity"),
        pytest.param(lambda: torch.randn(30, 40) * 1e25, id="squares beyond float32"),
        pytest.param(lambda: torch.randn(30, 40) * 1e-25, id="squares below float32"),
        pytest.param(lambda: torch.randn(10, 20).double() * 1e150, id="huge in float64"),
        pytest.param(lambda: torch.randn(10, 20).double() * 1e-170, id="squares below float64"),
        pytest.param(lambda: torch.randn(10, 20).double() * 1e-310, id="subnormal in float64"),
    ],
)


@WEIGHTS
def test_every_metric_is_the_references(backend, weight):
    matrices = spectra(weight())
    assert_measured(backend.measure(matrices), matrices)


@WEIGHTS
@pytest.mark.filterwarnings("ignore:a weight of shape")
def test_what_is_true_of_small_matrices_is_true_of_those_that_torch_measures(backend, monkeypatch, weight):
    monkeypatch.setattr(cuda, "LARGEST", 1)
    matrices = spectra(weight(), low_rank(20, 30, 3, 0.0))
    assert_measured(backend.measure(matrices), matrices)
    assert set(backend._kernels.launched) == {"rmsgd_values"}


def test_singular_values_are_the_references_and_those_of_low_rank_are_zero(backend):
    left, right = torch.randint(-3, 4, (12, 2)).double(), torch.randint(-3, 4, (2, 30)).double()
    broken = torch.full((4, 6), math.nan)
    matrices = spectra(torch.randn(20, 30), 3.0 + torch.randn(9, 14).double(), left @ right, broken)
    table, found = backend.spectra(matrices, "all")
    assert table[:, STATUS].tolist() == [MEASURED] * 3 + [NOT_FINITE]
    for (weight, _), gamma in zip(matrices[:3], found, strict=False):
        expected = reference.singular_values(weight.double().numpy(), rounding(weight.dtype))
        np.testing.assert_allclose(gamma**2, expected**2, rtol=0, atol=64 * 2.0**-53 * expected[0] ** 2)
    assert (found[2][2:] == 0.0).all()


def test_only_what_has_more_rows_than_the_largest_goes_to_torch(backend, monkeypatch):
    monkeypatch.setattr(cuda, "LARGEST", 20)
    cuda._warn_of_large.cache_clear()
    matrices = spectra(torch.randn(21, 30), torch.randn(20, 30), torch.randn(30, 19), torch.randn(21, 30))
    with pytest.warns(UserWarning, match=r"shape \(21, 30\) is measured by torch") as warned:
        tables = [backend.measure(matrices) for _ in range(2)]
    assert len(warned) == 1
    assert_measured(tables[1], matrices)
    assert backend._kernels.launched.count("rmsgd_values") == 4


def test_a_weight_whose_strides_change_in_its_place_is_measured_anew(backend):
    weight = low_rank(4, 54, 2, 0.1).reshape(4, 6, 3, 3).transpose(0, 1).contiguous()
    channels_last = torch.empty_like(weight, memory_format=torch.channels_last).stride()
    for seen in (weight, weight.as_strided(weight.shape, channels_last)):
        matrices = spectra(seen)
        assert_measured(backend.measure(matrices), matrices)


@pytest.mark.parametrize(
    ("noise", "dtype", "stage"),
    [
        (0.5, torch.float32, 0),
        (1e-3, torch.float32, 1),
        (1e-7, torch.float64, 2),
        (0.0, torch.float32, 1),
        (0.0, torch.bfloat16, 0),
    ],
    ids=["fp32", "fp64", "SVD", "product", "product in bfloat16"],
)
def test_what_a_gram_matrix_cannot_decide_goes_to_the_next_stage(backend, noise, dtype, stage):
    matrices = spectra(low_rank(40, 60, 7, noise).to(dtype))
    table = backend.measure(matrices)
    assert_measured(table, matrices)
    assert table[0, STAGE] == stage


@pytest.mark.parametrize(
    ("size", "dtype", "stage"),
    [
        (0.0, torch.float32, 0),
        (1e-18, torch.float32, 0),
        (1e-9, torch.float32, 1),
        (1e-9, torch.float64, 2),
    ],
)
def test_dead_rows_need_no_svd_and_small_ones_are_zeros_where_rounding_is_as_large(
    backend, size, dtype, stage
):
    weight = low_rank(20, 80, 3, 0.5).to(dtype)
    weight[::3] *= size
    matrices = spectra(weight)
    table = backend.measure(matrices)
    assert_measured(table, matrices)
    assert table[0, STAGE] == stage


def test_matrices_of_all_sizes_and_types_share_the_launches(backend):
    weights = [torch.randn(n, n + 7).to(t) for n in (2, 63, 64, 65) for t in (torch.float32, torch.float64)]
    matrices = spectra(*weights)
    table = backend.measure(matrices)
    assert_measured(table, matrices)
    assert backend._kernels.launched.count("rmsgd_gram") == 1
    assert backend._kernels.launched.count("rmsgd_measure") == 1


@pytest.fixture
def free_barriers(monkeypatch):
    """Teams as large as they can be, for small matrices too."""
    monkeypatch.setattr(cuda_teams, "ROW", 0)
    monkeypatch.setattr(cuda_teams, "GRID_BARRIER", 0)


def test_several_blocks_reduce_one_matrix_in_waves_that_fit_the_device(library, monkeypatch, free_barriers):
    capacity = {"rmsgd_tridiagonal": 3, "rmsgd_tridiagonal_double": 2}
    launched = {name: [] for name in capacity}
    plain = EmulatedKernels.launch

    def launch(kernels, name, device, blocks, *arguments):
        launched.get(name, []).append(blocks)
        plain(kernels, name, device, blocks, *arguments)

    monkeypatch.setattr(EmulatedKernels, "resident_blocks", lambda _, name, *__: capacity.get(name, 3))
    monkeypatch.setattr(EmulatedKernels, "launch", launch)
    weights = [low_rank(L, 2 * L, 4, 0.2) for L in (130, 70, 70, 20)]
    matrices = spectra(*weights, weights[0].double(), weights[3].double())
    assert_measured(emulated_backend(library).measure(matrices), matrices)
    for name, blocks in launched.items():
        assert len(blocks) > 1
        assert max(blocks) == capacity[name]


@pytest.mark.parametrize("order", ORDERS[1:])
def test_the_order_of_threads_changes_no_bit(library, free_barriers, order):
    matrices = spectra(
        low_rank(70, 100, 5, 0.2),
        low_rank(33, 50, 5, 1e-3),
        low_rank(20, 30, 3, 1e-7),
        torch.randn(12, 6, 3, 3).half(),
    )
    forward = emulated_backend(library, resident=3).measure(matrices)
    assert torch.equal(emulated_backend(library, order, resident=3).measure(matrices), forward)


@pytest.fixture
def one_warp(monkeypatch):
    """Blocks of one warp, so that many of them are few threads."""
    monkeypatch.setattr(cuda_teams, "THREADS", 32)
    monkeypatch.setattr(cuda_spectra, "_TRIDIAGONAL_THREADS", 32)


def teams_of(blocks, near_rows, near_slab):
    """Instead of ``choose_teams``: every matrix has such a team and a wave of its own."""

    def choose(rows, itemsize, capacity, device):
        teams = [Team(min(blocks, -(-n // 4)), near_rows, near_slab) for n in rows]
        firsts = np.cumsum([0, *(team.blocks for team in teams)])[:-1]
        shared = [cuda_teams.shared_bytes(n, itemsize, team) for n, team in zip(rows, teams, strict=True)]
        waves = [
            Wave(int(first), team.blocks, size, 0.0, "")
            for first, team, size in zip(firsts, teams, shared, strict=True)
        ]
        return Teams(teams, waves)

    return choose


@pytest.mark.parametrize("blocks", [1, 2, 5, 32])
def test_what_is_in_shared_memory_changes_no_bit(library, monkeypatch, one_warp, blocks):
    matrices = spectra(
        low_rank(70, 90, 5, 0.2), low_rank(66, 80, 5, 1e-3), torch.randn(2, 3), torch.randn(29, 30)
    )
    tables = []
    for order, near_rows, near_slab in (
        ("forward", False, False),
        ("shuffled", True, False),
        ("reverse", True, True),
    ):
        monkeypatch.setattr(cuda_spectra, "choose_teams", teams_of(blocks, near_rows, near_slab))
        tables.append(emulated_backend(library, order, resident=32).measure(matrices))
    assert_measured(tables[0], matrices)
    assert torch.equal(tables[0], tables[1])
    assert torch.equal(tables[0], tables[2])


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 31, 97, 200, 300])
def test_matrices_of_any_size_are_reduced_by_any_team(library, monkeypatch, one_warp, rows):
    matrices = spectra(low_rank(rows, rows + 40, min(rows // 2, 5), 0.3))
    for blocks in (1, 3, 32):
        monkeypatch.setattr(cuda_spectra, "choose_teams", teams_of(blocks, True, rows < 80))
        assert_measured(emulated_backend(library, resident=32).measure(matrices), matrices)


def test_in_fp64_matrices_use_the_workspace_of_fp32_in_rounds(backend):
    sizes = (64, 60, 40, 36, 30, 30, 9)
    matrices = spectra(*(low_rank(n, n + 20, 4, 1e-3) for n in sizes))
    assert_measured(backend.measure(matrices), matrices)
    launched = backend._kernels.launched
    assert launched.count("rmsgd_gram") == 1
    assert 2 <= launched.count("rmsgd_gram_double") <= 3
    (plan,) = next(iter(backend._plans.values()))
    assert plan.workspace_bytes < 1.5 * sum(cuda_spectra.workspace_bytes(u) for _, u in matrices)


def test_a_network_of_equal_matrices_has_a_workspace_of_fp32(library):
    matrices = spectra(*(torch.empty(768, 768, device="meta") for _ in range(50)))
    plan = cuda_spectra.SpectraPlan(EmulatedKernels(library), matrices)
    assert plan.workspace_bytes < 1.1 * 50 * 768 * 768 * 4
    assert len(plan.rounds) <= 4


@pytest.mark.parametrize(
    ("shape", "parts"), [((512, 4608), 4), ((64, 100_000), 80), ((512, 1000), 1), ((2048, 9000), 1)], ids=str
)
def test_a_matrix_of_few_tiles_is_split_along_its_columns(library, shape, parts):
    plan = cuda_spectra.SpectraPlan(EmulatedKernels(library), spectra(torch.empty(shape, device="meta")))
    tiles = -(-shape[0] // 64)
    blocks = plan.gram_blocks()
    assert {block.columns for block in blocks} == {-(-shape[1] // parts)}
    assert sum(block.tiles for block in blocks) == parts * tiles * (tiles + 1) // 2
    assert sum(block.takes_fingerprint for block in blocks) == parts * tiles


@pytest.mark.parametrize("rows", [2, 64, 65, 128, 129, 300, 1000])
def test_every_tile_of_a_gram_matrix_is_computed_once_and_every_row_is_in_one_fingerprint(rows):
    blocks = cuda_spectra._gram_blocks(rows).tolist()
    computed = [(row + lower, column) for row, column in blocks for lower in range(1 + (column > row))]
    assert sorted(computed) == sorted(map(tuple, cuda_spectra._tiles(rows).tolist()))
    taken = sorted(column for row, column in blocks if row // 2 == column // 2)
    assert taken == list(range(-(-rows // 64)))


GRAM_SHAPES = {
    "one tile": lambda: torch.randn(5, 40),
    "two a side": lambda: torch.randn(100, 300),
    "three a side": lambda: torch.randn(130, 141),
    "four a side, rows contiguous": lambda: torch.randn(270, 250).t(),
    "parts": lambda: torch.randn(70, 2100),
    "convolution": lambda: torch.randn(72, 30, 3, 3),
    "float16": lambda: torch.randn(66, 90).half(),
    "bfloat16, rows contiguous": lambda: torch.randn(90, 66).bfloat16().t(),
    "float64": lambda: torch.randn(130, 140).double(),
    "gaps": lambda: torch.randn(150, 600)[::2, ::3],
}


@pytest.mark.parametrize("shape", GRAM_SHAPES)
def test_gram_matrices_are_those_of_float64_to_the_rounding_of_their_precision(library, monkeypatch, shape):
    """Sums of 256 columns are formed in one go, in the precision of the matrix."""
    matrices = spectra(GRAM_SHAPES[shape]())
    found, plain = [], EmulatedKernels.launch

    def launch(kernels, name, device, blocks, threads, shared, stream, arguments, cooperative=False):
        if name.startswith("rmsgd_tridiagonal") and len(found) < len(matrices):
            found.extend(grams(arguments[0], len(matrices), name.endswith("double")))
        plain(kernels, name, device, blocks, threads, shared, stream, arguments, cooperative)

    monkeypatch.setattr(cuda_spectra, "choose_teams", teams_of(1, True, False))
    monkeypatch.setattr(EmulatedKernels, "launch", launch)
    emulated_backend(library).measure(matrices)
    order = sorted(range(len(matrices)), key=lambda i: -matrices[i][1].L)
    for i, gram in zip(order, found, strict=True):
        A = as_matrix(*matrices[i]).double().numpy()
        size = np.abs(A) @ np.abs(A).T
        unit = 2.0**-53 if gram.dtype == np.float64 else 2.0**-24
        n = len(A)
        assert (np.abs(gram[:, :n] - A @ A.T) <= 24 * unit * size).all()
        assert (gram[:, n:] == 0.0).all()


def grams(head, count, double):
    """The Gram matrices in the workspace, each of a team of one block: (rows, padded columns)."""
    table = np.frombuffer(
        ctypes.string_at(int(head["matrix"]), count * cuda_spectra._MATRIX.itemsize), cuda_spectra._MATRIX
    )
    state = np.frombuffer(
        ctypes.string_at(int(head["state"]), count * cuda_spectra._STATE.itemsize), cuda_spectra._STATE
    )
    dtype = np.dtype(np.float64 if double else np.float32)
    for row, waits in zip(table, state["stage"] == double, strict=True):
        if waits:
            L, stride = int(row["L"]), int(row["stride"])
            place = int(head["workspace"]) + int(row["reduction"][int(double)]["matrix"])
            yield np.frombuffer(ctypes.string_at(place, L * stride * dtype.itemsize), dtype).reshape(
                L, stride
            )


def deficient(rows, columns, dtype):
    return torch.randn(3, columns).repeat(rows // 3, 1).to(dtype)


def needs_singular_values(weight, unfolding):
    """Whether neither Gram matrix decides."""
    matrix = as_matrix(weight, unfolding)
    beyond_range = weight.dtype == torch.float64 and not 1e-150 < float(matrix.abs().max()) < 1e150
    deficient = weight.dtype == torch.float64 and torch.linalg.matrix_rank(matrix.nan_to_num()) < unfolding.L
    return bool(beyond_range or deficient or weight.shape == (12, 17))


def waiting_for_singular_values():
    """Matrices of every layout whose Gram matrices decide nothing, with others among them.

    In float32 that takes noise just above the rounding. In smaller types a Gram matrix can tell the rounding.
    """
    return spectra(
        low_rank(12, 17, 1, 2e-6),
        torch.randn(9, 14),
        deficient(6, 10, torch.float64),
        torch.full((4, 9), torch.nan).double(),
        deficient(6, 20, torch.float64).t(),
        torch.zeros(5, 7).double(),
        deficient(6, 12, torch.float64).reshape(6, 3, 2, 2),
        deficient(6, 12, torch.bfloat16),
        torch.outer(torch.rand(2), torch.rand(3)).double() * 1e-200,
    )


@pytest.fixture
def svd_launches(library, monkeypatch):
    """What each launch of the kernel for singular values was given, and memory before and after it."""
    launches = []
    plain = EmulatedKernels.launch

    def launch(kernels, name, device, blocks, threads, shared, stream, arguments, cooperative=False):
        def memory():
            head = arguments[0]
            table = ctypes.string_at(int(head["table"]), int(head["matrices"]) * FIELDS * 8)
            barriers = (2 * int(head["matrices"]) + 1) * cuda_spectra._GRID_BARRIER_BYTES
            return table, ctypes.string_at(int(head["grid_barrier"]), barriers)

        if name != "rmsgd_svd":
            return plain(kernels, name, device, blocks, threads, shared, stream, arguments, cooperative)
        before = memory()
        plain(kernels, name, device, blocks, threads, shared, stream, arguments, cooperative)
        launches.append((blocks, cooperative, before, memory()))

    monkeypatch.setattr(EmulatedKernels, "launch", launch)
    return launches


def test_several_blocks_find_the_singular_values_of_whatever_waits_for_them(library, svd_launches):
    matrices = waiting_for_singular_values()
    tables = [emulated_backend(library, order, resident=3).measure(matrices) for order in ORDERS]
    assert_measured(tables[0], matrices)
    by_svd = [needs_singular_values(w, u) for w, u in matrices]
    assert (tables[0][:, STAGE] == 2).tolist() == by_svd
    for table in tables[1:]:
        assert torch.equal(table.nan_to_num(nan=-1.0), tables[0].nan_to_num(nan=-1.0))
    assert [launch[:2] for launch in svd_launches] == [(3, True)] * 3


def test_where_nothing_waits_for_singular_values_blocks_neither_write_nor_meet(library, svd_launches):
    emulated_backend(library, resident=3).measure(spectra(torch.randn(20, 30), torch.randn(9, 12).double()))
    ((_, _, before, after),) = svd_launches
    assert before == after


def test_no_more_blocks_find_singular_values_than_a_grid_barrier_has_room_for(library, svd_launches):
    table = emulated_backend(library, resident=500).measure(spectra(torch.eye(2, 3)))
    assert table[0, STATUS] == MEASURED
    assert svd_launches[0][0] == 32


LOOKED_AT_AGAIN = {
    # 72 rows in two runs, which no tile of 64 rows ends with.
    "convolution": lambda: torch.randn(2, 30, 6, 6).repeat(1, 3, 1, 1),
    "float16": lambda: torch.randn(2, 30, 6, 6).repeat(1, 3, 1, 1).half(),
    "three tiles a side": lambda: low_rank(130, 131, 4, 1e-3),
    "rows contiguous, parts, float64": lambda: low_rank(66, 2100, 4, 1e-3).double().t().contiguous().t(),
}
"""Matrices that take a Gram matrix in fp64, or an SVD."""


@pytest.mark.parametrize("name", LOOKED_AT_AGAIN)
def test_a_row_says_so_whichever_element_changed_before_it_was_read_again(library, monkeypatch, name):
    weight = LOOKED_AT_AGAIN[name]()
    matrices = [(weight, unfoldings(weight.shape)[0])]
    plain = EmulatedKernels.launch

    def status_after(change):
        def launch(kernels, name, *arguments):
            if name == "rmsgd_gram_double":
                change()
            plain(kernels, name, *arguments)

        monkeypatch.setattr(EmulatedKernels, "launch", launch)
        return emulated_backend(library).measure(matrices)[0, STATUS]

    assert status_after(lambda: None) == MEASURED
    for element in (0, weight.numel() - 1):
        place = np.unravel_index(element, weight.shape)
        assert status_after(weight[place].neg_) == CHANGED


def test_a_small_workspace_means_more_batches_and_the_same_bits(backend, library):
    matrices = spectra(*(torch.randn(n, 2 * n) for n in (10, 20, 30, 40)))
    at_once = backend.measure(matrices)
    frugal = emulated_backend(library)
    frugal._budget = 12_000
    assert torch.equal(frugal.measure(matrices), at_once)
    assert frugal._kernels.launched.count("rmsgd_gram") > 1


def test_running_out_of_memory_halves_the_workspace(library, monkeypatch):
    backend = emulated_backend(library)
    matrices = spectra(*(torch.randn(n, 2 * n) for n in (10, 20, 30, 40)))
    at_once = backend.measure(matrices)
    real = torch.empty

    def short_of_memory(*size, **options):
        if options.get("dtype") == torch.uint8 and size[0] > 45_000:
            raise torch.cuda.OutOfMemoryError
        return real(*size, **options)

    monkeypatch.setattr(torch, "empty", short_of_memory)
    assert torch.equal(backend.measure(matrices), at_once)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError()))
    with pytest.raises(torch.cuda.OutOfMemoryError, match=r"shape \(40, 80\) takes .* no room: free some"):
        backend._measure_small(matrices, backend._streams(torch.device("cpu")), at_once, range(4))


def test_a_matrix_that_torch_has_no_room_for_is_named(backend, monkeypatch):
    def no_room(*_):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(cuda, "LARGEST", 20)
    monkeypatch.setattr(torch.linalg, "eigvalsh", no_room)
    with pytest.raises(torch.cuda.OutOfMemoryError, match=r"shape \(21, 30\) takes .* no room: free some"):
        backend.measure(spectra(torch.randn(20, 30), torch.randn(21, 30)))


@pytest.mark.parametrize("shared", [48 * 1024, 64 * 1024])
def test_a_card_with_less_shared_memory_keeps_less_on_chip_and_measures_the_same(library, shared):
    # Registers do not hold all of the larger one: 45 rows of a block's columns remain.
    matrices = spectra(low_rank(216, 226, 4, 0.2), low_rank(90, 99, 4, 1e-3))
    backend = emulated_backend(library, shared=shared, lent=shared)
    table = backend.measure(matrices)
    assert_measured(table, matrices)
    (plan,) = next(iter(backend._plans.values()))
    waves = [wave for round_ in plan.rounds for wave in round_.waves]
    taken = max(wave.shared for wave in waves)
    assert taken <= shared
    assert (taken > 48 * 1024) == (shared == 64 * 1024)


def allocations_fail_from(monkeypatch, number):
    """Let the allocations of an epoch end fail from this one on; returns how many there were."""
    seen = [0]

    def counted(function):
        def allocate(*arguments, **options):
            seen[0] += 1
            if seen[0] > number:
                raise torch.cuda.OutOfMemoryError("no room")
            return function(*arguments, **options)

        return allocate

    for name in ("empty", "zeros"):
        monkeypatch.setattr(torch, name, counted(getattr(torch, name)))
    for module in (cuda, cuda_spectra):
        monkeypatch.setattr(module, "upload", counted(module.upload))
    return seen


@pytest.fixture
def trained(library, monkeypatch):
    """An optimizer on the emulated kernels after a step and an epoch end, and its weights."""
    backend = emulated_backend(library)
    for part in (device_rates, device_step):
        monkeypatch.setattr(part, "backend_for", lambda device: backend)
    weights = [Parameter(low_rank(20, 30, 3, 0.5)), Parameter(torch.randn(8, 4, 3, 3))]
    optimizer = rmsgd.RMSGD(weights, lr=0.03, rule="paper")
    for p in weights:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.epoch_step()
    return optimizer, weights, backend


def everything(optimizer, weights):
    """Weights, momentum, rates and measurements."""
    state = optimizer.state_dict()["state"].values()
    numbers = [v.tolist() if isinstance(v, torch.Tensor) else v for one in state for v in one.values()]
    return [p.tolist() for p in weights], numbers, optimizer.learning_rates()


def test_out_of_memory_at_any_stage_of_an_epoch_end_changes_nothing_and_the_next_one_works(
    trained, monkeypatch
):
    optimizer, weights, backend = trained
    before = everything(optimizer, weights)
    failed, number = 0, 0
    while True:
        backend._plans.clear()
        with monkeypatch.context() as short_of_memory:
            seen = allocations_fail_from(short_of_memory, number)
            try:
                optimizer.epoch_step()
            except torch.cuda.OutOfMemoryError:
                failed += 1
            if seen[0] <= number:
                break
        assert everything(optimizer, weights) == before
        number += 1
    assert failed == number > 5
    assert everything(optimizer, weights) != before


def test_a_card_that_lends_less_shared_memory_than_it_says_is_an_error_and_nothing_changes(trained):
    optimizer, weights, backend = trained
    before = everything(optimizer, weights)
    backend._plans.clear()
    backend._kernels.shared = 96 * 1024
    with pytest.raises(RuntimeError, match="rmsgd_tridiagonal: asking for 98304 bytes of shared memory"):
        optimizer.epoch_step()
    assert everything(optimizer, weights) == before


def test_a_weight_that_has_moved_is_measured_and_stepped_where_it_is(trained):
    optimizer, weights, _ = trained
    optimizer.epoch_step()
    old = weights[0].data
    weights[0].data = low_rank(20, 30, 9, 0.2)
    old.fill_(torch.nan)
    matrices = spectra(weights[0].data.clone())
    optimizer.step()
    optimizer.epoch_step()
    assert weights[0].isfinite().all()
    assert 3 < optimizer.report().layers[0].rank[0] == ORACLE.measure(matrices)[0, RANK]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [600, 1030, 2048])
def test_large_matrices_are_measured_without_the_host(library, rows):
    matrices = spectra(low_rank(rows, rows + 60, 6, 0.2))
    backend = emulated_backend(library, resident=2)
    assert_measured(backend.measure(matrices), matrices)
    assert "rmsgd_values" not in backend._kernels.launched


def test_a_known_spectrum_is_measured(backend):
    gamma = torch.cat([torch.linspace(3, 2, 4), torch.linspace(0.5, 0.1, 30)]).double()
    row, expected = backend.measure_spectrum(gamma, 60), ORACLE.measure_spectrum(gamma, 60)
    np.testing.assert_allclose(row.numpy(), expected.numpy(), rtol=1e-12)


# -- steps -----------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SIZES = (0, 1, 3, 17, 64, 2048, 5000)
# momentum, dampening, nesterov, velocity
MOMENTA = (
    (0.0, 0.3, False, True),
    (0.9, 0.0, False, True),
    (0.9, 0.3, False, True),
    (0.9, 0.0, True, True),
    (0.9, 0.0, False, False),
    (0.9, 0.3, False, False),
    (0.9, 0.0, True, False),
)


def unaligned(n, dtype, offset):
    return torch.randn(n + offset, dtype=torch.float64).to(dtype)[offset:]


def make_tables(dtype, offsets=(0, 0, 0), sizes=SIZES, buffers=True):
    """Weights, buffers and gradients that begin ``offsets`` elements after 16-byte boundaries."""
    parameters = [unaligned(n, dtype, offsets[0]) for n in sizes]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    kept = [unaligned(n, wide, offsets[1]) if buffers else None for n in sizes]
    groups = [i % 2 for i in range(len(sizes))]
    eta = torch.rand(len(sizes), dtype=torch.float64) * 0.1
    fresh = torch.tensor([i % 3 == 0 for i in range(len(sizes))])
    gradients = [unaligned(n, dtype, offsets[2]) for n in sizes]
    return StepTables(parameters, kept, groups, eta, fresh), gradients


def copy_of(tables):
    return StepTables(
        [p.clone() for p in tables.parameters],
        [None if b is None else b.clone() for b in tables.buffers],
        tables.groups,
        tables.eta.clone(),
        tables.fresh.clone(),
    )


def assert_same_step(backend, tables, gradients, groups, grad_scale=1.0, steps=2):
    expected = copy_of(tables)
    oracle = ORACLE.stepper(expected)
    stepper = backend.stepper(tables)
    for _ in range(steps):
        stepper.step(gradients, groups, grad_scale)
        oracle.step(gradients, groups, grad_scale)
    for ours, theirs in (
        *zip(tables.parameters, expected.parameters, strict=True),
        *zip(tables.buffers, expected.buffers, strict=True),
    ):
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[ours.dtype], atol=TOLERANCE[ours.dtype])
    filled = [p.numel() > 0 for p in tables.parameters]
    assert tables.fresh[filled].tolist() == expected.fresh[filled].tolist()


@pytest.mark.parametrize("numels", [(), (0, 3), (2048,), (5000, 0, 1, 9000), (100_000, 1, 2049)], ids=str)
@pytest.mark.parametrize("resident", [1, 4, 1000])
def test_items_cover_every_element_once_and_the_last_turn_has_small_ones(numels, resident):
    items, first = cuda_step.step_items(numels, resident)
    seen = [[] for _ in numels]
    for begin, count, tensor in items.tolist():
        assert 0 < count <= 2048
        assert begin % 512 == 0
        seen[tensor] += range(begin, begin + count)
    assert seen == [list(range(n)) for n in numels]
    assert first.tolist() == [int((items["tensor"] < i).sum()) for i in range(len(numels) + 1)]
    whole = sum(-(-n // 2048) for n in numels)
    if whole > resident:
        assert items["count"][max(0, whole - resident) :].max() <= 512
    else:
        assert len(items) == whole


def seconds_of(counts, warps, alone, together):
    """Simulated time of items of so many elements: a warp moves ``alone`` in a second, all ``together``."""
    waiting, running, now = list(counts)[::-1], [], 0.0
    while waiting or running:
        while waiting and len(running) < warps:
            running.append(float(waiting.pop()))
        rate = min(alone, together / len(running))
        step = min(running) / rate
        now += step
        running = [left - step * rate for left in running]
        running = [left for left in running if left > 1e-9]
    return now


@pytest.mark.parametrize("turns", [1.1, 1.5, 2.3, 3.02])
def test_the_last_turn_keeps_the_memory_busy_but_for_the_time_of_a_small_item(turns):
    """96 KB in flight on a multiprocessor are 3.7 times what memory needs, in the count for an H200."""
    warps, items = 64, round(64 * turns)
    alone, together = 1.0, 64 / 3.7
    cut = cuda_step.step_items([2048 * items], warps)[0]["count"].tolist()
    best = 2048 * items / together
    assert seconds_of(cut, warps, alone, together) - best <= 512 / alone
    if turns in (1.1, 3.02):
        assert seconds_of([2048] * items, warps, alone, together) - best > 1024 / alone


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("momentum", MOMENTA, ids=str)
def test_a_step_follows_the_rule(backend, dtype, momentum):
    tables, gradients = make_tables(dtype)
    factor, dampening, nesterov, velocity = momentum
    groups = [
        StepGroup(1.0, factor, dampening, 0.0, nesterov, False, velocity),
        StepGroup(0.5, factor, dampening, 0.1, nesterov, True, velocity),
    ]
    assert_same_step(backend, tables, gradients, groups, grad_scale=4.0)
    assert backend._kernels.launched == ["rmsgd_step"] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offsets", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (3, 2, 1)], ids=str)
def test_tensors_may_begin_anywhere(backend, dtype, offsets):
    tables, gradients = make_tables(dtype, offsets)
    plain = StepGroup(1.0, 0.9, 0.0, 0.01, False, False, True)
    assert_same_step(backend, tables, gradients, [plain, plain])


def test_missing_gradients_leave_their_parameters_alone(backend):
    tables, gradients = make_tables(torch.float32)
    plain = StepGroup(1.0, 0.9, 0.5, 0.01, False, False, True)
    assert_same_step(backend, tables, [None if i % 2 else g for i, g in enumerate(gradients)], [plain, plain])


def test_without_momentum_no_buffer_is_needed_and_with_it_one_is(backend):
    tables, gradients = make_tables(torch.float32, buffers=False)
    plain = StepGroup(1.0, 0.0, 0.0, 0.0, False, False, True)
    assert_same_step(backend, tables, gradients, [plain, plain])
    with pytest.raises(ValueError, match="parameter 0 has no buffer"):
        backend.stepper(tables).step(gradients, [plain._replace(momentum=0.9)] * 2)


@pytest.mark.parametrize("found", [0.0, 1.0, 2.0])
def test_an_overflow_on_the_device_skips_the_step_and_initialises_nothing(backend, found):
    tables, gradients = make_tables(torch.float32)
    before = copy_of(tables)
    expected = copy_of(tables)
    groups = [StepGroup(1.0, 0.9, 0.5, 0.01, False, False, True)] * 2
    stepper = backend.stepper(tables)
    stepper.scaling(torch.tensor([8.0]), torch.tensor([found]))
    stepper.step(gradients, groups)
    if found == 0.0:
        ORACLE.stepper(expected).step(gradients, groups, 8.0)
    for ours, theirs in zip(tables.parameters, expected.parameters, strict=True):
        torch.testing.assert_close(ours, theirs)
    if found:
        assert torch.equal(tables.fresh, before.fresh)
        assert torch.equal(stepper._fresh_items.bool(), before.fresh[stepper_items(stepper, tables)])


def test_a_scale_of_any_type_is_of_its_step_alone(backend):
    tables, gradients = make_tables(torch.float32)
    expected = copy_of(tables)
    groups = [StepGroup(1.0, 0.9, 0.0, 0.01, False, False, True)] * 2
    stepper, oracle = backend.stepper(tables), ORACLE.stepper(expected)
    for scale, found in ((8.0, 0.0), (8.0, 1.0), (None, None)):
        stepper.scaling(*(None if x is None else torch.tensor([x]).double() for x in (scale, found)))
        stepper.step(gradients, groups)
        if not found:
            oracle.step(gradients, groups, scale or 1.0)
    for ours, theirs in zip(tables.parameters, expected.parameters, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_parameters_without_elements_take_no_launch(backend):
    tables, gradients = make_tables(torch.float32, sizes=(0, 0))
    plain = StepGroup(1.0, 0.9, 0.0, 0.0, False, False, True)
    assert_same_step(backend, tables, gradients, [plain, plain])
    assert backend._kernels.launched == []


@pytest.mark.parametrize("momentum", MOMENTA, ids=str)
@pytest.mark.parametrize("offsets", [(0, 0, 0), (1, 0, 0), (0, 1, 3), (3, 2, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_of_half_precision_take_float32_gradients_as_they_are(backend, dtype, offsets, momentum):
    """The gradients are 2^18, which float16 does not hold, and 2^10 when unscaled."""
    tables, gradients = make_tables(dtype, offsets)
    _, single = make_tables(torch.float32, offsets)
    mixed: list[torch.Tensor | None] = [
        a if i % 3 == 1 else b * 2.0**18 for i, (a, b) in enumerate(zip(gradients, single, strict=True))
    ]
    factor, dampening, nesterov, velocity = momentum
    group = StepGroup(1.0, factor, dampening, 0.01, nesterov, False, velocity)
    assert_same_step(backend, tables, mixed, [group, group], grad_scale=256.0)


def test_float32_gradients_of_half_precision_are_unscaled_before_they_are_rounded(backend):
    tables, gradients = make_tables(torch.float16)
    expected = copy_of(tables)
    groups = [StepGroup(1.0, 0.9, 0.0, 0.01, False, False, True)] * 2
    stepper = backend.stepper(tables)
    stepper.scaling(torch.tensor([2.0**20]), torch.tensor([0.0]))
    stepper.step([g.float() * 2.0**20 for g in gradients], groups)
    assert backend._kernels.launched == ["rmsgd_step"]
    ORACLE.stepper(expected).step(gradients, groups)
    for ours, theirs in zip(tables.parameters, expected.parameters, strict=True):
        torch.testing.assert_close(ours, theirs)


def stepper_items(stepper, tables):
    items, _ = cuda_step.step_items([p.numel() for p in tables.parameters], resident=6 * 8)
    return torch.from_numpy(items["tensor"].astype(np.int64))


def test_a_fresh_buffer_counts_as_zero_whatever_it_holds(backend):
    tables, gradients = make_tables(torch.float32, sizes=(5000,))
    tables.fresh.fill_(True)
    tables.buffers[0].fill_(torch.nan)
    plain = StepGroup(1.0, 0.9, 0.5, 0.0, False, False, True)
    backend.stepper(tables).step(gradients, [plain, plain])
    assert tables.parameters[0].isfinite().all()
    assert not tables.fresh[0]


def test_a_tensor_learning_rate_is_read_where_it_is(backend):
    tables, gradients = make_tables(torch.float32)
    on_host, on_device = copy_of(tables), copy_of(tables)
    group = StepGroup(0.25, 0.9, 0.0, 0.0, False, False, True)
    backend.stepper(on_host).step(gradients, [group, group])
    rate = torch.tensor(0.25, dtype=torch.float64)
    backend.stepper(on_device).step(gradients, [group._replace(multiplier=rate)] * 2)
    assert all(map(torch.equal, on_host.parameters, on_device.parameters))


@pytest.mark.parametrize("tensors", [400, 700, 4500])
def test_thousands_of_tensors_take_as_few_launches_as_arguments_allow(backend, tensors):
    tables, gradients = make_tables(torch.float32, sizes=(2,) * tensors)
    plain = StepGroup(1.0, 0.9, 0.0, 0.0, False, False, True)
    assert_same_step(backend, tables, gradients, [plain, plain], steps=1)
    assert backend._kernels.launched == {
        400: ["rmsgd_step"],
        700: ["rmsgd_step_large"],
        4500: ["rmsgd_step_large"] * 2,
    }.get(tensors, [])


def test_a_group_for_every_parameter_takes_one_launch_too(backend):
    tables, gradients = make_tables(torch.float32, sizes=(3,) * 465)
    tables = StepTables(tables.parameters, tables.buffers, range(465), tables.eta, tables.fresh)
    groups = [StepGroup(1.0 + i / 465, 0.9, 0.0, 0.0, False, False, True) for i in range(465)]
    assert_same_step(backend, tables, gradients, groups, steps=1)
    assert backend._kernels.launched == ["rmsgd_step_large"]


# -- learning rates --------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("order", ORDERS)
def test_rates_move_as_in_the_reference(library, rule, order):
    layers, followers = 300, 40
    generator = torch.Generator().manual_seed(rule.number)

    def uniform(n):
        return torch.rand(n, generator=generator, dtype=torch.float64)

    begin = torch.arange(0, 2 * layers + 1, 2, dtype=torch.int32)
    metrics = torch.zeros(2 * layers, 7, dtype=torch.float64)
    metrics[:, STABLE_RANK], metrics[:, NUCLEAR] = uniform(2 * layers), uniform(2 * layers)
    metrics[::7, STABLE_RANK] = metrics[::7, NUCLEAR] = 0.0
    metrics[1::7, STABLE_RANK] = metrics[1::7, NUCLEAR] = 0.0
    metrics[10, :STATUS], metrics[10, STATUS] = torch.nan, NOT_FINITE
    tables = RateTables(
        parameter=torch.arange(layers, dtype=torch.int32),
        group=torch.arange(layers, dtype=torch.int32) % 2,
        spectrum_begin=begin,
        weight=torch.full((2 * layers,), 0.5, dtype=torch.float64),
        stable_rank=uniform(layers),
        ready=torch.arange(layers, dtype=torch.int32) % 3 // 2,
        unbounded=uniform(layers),
        eta=uniform(layers + followers),
        follower=torch.arange(layers, layers + followers, dtype=torch.int32),
        leader=torch.arange(followers, dtype=torch.int32) - 2,
        follower_group=torch.arange(followers, dtype=torch.int32) % 2,
    )
    groups = [
        RateGroup(
            *numbers,
            rule.anchor * numbers[0],
            rule.lowest,
            rule.highest,
            rule.column,
            rule.holds,
            rule.number,
            first,
        )
        for numbers, first in (((0.3, 0.98, 1.0, 0.9, 1e-10), False), ((0.5, 0.9, 0.5, 1.0, 0.0), True))
    ]
    expected = RateTables(*(tensor.clone() for tensor in vars(tables).values()))
    update_rates(expected, groups, metrics)
    emulated_backend(library, order).update_rates(tables, groups, metrics)
    assert torch.equal(tables.ready, expected.ready)
    torch.testing.assert_close(tables.stable_rank, expected.stable_rank, rtol=1e-14, atol=0)
    torch.testing.assert_close(tables.unbounded, expected.unbounded, rtol=1e-13, atol=0)
    torch.testing.assert_close(tables.eta, expected.eta, rtol=1e-13, atol=0)


# -- the optimizer on top ----------------------------------------------------------------------------


def train(parameters, scaled, **options):
    """A few steps and epoch ends; the second step overflows if `scaled`."""
    optimizer = rmsgd.RMSGD(parameters, lr=0.03, **options)
    generator = torch.Generator().manual_seed(1)
    for epoch in range(3):
        for step in range(2):
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=generator) * (8.0 if scaled else 1.0)
            if scaled:
                optimizer.grad_scale = torch.tensor(8.0)
                optimizer.found_inf = torch.tensor(2.0 if (epoch, step) == (0, 1) else 0.0)
            optimizer.step()
        optimizer.epoch_step()
    return optimizer


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize(
    "options",
    [{"rule": "paper"}, {"rule": "release", "dampening": 0.5}, {"nesterov": True}],
    ids=["paper", "release", "bounded, from a measured start"],
)
def test_the_optimizer_runs_on_it_as_on_the_cpu(library, monkeypatch, options, scaled):
    weights = [low_rank(20, 30, 3, 0.5), torch.randn(20), torch.randn(8, 4, 3, 3), low_rank(12, 12, 2, 0.3)]
    on_cpu, emulated = ([Parameter(w.clone()) for w in weights] for _ in range(2))
    expected = train(on_cpu, scaled, **options)
    backend = emulated_backend(library)
    for part in (device_rates, device_step):
        monkeypatch.setattr(part, "backend_for", lambda device: backend)
    found = train(emulated, scaled, **options)
    for ours, theirs in zip(emulated, on_cpu, strict=True):
        torch.testing.assert_close(ours, theirs)
    for name, rate in expected.learning_rates().items():
        assert found.learning_rates()[name] == pytest.approx(rate, rel=1e-5)
    assert found.report().quality == pytest.approx(expected.report().quality, rel=1e-4)
    states = [optimizer.state_dict()["state"] for optimizer in (found, expected)]
    assert [s["fresh"] for s in states[0].values()] == [s["fresh"] for s in states[1].values()]


# -- rmsgd._cuda -----------------------------------------------------------------------------------


@pytest.fixture
def module(backend):
    return backend._kernels.module


TAKEN = {
    "rmsgd_values": _VALUES_ARGUMENTS,
    "rmsgd_rates": _RATES_ARGUMENTS,
    "rmsgd_gram": _ARGUMENTS,
    **{name: _arguments(words) for name, words in _SIZES.items()},
}
LAUNCH = {
    "name": "rmsgd_values",
    "device": 0,
    "blocks": 1,
    "threads": 32,
    "shared_bytes": 0,
    "stream": 0,
    "arguments": np.zeros(1, _VALUES_ARGUMENTS),
}


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"name": "rmsgd_none"}, KeyError, "no kernel is called rmsgd_none"),
        ({"arguments": np.zeros(3)}, ValueError, "arguments: rmsgd_values takes 48 bytes, got 24"),
        ({"arguments": np.zeros(10)[::2]}, ValueError, "arguments: not contiguous"),
        ({"blocks": 0}, ValueError, "blocks: expected 1 to 2147483647, got 0"),
        ({"blocks": 2**31}, ValueError, "blocks: expected 1 to 2147483647, got 2147483648"),
        ({"threads": 1056}, ValueError, "threads: expected 1 to 1024, got 1056"),
        ({"shared_bytes": -1}, ValueError, "shared_bytes: negative"),
        ({"device": 7}, RuntimeError, "choosing device 7: invalid device ordinal"),
        ({"shared_bytes": 2**20}, RuntimeError, "rmsgd_values: asking for 1048576 bytes of shared memory"),
        ({"cooperative": True, "blocks": 99}, RuntimeError, "rmsgd_values: too many blocks in cooperative"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_launch_that_cannot_be_says_what_is_wrong_with_it(module, wrong, error, said):
    with pytest.raises(error, match=said):
        module.launch(**{**LAUNCH, **wrong})


def test_threads_that_come_together_share_the_streams_of_their_device(library):
    made = []

    def make(device):
        made.append(device)
        time.sleep(0.05)
        return OneStream(device)

    backend = cuda.CudaBackend("cuda", EmulatedKernels(library), "", make)
    device = torch.device("cpu")
    threads = [threading.Thread(target=backend.wait_side_stream, args=(device,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


NO_RATES = {
    **LAUNCH,
    "name": "rmsgd_rates",
    "shared_bytes": TEAM_SHARED,
    "arguments": np.zeros(1, _RATES_ARGUMENTS),
}


@pytest.fixture
def contexts(library, module):
    """The emulated driver's: which devices have one, and whose is the thread's."""
    emulated = ctypes.CDLL(str(library))
    emulated.emulated_forget_contexts()
    return emulated


def in_a_new_thread(work):
    """Its result; a new thread has no current context."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.mark.parametrize("call", ["launch", "resident_blocks"])
def test_work_on_one_gpu_makes_no_context_on_another_and_leaves_none_current(module, contexts, call):
    def work():
        if call == "launch":
            module.launch(**{**NO_RATES, "device": 1})
        else:
            module.resident_blocks("rmsgd_rates", 1, 256, 60_000)
        return contexts.emulated_current_device()

    assert in_a_new_thread(work) == -1
    assert [contexts.emulated_has_context(device) for device in (0, 1)] == [0, 1]


def test_the_context_that_was_current_is_current_again(module, contexts):
    def work():
        contexts.cudaSetDevice(0)
        module.launch(**{**NO_RATES, "device": 1})
        with pytest.raises(RuntimeError, match="choosing device 7"):
            module.launch(**{**LAUNCH, "device": 7})
        return contexts.emulated_current_device()

    assert in_a_new_thread(work) == 0


def test_other_python_threads_run_while_a_launch_waits_for_the_gpu(library, module):
    queue_full = ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "emulated_queue_full")
    queue_full.value = 1
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(module.launch, **NO_RATES)
        assert not waiting.done()
        queue_full.value = 0
        waiting.result()


STRUCTS = {
    "SpectrumArguments": _ARGUMENTS,
    "CudaMatrix": cuda_spectra._MATRIX,
    "CudaReduction": cuda_spectra._REDUCTION,
    "Side": cuda_spectra._SIDE,
    "GramItem": cuda_spectra._ITEM,
    "SpectrumState": cuda_spectra._STATE,
    "TeamBlock": cuda_spectra._TEAM_BLOCK,
    "ValuesArguments": _VALUES_ARGUMENTS,
    "RateGroup": cuda._RATE_GROUP,
    "RateTables": cuda._RATE_TABLES,
    "RatesArguments": _RATES_ARGUMENTS,
    "CudaStepGroup": cuda_step._GROUP,
    "CudaStepTensor": cuda_step._TENSOR,
    "CudaStepItem": cuda_step._ITEM,
    "StepArguments<STEP_SMALL>": _arguments(_SIZES["rmsgd_step"]),
    "StepArguments<STEP_LARGE>": _arguments(_SIZES["rmsgd_step_large"]),
}
"""Structures of csrc, and the NumPy type that Python packs each with."""


def test_every_field_that_python_packs_is_where_the_kernels_look_for_it(tmp_path):
    lines = ["#include <cstddef>", '#include "kernels_cuda.h"', "using namespace rmsgd;"]
    for number, (struct, dtype) in enumerate(STRUCTS.items()):
        lines += [f"using S{number} = {struct};", f"static_assert(sizeof(S{number}) == {dtype.itemsize});"]
        for field, (kind, offset) in ((name, dtype.fields[name][:2]) for name in dtype.names):
            lines += [
                f'static_assert(offsetof(S{number}, {field}) == {offset}, "{struct}::{field}");',
                f'static_assert(sizeof(S{number}::{field}) == {kind.itemsize}, "{struct}::{field}");',
            ]
    source = tmp_path / "offsets.cpp"
    source.write_text("\n".join(lines))
    compile_cpp(source, tmp_path / "offsets.o", "-fsyntax-only", "-Wno-invalid-offsetof")


def test_no_struct_that_python_packs_is_left_out():
    known = {id(dtype) for dtype in STRUCTS.values()}
    for module in (cuda, cuda_spectra, cuda_step):
        for name, value in vars(module).items():
            assert not isinstance(value, np.dtype) or id(value) in known, name


def test_kernels_take_structs_of_the_size_that_python_packs(module):
    for name, dtype in TAKEN.items():
        assert module.argument_bytes(name) == dtype.itemsize
