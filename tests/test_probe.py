"""A probe's values are the formulas' values, whatever the layer, and nothing is skipped without a reason."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import rmsgd
from rmsgd import reference
from rmsgd.element_types import rounding
from rmsgd.inspection.report.comparison import Comparison
from rmsgd.inspection.report.series import Series, comparable_name, in_order_of_training
from rmsgd.inspection.report.series_figure import checkpoint_labels, low_rank_and_noise
from rmsgd.inspection.selection import Selection

OF_ALL_VALUES = ["tail_exponent", "full_stable_rank", "log_spectral_norm"]
FIELDS = [
    "name",
    "shape",
    "modes",
    "rank",
    "noise_variance",
    "stable_rank",
    "condition_number",
    "quality",
    *OF_ALL_VALUES,
    "skipped",
]


def structured(*shape, rank=2):
    """Noise with a low-rank part in the first two dimensions."""
    o, i, *k = shape
    left, right = torch.randn(o, rank), torch.randn(rank, i)
    low = (left @ right).reshape(o, i, *([1] * len(k)))
    return 0.1 * torch.randn(*shape) + low


def modes_of(weight):
    """The unfoldings of the paper, spelt out: mode name to matrix, those of a single row left out."""
    w = weight.double().numpy()
    if w.ndim == 2:
        return {"matrix": w}
    unfolded = {
        "in": np.moveaxis(w, 1, 0).reshape(w.shape[1], -1),
        "out": w.reshape(w.shape[0], -1),
    }
    return {mode: matrix for mode, matrix in unfolded.items() if min(matrix.shape) > 1}


def assert_is_the_oracles(layer, weight, tolerance=1e-6):
    measured = {}
    for mode, matrix in modes_of(weight).items():
        L, M = min(matrix.shape), max(matrix.shape)
        measured[mode] = reference.measure_singular_values(
            reference.singular_values(matrix, rounding(weight.dtype)), L, M
        )
    s = np.mean([row[2] for row in measured.values()])
    kappa = np.mean([row[3] for row in measured.values()])
    assert layer.skipped is None
    assert layer.shape == tuple(weight.shape)
    assert layer.modes == tuple(measured)
    assert layer.rank == tuple(row[0] for row in measured.values())
    np.testing.assert_allclose(layer.noise_variance, [row[1] for row in measured.values()], rtol=1e-4)
    np.testing.assert_allclose(layer.stable_rank, s, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(layer.condition_number, kappa, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.quality, math.atan2(s, kappa), rtol=1e-3, atol=1e-6)


# -- values --------------------------------------------------------------------------------------

LAYERS = {
    "linear": nn.Linear(48, 20),
    "embedding": nn.Embedding(200, 16),
    "conv 1-D": nn.Conv1d(12, 20, 5),
    "conv 2-D": nn.Conv2d(12, 20, 3),
    "conv 3-D": nn.Conv3d(6, 10, 3),
    "conv 1 x 1": nn.Conv2d(24, 16, 1),
    "transposed conv": nn.ConvTranspose2d(12, 20, 3),
    "grouped conv": nn.Conv2d(16, 24, 3, groups=4),
    "depthwise conv": nn.Conv2d(16, 16, 3, groups=16),
    "attention": nn.MultiheadAttention(16, 4),
    "stacked experts": nn.ParameterDict({"experts": torch.empty(8, 24, 16)}),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer_has_the_oracles_values(backend, kind):
    module = LAYERS[kind]
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim > 1:
                p.copy_(structured(*p.shape))
    report = rmsgd.probe(module)
    weights = {name: p.detach() for name, p in module.named_parameters() if p.ndim > 1}
    assert [layer.name for layer in report.layers] == list(weights)
    for layer in report.layers:
        assert_is_the_oracles(layer, weights[layer.name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_floating_dtype_has_the_oracles_values(backend, dtype):
    weight = structured(24, 40).to(dtype)
    [layer] = rmsgd.probe({"w": weight}).layers
    assert_is_the_oracles(layer, weight)


@pytest.mark.parametrize("name", [n for n in dir(torch) if n.startswith(("float8_e4", "float8_e5"))])
def test_eight_bit_floats_are_measured_as_the_numbers_they_are(name):
    weight = structured(24, 40).to(getattr(torch, name))
    [layer] = rmsgd.probe({"w": weight}).layers
    assert_is_the_oracles(layer, weight.float())


def test_eight_bit_floats_are_multiplied_by_their_block_scales():
    weight, scale = structured(20, 40), torch.rand(3, 5) + 0.5  # the last block of rows is half a block
    blocks = scale.repeat_interleave(8, 0).repeat_interleave(8, 1)[:20]
    codes = (weight / blocks).to(torch.float8_e4m3fn)
    report = rmsgd.probe({"w.weight": codes, "w.weight_scale_inv": scale})
    measured, scales = report.layers
    assert_is_the_oracles(measured, codes.float() * blocks)
    assert scales.skipped == "scales of w.weight"


@pytest.mark.parametrize(
    ("scale", "reason"),
    [
        (torch.ones(0, 8), "fit no blocks"),
        (torch.ones(3, 5), "fit no blocks"),
        (torch.ones(8, 8).to_sparse(), "scales are sparse"),
        (torch.ones(1, device="meta"), "scales are on the meta device"),
        (torch.ones(8, 1, dtype=torch.complex64), "scales are complex64"),
    ],
    ids=["empty", "uneven", "sparse", "meta", "complex"],
)
def test_eight_bit_floats_with_scales_that_scale_nothing_are_skipped(scale, reason):
    report = rmsgd.probe({"w": torch.randn(8, 8).to(torch.float8_e4m3fn), "w_scale": scale})
    assert reason in report.layers[0].skipped


def test_numpy_arrays_are_taken_in_any_order_and_byte_order():
    weight = structured(24, 40)
    array = weight.numpy()
    frozen = array.copy()
    frozen.flags.writeable = False
    forms = {
        "as it is": array,
        "Fortran": np.asfortranarray(array),
        "big-endian": array.astype(">f4"),
        "backwards": array[::-1, ::-1].copy()[::-1, ::-1],
        "read-only": frozen,
    }
    for layer in rmsgd.probe(forms).layers:
        assert_is_the_oracles(layer, weight)


def test_q_is_the_papers_equation_5_over_the_measured_layers():
    report = rmsgd.probe({"a": structured(20, 30), "b": torch.randn(20, 30), "c": torch.ones(5, 5).int()})
    q = [layer.quality for layer in report.layers if layer.skipped is None]
    assert len(q) == 2
    assert report.quality == pytest.approx(sum(x * x for x in q) / math.sqrt(2))


def test_a_report_equals_the_optimizers_which_looks_for_fewer_values():
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1), nn.Linear(16, 10))
    optimizer = rmsgd.RMSGD(network.named_parameters())
    optimizer.epoch_step()
    probed = rmsgd.probe(network)
    not_found = dict.fromkeys(OF_ALL_VALUES, math.nan)
    layers = tuple(dataclasses.replace(layer, **not_found) for layer in probed.layers)
    assert dataclasses.replace(probed, layers=layers) == optimizer.report()


def test_a_module_and_its_state_dict_have_the_same_report():
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Linear(16, 10))
    assert rmsgd.probe(network) == rmsgd.probe(network.state_dict())


def test_probing_changes_neither_weights_nor_gradients():
    network = nn.Linear(20, 30)
    before = network.weight.clone()
    rmsgd.probe(network)
    assert torch.equal(network.weight, before)
    assert network.weight.grad is None


# -- what is skipped, and why --------------------------------------------------------------------

SKIPPED = {
    "integers": (torch.ones(4, 4, dtype=torch.int8), "int8"),
    "booleans": (torch.ones(4, 4, dtype=torch.bool), "bool"),
    "packed": (torch.ones(4, 4, dtype=torch.uint8), "quantised or packed"),
    "complex": (torch.ones(4, 4, dtype=torch.complex64), "not real"),
    "sparse": (torch.eye(4).to_sparse(), "sparse"),
    "meta": (torch.empty(4, 4, device="meta"), "meta"),
    "nested": (lambda: torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)]), "nested"),
    "empty": (torch.empty(0, 4), "empty"),
    "one row": (torch.randn(1, 40), "no spectrum"),
    "six dimensions": (torch.randn(2, 2, 2, 2, 2, 2), "five dimensions"),
    "NaN": (torch.full((4, 4), math.nan), "NaN"),
    "infinite": (torch.full((4, 4), math.inf), "NaN or infinite"),
    "objects": (np.array([[{}, {}], [{}, {}]]), "object"),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", SKIPPED)
def test_what_cannot_be_measured_is_listed_with_the_reason(backend, kind):
    value, reason = SKIPPED[kind]
    value = value() if callable(value) else value
    report = rmsgd.probe({"odd": value, "good": torch.randn(6, 8)})
    odd, good = report.layers
    assert reason in odd.skipped
    assert math.isnan(odd.quality)
    assert odd.modes == odd.rank == odd.noise_variance == ()
    assert good.skipped is None
    assert report.errors == ()


def test_a_tied_weight_is_measured_once():
    network = nn.ModuleDict({"embed": nn.Embedding(50, 16), "head": nn.Linear(16, 50, bias=False)})
    network["head"].weight = network["embed"].weight
    for source in (network, network.state_dict()):
        embed, head = rmsgd.probe(source).layers
        assert embed.skipped is None
        assert head.skipped == "tied: the same memory as embed.weight"


def test_a_slice_and_the_transpose_of_another_weight_are_weights_of_their_own():
    both = torch.randn(8, 8)
    report = rmsgd.probe({"both": both, "first": both[:5], "transpose": both.t()})
    assert [layer.skipped for layer in report.layers] == [None, None, None]


def test_biases_and_norms_are_no_layers():
    network = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    network.again = network[1]  # tied ones neither
    assert [layer.name for layer in rmsgd.probe(network).layers] == ["0.weight"]


def test_a_lazy_module_and_a_buffer_are_listed():
    network = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    network.register_buffer("mask", torch.ones(4, 4))
    reasons = {layer.name: layer.skipped for layer in rmsgd.probe(network).layers}
    assert "not initialised" in reasons["0.weight"]
    assert reasons["1.weight"] is None
    assert "buffer" in reasons["mask"]


def test_a_source_of_another_kind_is_a_type_error():
    with pytest.raises(TypeError, match=r"source must be .* got int"):
        rmsgd.probe(3)


def test_a_source_without_weights_is_a_value_error():
    with pytest.raises(ValueError, match="no weights"):
        rmsgd.probe(nn.ReLU())


def test_a_mapping_that_holds_itself_is_a_value_error():
    source = {"w": torch.randn(4, 4)}
    source["model"] = source
    with pytest.raises(ValueError, match="holds itself"):
        rmsgd.probe(source)


def test_weights_nested_without_end_are_not_found():
    source = {"w": torch.randn(4, 4)}
    for _ in range(2000):
        source = {"model": source}
    with pytest.raises(ValueError, match="no weights"):
        rmsgd.probe(source)


def test_a_device_that_is_unknown_or_has_no_values_is_a_value_error():
    with pytest.raises(ValueError, match="device 'meta' is not available"):
        rmsgd.probe(nn.Linear(4, 4), device="meta")
    with pytest.raises(ValueError, match="device 'abacus' is not available"):
        rmsgd.probe({"w": torch.randn(4, 4)}, device="abacus")


# -- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (None, True),
        ("attn", True),
        ("*.attn.*", True),
        (["fc", "q_proj"], True),
        ("fc", False),
        ("attn.*", False),
    ],
)
def test_a_filter_is_a_part_of_the_name_or_a_shell_pattern(patterns, expected):
    assert Selection(filter=patterns).is_wanted("layers.3.attn.q_proj.weight") is expected


def test_a_filter_that_matches_nothing_says_so():
    with pytest.raises(ValueError, match="no layer's name matches 'conv'"):
        rmsgd.probe({"fc": torch.randn(4, 4)}, filter="conv")


def test_progress_goes_up_to_1(monkeypatch):
    monkeypatch.setattr("rmsgd.inspection.measuring.BATCH_BYTES", 1000)
    shares = []
    rmsgd.probe({str(i): torch.randn(20, 30) for i in range(6)}, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert len(shares) > 3


# -- the report ----------------------------------------------------------------------------------


@pytest.fixture
def report():
    return rmsgd.probe(
        {"conv": structured(20, 12, 3, 3), "fc<1>": structured(20, 30), "odd": torch.ones(2, 2).int()}
    )


def test_a_reports_dictionary_is_json_with_null_for_the_undefined(report):
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert list(content) == ["quality", "layers"]
    assert [list(layer) for layer in content["layers"]] == [FIELDS] * 3
    conv, _, odd = content["layers"]
    assert conv["modes"] == ["in", "out"]
    assert conv["shape"] == [20, 12, 3, 3]
    assert odd["quality"] is None
    assert odd["rank"] == []
    assert odd["skipped"]


def test_a_reports_csv_has_a_row_per_layer(report, tmp_path):
    report.to_csv(tmp_path / "report.csv")
    header, conv, *_, odd = (tmp_path / "report.csv").read_text().splitlines()
    assert header == ",".join(FIELDS)
    assert conv.startswith("conv,20x12x3x3,in;out,")
    assert odd.startswith('odd,2x2,,,,,,,,,,"int32: ')


def test_a_report_is_a_data_frame_where_pandas_is(report):
    pytest.importorskip("pandas")
    frame = report.to_pandas()
    assert list(frame.index) == ["conv", "fc<1>", "odd"]
    assert frame.loc["conv", "stable_rank"] == report.layers[0].stable_rank


def test_without_pandas_the_error_says_so(report, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pandas"):
        report.to_pandas()


def test_a_report_shows_itself_in_a_notebook(report):
    page = report._repr_html_()
    assert page.startswith("<table>")
    assert "fc&lt;1&gt;" in page
    assert "skipped: int32" in page


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_report_is_drawn(report, tmp_path, suffix):
    report.plot(tmp_path / f"report{suffix}")
    assert (tmp_path / f"report{suffix}").stat().st_size > 1000


def test_a_report_of_nothing_is_not_drawn(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        rmsgd.Report(()).plot(tmp_path / "report.png")


def test_the_figure_of_a_deep_network_has_a_line_for_every_layer(tmp_path):
    rmsgd.probe({f"blocks.{i}.fc.weight": torch.randn(6, 8) for i in range(200)}).plot(tmp_path / "deep.svg")
    drawn = (tmp_path / "deep.svg").read_text()
    assert all(f"blocks.{i}.fc " in drawn for i in (0, 57, 199))


# -- series and comparisons ----------------------------------------------------------------------


def test_a_series_follows_each_layer_through_its_checkpoints(report):
    other = rmsgd.probe({"module.conv": structured(20, 12, 3, 3), "new": structured(8, 9)})
    series = Series(("1", "2"), (report, other))
    assert list(series.by_layer()) == ["conv", "fc<1>", "new"]
    quality = series.values("quality")
    np.testing.assert_array_equal(
        quality,
        [
            [report.layers[0].quality, other.layers[0].quality],
            [report.layers[1].quality, np.nan],
            [np.nan, other.layers[1].quality],
        ],
    )
    assert [entry["source"] for entry in series.to_dict()["series"]] == ["1", "2"]
    assert Series(("1", "2"), (rmsgd.Report(()),) * 2).values("quality").shape == (0, 2)


def test_checkpoints_of_a_wildcard_come_in_order_of_training():
    assert in_order_of_training(["e1.pt", "e10.pt", "e2.pt"]) == ["e1.pt", "e2.pt", "e10.pt"]
    assert in_order_of_training(["last.pt", "first.pt"]) == ["last.pt", "first.pt"]


def test_checkpoints_are_labelled_by_what_tells_them_apart():
    assert checkpoint_labels(["run/epoch_10.pt", "run/epoch_12.pt"]) == ["10", "12"]
    assert checkpoint_labels(["run/first.pt", "run/last.pt"]) == ["first", "last"]
    assert checkpoint_labels(["run/model.pt"]) == ["model.pt"]


def test_layers_match_across_wrappers():
    assert comparable_name("module._orig_mod.block._orig_mod.conv.weight") == "block.conv.weight"


def test_a_layer_is_not_hidden_by_its_namesake_in_a_wrapper_of_the_same_checkpoint():
    both = {"fc.weight": structured(20, 30), "module.fc.weight": structured(20, 30)}
    report = rmsgd.probe(both)
    changes = Comparison(("a", "b"), report, report).changes()
    assert {change.name for change in changes} == set(both)
    assert set(Series(("1",), (report,)).by_layer()) == set(both)


def test_a_comparison_puts_the_largest_change_first_and_the_unpaired_last():
    stays, moves, goes = structured(20, 30), structured(20, 30), structured(8, 9)
    before = rmsgd.probe({"goes": goes, "stays": stays, "moves": moves})
    after = rmsgd.probe({"stays": stays, "moves": 0.1 * torch.randn(20, 30)})
    comparison = Comparison(("a", "b"), before, after)
    assert [change.name for change in comparison.changes()] == ["moves", "stays", "goes"]
    moved, stayed, gone = comparison.to_dict()["layers"]
    assert moved["change"]["quality"] == after.layers[1].quality - before.layers[2].quality
    assert stayed["change"]["quality"] == 0.0
    assert gone["after"] is None
    assert gone["change"]["quality"] is None


def test_low_rank_and_noise_add_up_to_the_weight():
    weight = structured(20, 30)
    low, noise = low_rank_and_noise(weight)
    np.testing.assert_allclose(low + noise, weight.double().numpy(), atol=1e-12)
    assert np.linalg.matrix_rank(low) == 2


@pytest.mark.gpu
def test_a_probe_on_the_gpu_agrees_with_that_on_the_cpu():
    weights = {"conv": structured(64, 32, 3, 3), "fc": structured(100, 200)}
    for ours, theirs in zip(
        rmsgd.probe(weights, device="cuda").layers, rmsgd.probe(weights).layers, strict=True
    ):
        assert ours.rank == theirs.rank
        assert ours.stable_rank == pytest.approx(theirs.stable_rank, rel=1e-5)
