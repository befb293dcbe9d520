"""Singular values of many matrices at once: those of a float64 SVD, within the bound that the docs state."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from test_spectrum import (
    FLOATS,
    FP32_GRAM,
    FP64_GRAM,
    HOSTILE,
    LAYOUTS,
    noise_and_low_rank,
    with_singular_values,
)
from torch import nn
from torch.nn.utils import prune

import rmsgd
from rmsgd import backends, reference
from rmsgd.backends.base import STAGE, BackendUnavailable, MeasuresSpectra
from rmsgd.backends.spectra import eigenvalues, measure_spectra
from rmsgd.backends.svd import gram_singular_values
from rmsgd.element_types import rounding
from rmsgd.layers import as_matrix, unfoldings, whole_matrix

U32, U64 = 2.0**-24, 2.0**-53


def expected_values(matrix):
    return reference.singular_values(matrix.detach().double().numpy(), rounding(matrix.dtype))


def assert_within(found, expected, bound):
    """The documented bound: squares within ``bound`` of the largest, and what the oracle's SVD rounds."""
    error = np.abs(found.numpy() ** 2 - expected[: len(found)] ** 2)
    assert error.max(initial=0.0) <= (bound + 32 * U64) * expected[0] ** 2


def assert_is_spectrum(spectrum, matrix, values, bound):
    expected = expected_values(matrix)
    L, M = sorted(matrix.shape)
    rank, variance, *_ = reference.measure_singular_values(expected, L, M)
    assert spectrum.rank == rank
    assert spectrum.singular_values.shape == (rank if values == "top" else L,)
    assert spectrum.singular_values.dtype == torch.float64
    assert (spectrum.singular_values.diff() <= 0.0).all()
    assert_within(spectrum.singular_values, expected, bound)
    assert spectrum.noise_variance == pytest.approx(variance, rel=1e-3, abs=0.0)
    limit = math.sqrt(M * reference.threshold(L, M)[2] * variance)
    assert spectrum.noise_threshold == pytest.approx(limit, rel=1e-3, abs=0.0)


# ---- values and their errors ----


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", HOSTILE)
def test_values_of_a_hostile_matrix_are_within_the_documented_bound(name, dtype):
    weight = HOSTILE[name]().to(dtype)
    for values, exact, bound in (("top", False, 16 * U32), ("all", False, 16 * U64), ("all", True, 8 * U64)):
        (spectrum,) = rmsgd.spectra([weight], values, exact)
        assert_is_spectrum(spectrum, weight, values, bound)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_view_is_measured_where_it_lies_in_all_its_unfoldings(name, dtype):
    view = LAYOUTS[name](noise_and_low_rank(60, 180, 3).to(dtype))
    found = rmsgd.spectra({"layer": view}, "all", include_buffers=True)
    assert [s.mode for s in found] == [" and ".join(u.modes) for u in unfoldings(view.shape)]
    for spectrum, unfolding in zip(found, unfoldings(view.shape), strict=True):
        assert_is_spectrum(spectrum, as_matrix(view, unfolding), "all", 16 * U64)


def test_a_list_of_all_shapes_has_its_spectra_in_its_order(backend):
    shapes = [(1, 1), (3, 50), (50, 3), (1, 9), (9, 1), (64, 64), (130, 70), (2, 2)]
    weights = [torch.randn(shape) for shape in shapes]
    found = rmsgd.spectra(weights, "all")
    assert [s.name for s in found] == [str(i) for i in range(len(shapes))]
    assert [s.shape for s in found] == shapes
    for spectrum, weight in zip(found, weights, strict=True):
        assert_is_spectrum(spectrum, weight, "all", 16 * U64)
    assert rmsgd.spectra([]) == ()


@pytest.mark.parametrize("values", ["top", "all"])
@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_every_backend_finds_the_same_values(backend, values, strength):
    weight = noise_and_low_rank(40, 90, 3, strength).float()
    (spectrum,) = rmsgd.spectra([weight], values)
    assert spectrum.rank == (3 if strength else 0)
    assert_is_spectrum(spectrum, weight, values, 16 * (U64 if values == "all" else U32))


@pytest.mark.parametrize("scale", [1e-40, 1e-20, 1e20, 2e37])
def test_values_are_in_units_of_the_weight_whatever_its_scale(scale):
    weight = (noise_and_low_rank(20, 60, 2) * scale).float()
    (spectrum,) = rmsgd.spectra([weight], "all")
    assert_within(spectrum.singular_values / scale, expected_values(weight) / scale, 16 * U64)


@pytest.mark.parametrize("decades", [3, 6, 9, 12])
def test_small_values_are_as_exact_as_promised_and_by_svd_exact(decades):
    weight = with_singular_values(np.geomspace(1.0, 10.0**-decades, 40), 90)
    expected = expected_values(weight)
    (gram,) = rmsgd.spectra([weight], "all")
    assert_within(gram.singular_values, expected, 16 * U64)
    (svd,) = rmsgd.spectra([weight], "all", exact=True)
    np.testing.assert_allclose(svd.singular_values, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("largest", [1.0, 30.0, 1e3, 1e5])
def test_the_larger_half_of_the_eigenvalues_is_known_to_three_digits(largest, seed):
    gamma = np.r_[largest, np.linspace(1.0, 0.02, 59)]
    weight = with_singular_values(gamma, 150, seed).float()
    (found,) = eigenvalues([weight])
    expected = expected_values(weight) ** 2
    assert (found.diff() <= 0).all()
    np.testing.assert_allclose(found[:30], expected[:30], rtol=1e-3)
    known = found.numpy() > 1e-12 * expected[0]
    np.testing.assert_allclose(found[known], expected[known], rtol=1e-3)
    assert (expected[~known] < 1e-3 * expected[0]).all()


def test_eigenvalues_alone_take_no_product_in_fp64_for_a_rank_that_is_hard_to_tell():
    # The largest value is at the threshold of EVBMF, within the errors of single precision.
    gamma, low, high = np.linspace(1.0, 0.5, 96), 0.9, 3.0
    for _ in range(60):
        gamma[0] = 0.5 * (low + high)
        found = reference.measure_singular_values(gamma, 96, 200)[0]
        low, high = (gamma[0], high) if found == 0 else (low, gamma[0])
    matrix = [(with_singular_values(gamma, 200).float(), whole_matrix((96, 200)))]
    assert measure_spectra(matrix, "half")[0][0, STAGE] == FP64_GRAM
    table, (values,) = measure_spectra(matrix, "bulk")
    assert table[0, STAGE] == FP32_GRAM
    np.testing.assert_allclose(values**2, gamma**2, rtol=2e-4)


def test_eigenvalues_of_the_slices_of_a_kernel_are_those_of_their_copies():
    kernel = torch.randn(24, 16, 3, 3)
    slices = [kernel[:, :, i, j] for i in range(3) for j in range(3)]
    for found, piece in zip(eigenvalues(slices), slices, strict=True):
        np.testing.assert_allclose(found, expected_values(piece) ** 2, rtol=1e-3, atol=1e-6 * found[0])


KERNELS = {
    "square": lambda: torch.randn(20, 20, 3, 3),
    "more inputs": lambda: torch.randn(24, 300, 3, 3),
    "more outputs": lambda: torch.randn(530, 40, 3, 3),
    "long": lambda: torch.randn(17, 33, 7),
    "two positions": lambda: torch.randn(33, 70, 1, 2),
    "one row": lambda: torch.randn(1, 9, 3, 3),
    "three dimensions": lambda: torch.randn(18, 16, 2, 3, 2),
    "channels last": lambda: torch.randn(24, 16, 3, 3).to(memory_format=torch.channels_last),
    "every second input": lambda: torch.randn(24, 32, 3, 3)[:, ::2],
    "a part of the positions": lambda: torch.randn(24, 16, 3, 5)[..., :2],
    "overlapping": lambda: torch.randn(24 * 16 + 2).as_strided((24, 16, 3), (16, 1, 1)),
    "expanded": lambda: torch.randn(16, 3, 3).expand(24, 16, 3, 3),
    "huge": lambda: 1e25 * torch.randn(24, 16, 3, 3),
    "one value": lambda: torch.randn(24, 40, 3, 3) + 300.0,
    "too large to pack": lambda: torch.randn(2, 120_000, 3, 3),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_a_position_has_the_same_values_beside_the_others_of_its_kernel_and_alone(name, dtype):
    kernel = KERNELS[name]()
    kernel = kernel if name == "overlapping" and dtype == torch.float32 else kernel.to(dtype)
    slices = list(kernel.flatten(2).permute(2, 0, 1))
    alone = [eigenvalues([piece])[0] for piece in slices]
    for found, expected in zip(eigenvalues(slices), alone, strict=True):
        assert torch.equal(found.nan_to_num(-1.0), expected.nan_to_num(-1.0))
    for found, piece in zip(alone[:1], slices[:1], strict=True):
        if piece.isfinite().all() and piece.numel() < 10_000:
            expected = expected_values(piece) ** 2
            half = (len(expected) + 1) // 2
            np.testing.assert_allclose(found[:half], expected[:half], rtol=1e-3, atol=1e-12 * expected[0])


def test_a_position_that_is_not_finite_leaves_the_others_of_its_kernel_as_they_are():
    kernel = torch.randn(24, 16, 3, 3)
    expected = eigenvalues(list(kernel.flatten(2).permute(2, 0, 1)))
    kernel[3, 5, 1, 0] = math.inf
    found = eigenvalues(list(kernel.flatten(2).permute(2, 0, 1)))
    assert [bool(values.isnan().all()) for values in found] == [i == 3 for i in range(9)]
    assert all(torch.equal(found[i], expected[i]) for i in range(9) if i != 3)


def test_eigenvalues_of_a_weight_that_is_not_finite_are_not_numbers(backend):
    good, bad = torch.randn(8, 9), torch.full((4, 5), math.nan)
    found = eigenvalues([bad, good])
    assert torch.isnan(found[0]).all()
    assert found[0].shape == (4,)
    np.testing.assert_allclose(found[1], expected_values(good) ** 2, rtol=1e-3)


def test_the_number_of_threads_changes_no_bit_of_a_spectrum():
    weights = [torch.randn(1030, 1100), torch.randn(64, 300), noise_and_low_rank(90, 200, 4).float()]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(torch.cat([s.singular_values for s in rmsgd.spectra(weights, "all")]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (1, 8)])
def test_the_gram_matrix_of_torch_gives_the_same_values(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    (found,) = gram_singular_values([(weight, whole_matrix(shape))])
    assert_within(found, expected_values(weight), 16 * U64)


def test_gram_matrices_with_equally_many_rows_are_one_call_as_far_as_there_is_room(monkeypatch):
    calls, eigvalsh = [], torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda a: calls.append(tuple(a.shape)) or eigvalsh(a))
    scaled = [(1e20, (6, 9)), (1.0, (4, 8)), (1e-20, (30, 6)), (1.0, (6, 6)), (1.0, (5, 4))]
    weights = [scale * torch.randn(shape) for scale, shape in scaled]
    weights[3] = torch.ones(6, 6)  # rank 1: its zeros are its own
    matrices = [(weight, whole_matrix(weight.shape)) for weight in weights]
    for room, expected in ((100, [(2, 6, 6), (1, 6, 6), (2, 4, 4)]), (1, [(1, 6, 6)] * 3 + [(1, 4, 4)] * 2)):
        calls.clear()
        monkeypatch.setattr("rmsgd.backends.svd._STACK", room)
        for found, weight in zip(gram_singular_values(matrices), weights, strict=True):
            assert_within(found, expected_values(weight), 16 * U64)
        assert calls == expected
    assert (gram_singular_values(matrices)[3][1:] == 0.0).all()
    assert gram_singular_values([]) == []


def test_a_backend_without_spectra_has_those_of_an_svd(monkeypatch):
    monkeypatch.setenv("RMSGD_BACKEND", "torch")
    assert not isinstance(backends.backend_for(torch.device("cpu")), MeasuresSpectra)
    weight = with_singular_values(np.geomspace(1.0, 1e-10, 20), 30)
    (spectrum,) = rmsgd.spectra([weight], "all")
    np.testing.assert_allclose(spectrum.singular_values, expected_values(weight), rtol=0, atol=1e-14)


# ---- sources ----


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1), nn.Flatten(), nn.Linear(6, 4)
    )


def as_file(module, folder):
    path = folder / "network.pt"
    torch.save(module.state_dict(), path)
    return path


@pytest.mark.parametrize("form", ["module", "state dict", "file"])
def test_a_network_has_a_spectrum_per_unfolding_in_its_order(form, tmp_path):
    module = network()
    forms = {"module": module, "state dict": module.state_dict(), "file": as_file(module, tmp_path)}
    found = rmsgd.spectra(forms[form], "all")
    assert [(s.name, s.shape, s.mode) for s in found] == [
        ("0.weight", (8, 3, 3, 3), "in"),
        ("0.weight", (8, 3, 3, 3), "out"),
        ("2.weight", (6, 8, 1, 1), "in and out"),
        ("4.weight", (4, 6), "matrix"),
    ]
    state = module.state_dict()
    matrices = [
        as_matrix(state[name], u)
        for name in ("0.weight", "2.weight", "4.weight")
        for u in unfoldings(state[name].shape)
    ]
    for spectrum, matrix in zip(found, matrices, strict=True):
        assert_is_spectrum(spectrum, matrix, "all", 16 * U64)


def test_spectra_and_probe_agree_on_what_a_layer_is():
    module = network()
    nn.utils.parametrizations.weight_norm(module[4])
    prune.random_unstructured(module[0], "weight", 0.5)
    module.register_buffer("mask", torch.ones(9, 9))
    layers = {layer.name: layer for layer in rmsgd.probe(module).layers}
    found = rmsgd.spectra(module)
    assert {s.name for s in found} == set(layers)
    for spectrum in found:
        assert spectrum.skipped == layers[spectrum.name].skipped
        if spectrum.skipped is None:
            assert spectrum.rank in layers[spectrum.name].rank
            mode = layers[spectrum.name].modes.index(spectrum.mode.split()[0])
            expected = layers[spectrum.name].noise_variance[mode]
            assert spectrum.noise_variance == pytest.approx(expected, rel=1e-5)


def test_a_filter_chooses_layers_as_it_does_for_probe():
    assert {s.name for s in rmsgd.spectra(network(), filter="2.")} == {"2.weight"}
    assert {s.name for s in rmsgd.spectra(network(), exclude=["0.", "2."])} == {"4.weight"}


def test_a_layer_that_is_not_finite_is_reported_once_and_the_others_go_on():
    module = network()
    with torch.no_grad():
        module[0].weight[0, 0, 0, 0] = math.nan
    bad, *others = rmsgd.spectra(module)
    assert (bad.name, bad.skipped, len(bad.singular_values)) == ("0.weight", "NaN or infinite entries", 0)
    assert math.isnan(bad.noise_variance)
    assert math.isnan(bad.noise_threshold)
    assert [s.skipped for s in others] == [None, None]


def test_what_cannot_be_read_is_warned_of_and_the_rest_is_measured(tmp_path):
    path = as_file(network(), tmp_path)
    index = '{"weight_map": {"4.weight": "network.pt", "lost.weight": "lost.pt"}}'
    (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    with pytest.warns(UserWarning, match="lost"):
        found = rmsgd.spectra(path.parent)
    assert "4.weight" in {s.name for s in found}


def test_a_spectrum_cannot_be_changed():
    (spectrum,) = rmsgd.spectra([torch.eye(3)])
    with pytest.raises(dataclasses.FrozenInstanceError):
        spectrum.rank = 3


# ---- bad input ----


class Elsewhere(torch.Tensor):
    """A tensor without memory of its own."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values):
        self.values = values

    def __repr__(self):
        return "Elsewhere"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values)
        raise NotImplementedError(func)


def freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


def test_a_weight_whose_memory_was_freed_is_a_reason_and_ends_no_process():
    report = rmsgd.probe({"gone": freed(torch.randn(3, 4)), "w": torch.randn(3, 4)})
    assert [layer.skipped for layer in report.layers] == [
        "its memory has been freed: a shape without values",
        None,
    ]
    with pytest.raises(ValueError, match="weight has a shape but no values: its memory has been freed"):
        rmsgd.evbmf(freed(torch.randn(3, 4)))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (torch.randn(3, 4), TypeError, r"give \[tensor\]"),
        ([torch.randn(3, 4), torch.randn(5)], ValueError, r"source\[1\] must be a matrix .* shape \(5,\)"),
        ([torch.randn(2, 3, 3, 3)], ValueError, r"source\[0\] must be a matrix"),
        ([torch.empty(0, 3)], ValueError, r"source\[0\] .* at least one entry, got shape \(0, 3\)"),
        ([torch.ones(3, 3, dtype=torch.int64)], TypeError, r"source\[0\] .* torch.int64"),
        ([[1.0, 2.0]], TypeError, r"source\[0\] must be a torch.Tensor, got list"),
        (
            [torch.eye(3), torch.full((2, 2), math.inf)],
            ValueError,
            r"source\[1\] has NaN or infinite entries",
        ),
        ([torch.eye(3).to_sparse()], TypeError, r"source\[0\] must be dense"),
        ([torch.eye(3, device="meta")], ValueError, r"source\[0\] is on the meta device"),
        ([freed(torch.randn(3, 4))], ValueError, r"source\[0\] .* has been freed"),
        ([Elsewhere(torch.randn(3, 4))], TypeError, r"source\[0\] must be a plain tensor, got a Elsewhere"),
        (3, TypeError, "a list of matrices.*got int"),
        (iter([torch.randn(3, 4)]), TypeError, "a list of matrices.*got list_iterator"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_a_bad_source_is_named(source, error, message):
    with pytest.raises(error, match=message):
        rmsgd.spectra(source)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match='values must be "top" or "all", got \'half\''):
        rmsgd.spectra([torch.eye(3)], "half")
    with pytest.raises(ValueError, match="filter, key are for networks"):
        rmsgd.spectra([torch.eye(3)], filter="x", key="model")
    with pytest.raises(ValueError, match="nowhere"):
        rmsgd.spectra([torch.eye(3)], device="nowhere")


def test_the_core_refuses_another_choice_of_values():
    try:
        native = next(entry for entry in backends.ENTRIES if entry.name == "native").load()
    except BackendUnavailable as reason:
        pytest.skip(f"no compiled core: {reason}")
    with pytest.raises(ValueError, match="expected top, half, bulk or all, got most"):
        native._core.spectra([], "most", 1)
