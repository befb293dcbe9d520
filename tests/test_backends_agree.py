"""Every backend gives the same noise variance, metrics and learning rates as the reference."""

import numpy as np
import pytest
import torch
from torch import nn

import rmsgd
from rmsgd import backends, reference
from rmsgd.backends.base import CONDITION_NUMBER, NOISE_VARIANCE, NUCLEAR, RANK, STABLE_RANK
from rmsgd.layers import as_matrix, unfoldings
from rmsgd.rules import RULES


def planted(shape, rank, seed, dtype=torch.float64, strength=1.0):
    """Noise and a low-rank part, as a trained weight has them."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape[0], int(np.prod(shape[1:]))
    u = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    v = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return ((noise + strength * u @ v) / 30).reshape(shape).to(dtype)


SHAPES = [
    (24, 16, 3, 3),
    (40, 20),
    (20, 70),
    (32, 16, 1, 1),
    (12, 8, 5),
    (8, 6, 3, 3, 3),
    (3, 64),
    (64, 3, 3, 3),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_measure_equals_the_reference_in_float64(backend, shape):
    weight = planted(shape, 3, seed=len(shape))
    matrices = [(weight, u) for u in unfoldings(shape)]
    table = backends.backend_for(weight.device).measure(matrices)
    for row, (_, u) in zip(table.tolist(), matrices, strict=True):
        gamma = np.linalg.svd(as_matrix(weight, u).numpy(), compute_uv=False)
        rank, variance, stable_rank, condition, nuclear = reference.measure_singular_values(gamma, u.L, u.M)
        assert row[RANK] == rank
        assert row[NOISE_VARIANCE] == pytest.approx(variance, rel=1e-9)
        assert row[STABLE_RANK] == pytest.approx(stable_rank, rel=1e-9)
        assert row[CONDITION_NUMBER] == pytest.approx(condition, abs=1e-9)
        assert row[NUCLEAR] == pytest.approx(nuclear, rel=1e-9)


def test_a_noise_variance_that_is_no_double_is_infinite(backend):
    weight = planted((24, 50), 3, seed=2)
    matrices = [(w, u) for w in (weight, 1e200 * weight) for u in unfoldings((24, 50))]
    one, huge = backends.backend_for(weight.device).measure(matrices)
    assert huge[RANK] == one[RANK] == 3
    assert huge[NOISE_VARIANCE] == float("inf")
    assert float(huge[STABLE_RANK]) == pytest.approx(float(one[STABLE_RANK]), rel=1e-9)


def test_noise_variance_of_a_spectrum_equals_the_reference(backend):
    rng = np.random.default_rng(1)
    for _ in range(60):
        L = int(rng.integers(2, 90))
        M = int(L * rng.uniform(1, 9))
        gamma = np.sort(rng.exponential(1.0, L) ** rng.uniform(0.3, 3))[::-1].copy()
        row = backends.backend_for(torch.device("cpu")).measure_spectrum(torch.from_numpy(gamma), M)
        expected = reference.measure_singular_values(gamma, L, M)
        assert row[RANK] == expected[0]
        assert float(row[NOISE_VARIANCE]) == pytest.approx(expected[1], rel=1e-9)


def trained_rates(rule):
    torch.manual_seed(11)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(576, 10),
    ).double()
    optimizer = rmsgd.RMSGD(model.named_parameters(), lr=0.03, rule=rule, step_size=4, gamma=0.9)
    images, labels = torch.randn(64, 1, 8, 8, dtype=torch.float64), torch.randint(0, 10, (64,))
    for _ in range(20):
        for at in range(0, 64, 16):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[at : at + 16]), labels[at : at + 16]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        optimizer.epoch_step()
    return optimizer.learning_rates()


@pytest.mark.parametrize("rule", RULES)
def test_learning_rates_after_20_epochs_of_training_agree(backend, rule, monkeypatch):
    ours = trained_rates(rule)
    monkeypatch.setenv("RMSGD_BACKEND", "reference")
    expected = trained_rates(rule)
    assert ours.keys() == expected.keys()
    for name, rate in ours.items():
        assert rate == pytest.approx(expected[name], rel=1e-6), name


def test_an_unknown_backend_is_named(monkeypatch):
    monkeypatch.setenv("RMSGD_BACKEND", "fortran")
    with pytest.raises(ValueError, match=r"RMSGD_BACKEND=fortran is unknown; choose one of native, numba"):
        rmsgd.RMSGD([nn.Parameter(torch.zeros(3))]).step()
