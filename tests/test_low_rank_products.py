"""A product of low rank is a weight of that rank, whatever its dtype rounds, and noise stays noise."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import rmsgd
from rmsgd import reference
from rmsgd.element_types import rounding
from rmsgd.layers import as_matrix, unfoldings
from rmsgd.metrics import METRICS

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def product(shape, rank, dtype, seed=0):
    """A product of Gaussian factors, computed in float32 (float64 for float64) and stored in the dtype."""
    torch.manual_seed(seed)
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    o, i, *k = shape
    columns = i * int(np.prod(k))
    left, right = torch.randn(o, rank, dtype=arithmetic), torch.randn(rank, columns, dtype=arithmetic)
    return (left @ right).reshape(shape).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 4, 17])
@pytest.mark.parametrize("shape", [(64, 64), (64, 576), (200, 50), (128, 300)], ids=str)
def test_a_product_has_its_rank_no_noise_and_the_metrics_of_its_values(shape, rank, dtype):
    weight = product(shape, rank, dtype, seed=rank)
    [layer] = rmsgd.probe({"w": weight}).layers
    gamma = np.linalg.svd(weight.double().numpy(), compute_uv=False)[:rank]
    assert layer.rank == (rank,)
    assert layer.noise_variance == (0.0,)
    assert layer.stable_rank == pytest.approx((gamma**2).sum() / (min(shape) * gamma[0] ** 2), rel=1e-5)
    assert layer.condition_number == pytest.approx(1.0 - gamma[-1] / gamma[0], abs=1e-5)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_backend_and_evbmf_find_the_rank_of_a_product(backend, dtype):
    weight = product((40, 90), 3, dtype)
    [layer] = rmsgd.probe({"w": weight}).layers
    found = rmsgd.evbmf(weight, vectors=True)
    assert layer.rank == (found.rank,) == (3,)
    assert layer.noise_variance == (found.noise_variance,) == (0.0,)
    rebuilt = found.U * found.singular_values @ found.Vh
    size = float(weight.double().abs().max())
    assert float((rebuilt - weight.double()).abs().max()) < max(4.0 * rounding(dtype), 1e-13) * size


def test_the_optimizer_measures_a_product_as_the_probe_does():
    layer = nn.Linear(90, 40)
    with torch.no_grad():
        layer.weight.copy_(product((40, 90), 3, torch.float32))
    optimizer = rmsgd.RMSGD(layer.named_parameters())
    optimizer.epoch_step()
    (measured,), (probed,) = optimizer.report().layers, rmsgd.probe(layer).layers
    of_all_values = {metric.name: math.nan for metric in METRICS if metric.of_values is not None}
    assert measured == replace(probed, **of_all_values)  # which an epoch end does not look for
    assert measured.rank == (3,)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_rank_of_a_product_does_not_depend_on_its_size(scale):
    assert rmsgd.probe({"w": product((48, 80), 5, torch.float32) * scale}).layers[0].rank == (5,)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_noise_above_the_rounding_is_noise_however_small(dtype):
    noise = 32.0 * rounding(dtype)
    torch.manual_seed(0)
    low = torch.randn(60, 2, dtype=torch.float64) @ torch.randn(2, 100, dtype=torch.float64)
    weight = (low + noise * torch.randn(60, 100, dtype=torch.float64)).to(dtype)
    [layer] = rmsgd.probe({"w": weight}).layers
    assert layer.rank == (2,)
    assert layer.noise_variance[0] == pytest.approx(noise**2, rel=0.2)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_weights_of_full_rank_are_measured_as_without_the_dtypes_rounding(dtype):
    torch.manual_seed(0)
    # Initial weights, and some that training has drawn out to a power law and to large means.
    weights = [nn.Conv2d(16, 32, 3).weight.detach(), nn.Linear(64, 64).weight.detach()]
    u, _, v = torch.linalg.svd(torch.randn(64, 100), full_matrices=False)
    weights += [u * torch.arange(1.0, 65.0) ** -p @ v for p in (0.5, 1.0)]
    weights += [torch.randn(64, 64) + 3.0]
    for weight in (w.to(dtype) for w in weights):
        for unfolding in unfoldings(weight.shape):
            matrix = as_matrix(weight, unfolding).double().numpy()
            exact = reference.singular_values(matrix)
            assert (reference.singular_values(matrix, rounding(dtype)) == exact).all()


def test_a_product_of_more_than_half_the_rank_is_no_weight_of_low_rank():
    [layer] = rmsgd.probe({"w": product((64, 64), 40, torch.float32)}).layers
    assert layer.noise_variance[0] > 0.0
    assert layer.rank[0] < 32
