"""The metrics of a whole spectrum: by hand, by a plain computation, and beside WeightWatcher's own."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import rmsgd
from rmsgd import reference
from rmsgd.integrations import log_dict
from rmsgd.layers import as_matrix, unfoldings


def hill(matrix):
    """The estimate as TempBalance writes it: ascending eigenvalues, the tail from the middle one on."""
    eigenvalues = np.sort(np.linalg.svd(matrix.double().numpy(), compute_uv=False) ** 2)
    middle = len(eigenvalues) // 2
    n = len(eigenvalues) - middle
    logs = np.log(eigenvalues)
    return 1.0 + n / (logs[middle:].sum() - n * logs[middle])


def test_the_stable_rank_and_norm_of_the_whole_weight_by_hand():
    gamma = np.array([10.0, 5.0, 5.0])
    assert reference.full_stable_rank(gamma) == 1.5
    assert reference.log_spectral_norm(gamma) == pytest.approx(2.0)
    assert math.isnan(reference.full_stable_rank(np.zeros(3)))
    assert math.isnan(reference.log_spectral_norm(np.zeros(3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["noise", "low rank", "strong mean", "outlier columns"])
def test_a_probe_finds_the_exponents_of_a_float64_svd(backend, kind, dtype):
    weight = torch.randn(60, 200)
    if kind == "low rank":
        weight += torch.randn(60, 3) @ torch.randn(3, 200)
    elif kind == "strong mean":
        weight += 5.0
    elif kind == "outlier columns":
        weight[:, ::40] *= 50.0
    weight = weight.to(dtype)
    (layer,) = rmsgd.probe({"layer": weight}).layers
    gamma = reference.singular_values(weight.double().numpy())
    assert layer.tail_exponent == pytest.approx(hill(weight), rel=1e-3)
    assert layer.full_stable_rank == pytest.approx(reference.full_stable_rank(gamma), rel=1e-5)
    assert layer.log_spectral_norm == pytest.approx(reference.log_spectral_norm(gamma), abs=1e-6)


def test_a_convolution_has_the_mean_over_its_unfoldings():
    kernel = torch.randn(24, 16, 3, 3)
    (layer,) = rmsgd.probe({"conv": kernel}).layers
    expected = np.mean([hill(as_matrix(kernel, u)) for u in unfoldings(kernel.shape)])
    assert layer.tail_exponent == pytest.approx(expected, rel=1e-3)


def test_a_low_rank_weight_has_no_tail():
    factors = torch.randint(-3, 4, (10, 3)).double(), torch.randint(-3, 4, (3, 12)).double()
    (layer,) = rmsgd.probe({"layer": factors[0] @ factors[1]}).layers
    assert math.isnan(layer.tail_exponent)


def test_an_undefined_or_infinite_exponent_is_null_and_breaks_no_view(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    weights = {"zero": torch.zeros(4, 5), "equal": torch.eye(6), "noise": torch.randn(8, 9)}
    report = rmsgd.probe(weights, include_buffers=True)
    exponents = {layer.name: layer.tail_exponent for layer in report.layers}
    assert math.isnan(exponents["zero"])
    assert exponents["equal"] > 1e6
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert found["layers"][0]["tail_exponent"] is None
    report.plot(tmp_path / "bars.png")
    report.to_csv(tmp_path / "layers.csv")
    assert "tail" in report._repr_html_()


def test_an_epoch_end_does_not_look_for_it():
    optimizer = rmsgd.RMSGD(nn.Linear(20, 30).named_parameters())
    optimizer.epoch_step()
    (layer,) = optimizer.report().layers
    assert math.isnan(layer.tail_exponent)
    assert not any(name.startswith("tail_exponent") for name in log_dict(optimizer))


def test_a_matrix_has_weightwatchers_stable_rank_and_log_spectral_norm():
    weightwatcher = pytest.importorskip("weightwatcher")
    model = nn.Sequential(nn.Linear(100, 80), nn.ReLU(), nn.Linear(80, 60))
    with torch.no_grad():
        model[0].weight += torch.randn(80, 2) @ torch.randn(2, 100)
    theirs = weightwatcher.WeightWatcher(model=model).analyze()
    ours = rmsgd.probe(model).layers
    assert len(theirs) == len(ours) == 2
    for layer, (_, row) in zip(ours, theirs.iterrows(), strict=True):
        assert layer.full_stable_rank == pytest.approx(row["stable_rank"], rel=1e-4)
        assert layer.log_spectral_norm == pytest.approx(row["log_spectral_norm"], abs=1e-4)
