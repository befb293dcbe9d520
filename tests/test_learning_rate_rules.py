"""The three learning-rate rules, against numbers worked out by hand and against rmsgd 1.0.2."""

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import nn

import rmsgd
from bench.peers import load_rmsgd_1_0_2
from rmsgd import reference
from rmsgd.backends.base import FIELDS, RateGroup, RateTables
from rmsgd.rules import RULES, update_rates


def rates(rule, measured, groups=None, *, layers=2, gamma=1.0, step_size=None, zeta=1.0, **options):
    """eta of every layer after each epoch end, by the reference, from the measurements s(1), s(2), ..."""
    options = {"lr": 0.03, "beta": 0.98, "floor": 0.0} | options
    lr0, rule = options["lr"], RULES[rule]
    no_followers = torch.zeros(0, dtype=torch.int32)
    tables = RateTables(
        parameter=torch.arange(layers, dtype=torch.int32),
        group=torch.zeros(layers, dtype=torch.int32),
        spectrum_begin=torch.arange(layers + 1, dtype=torch.int32),
        weight=torch.ones(layers, dtype=torch.float64),
        stable_rank=torch.zeros(layers, dtype=torch.float64),
        ready=torch.zeros(layers, dtype=torch.int32),
        unbounded=torch.full((layers,), lr0, dtype=torch.float64),
        eta=torch.full((layers,), lr0, dtype=torch.float64),
        follower=no_followers,
        leader=no_followers,
        follower_group=no_followers,
    )
    history = []
    for t, now in enumerate(measured):
        decay = gamma if step_size and t and t % step_size == 0 else 1.0
        numbers = (lr0, options["beta"], zeta, decay, options["floor"])
        bounds = (rule.anchor * lr0, rule.lowest * lr0, rule.highest * lr0)
        group = RateGroup(*numbers, *bounds, rule.column, rule.holds, rule.number, t == 0)
        metrics = torch.zeros(layers, FIELDS, dtype=torch.float64)
        metrics[:, rule.column] = torch.tensor(now, dtype=torch.float64)
        update_rates(tables, [group], metrics)
        zeta *= decay
        history.append(tables.eta.numpy().copy())
    return np.array(history)


def test_paper_is_algorithm_1_worked_out_by_hand():
    # Layer 1: s = 0, .2, .25, .24   .98*.03 + .2 = .2294, .98*.2294 + .05 = .274812, then -.01
    # Layer 2: stays empty:          .0294, .028812, .02823576
    history = rates("paper", [(0.2, 0.0), (0.25, 0.0), (0.24, 0.0)])
    expected = [[0.2294, 0.0294], [0.274812, 0.028812], [0.25931576, 0.02823576]]
    np.testing.assert_allclose(history, expected, rtol=1e-14)


def test_paper_multiplies_rate_and_gain_by_gamma_every_step_size_epochs():
    # t = 2 decays (gamma .5): .98 * .5 * eta(2) + .5 * (s(3) - s(2))
    history = rates("paper", [(0.2,), (0.3,), (0.4,)], layers=1, gamma=0.5, step_size=2)
    np.testing.assert_allclose(history[1], 0.98 * 0.2294 + 0.1, rtol=1e-14)
    np.testing.assert_allclose(history[2], 0.49 * 0.324812 + 0.05, rtol=1e-14)


def test_paper_floors_the_rate_at_min_lr():
    assert rates("paper", [(0.5,), (0.0,)], layers=1, beta=0.5, floor=1e-4)[-1] == 1e-4


def test_release_starts_at_one_plus_beta_and_holds_layers_that_are_still_empty():
    # The first call discards s(1): (1 + .98) .03 = .0594. An empty layer is then set back to .03.
    history = rates("release", [(0.1, 0.0), (0.15, 0.0), (0.13, 0.0)])
    np.testing.assert_allclose(history[0], [0.0594, 0.0594], rtol=1e-14)
    # Layer 1 becomes ready at the second call, and the walk skips layer 2 once: beta .0594 = .058212.
    np.testing.assert_allclose(history[1], [0.98 * 0.0594 + 0.05, 0.058212], rtol=1e-14)
    np.testing.assert_allclose(history[2], [0.98 * 0.108212 - 0.02, 0.03], rtol=1e-12)


def test_release_never_goes_below_zero():
    history = rates("release", [(0.5,), (0.5,), (0.0,)], layers=1)
    assert history[-1] == 0.0


def test_published_first_gives_lr_and_decays_the_gain_alone():
    # lr_1 = lr; eta_2 = .98 * .03 + gamma zeta (s2 - s1), the rate itself not multiplied by gamma.
    history = rates("published", [(0.1,), (0.2,), (0.2,)], layers=1, gamma=0.98, step_size=1)
    np.testing.assert_allclose(history[0], 0.03, rtol=1e-14)
    np.testing.assert_allclose(history[1], 0.98 * 0.03 + 0.98 * 0.1, rtol=1e-14)
    np.testing.assert_allclose(history[2], 0.98 * (0.0294 + 0.098), rtol=1e-14)


def test_published_holds_without_dividing_by_zeta():
    # zeta after one decay is .5; the hold adds .25 (.03 - .98 eta) where the release would restore .03.
    history = rates("published", [(0.0,), (0.0,), (0.0,)], layers=1, gamma=0.5, step_size=1)
    eta = 0.98 * 0.03 + 0.5 * (0.03 - 0.98 * 0.03)
    np.testing.assert_allclose(history[1], eta, rtol=1e-14)
    np.testing.assert_allclose(history[2], 0.98 * eta + 0.25 * (0.03 - 0.98 * eta), rtol=1e-14)


def test_published_never_goes_below_1e_10():
    model = nn.Conv2d(8, 16, 3)
    optimizer = rmsgd.RMSGD(model.parameters(), lr=0.03, rule="published", linear=False)
    nn.init.orthogonal_(model.weight)  # as many dimensions as there can be
    optimizer.epoch_step()
    nn.init.zeros_(model.weight)
    optimizer.epoch_step()
    optimizer.epoch_step()
    assert min(optimizer.learning_rates().values()) >= 1e-10


def network():
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def grow(model, epoch):
    """Move every weight as training does: noise, and a low-rank part that grows."""
    generator = torch.Generator().manual_seed(epoch)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim < 2:
                continue
            flat = p.view(p.shape[0], -1)
            u = torch.randn(flat.shape[0], 2, generator=generator)
            v = torch.randn(2, flat.shape[1], generator=generator)
            flat += 0.02 * (u @ v) + 0.002 * torch.randn(flat.shape, generator=generator)


def exact_minimise_scalar(function, args, bounds, **_):
    """1.0.2's search, replaced by our exact minimiser: same arguments, same result type."""
    L, M, s, residual, _ = args
    assert residual == 0.0
    _, variance, _ = reference.minimise_free_energy(np.asarray(s, dtype=np.float64) ** 2 / M, int(L), int(M))
    return scipy.optimize.OptimizeResult(x=variance, success=True)


@pytest.mark.parametrize("options", [{}, {"gamma": 0.9, "step_size": 2}])
def test_release_reproduces_rmsgd_1_0_2_over_15_epochs(monkeypatch, options):
    peer = load_rmsgd_1_0_2()
    model = network()
    factorisation = __import__(f"{peer.__name__}.matrix_factorization", fromlist=["x"])
    monkeypatch.setattr(factorisation, "minimize_scalar", exact_minimise_scalar, raising=True)

    theirs = peer.RMSGD(model.parameters(), lr=0.03, beta=0.98, linear=True, **options)
    ours = rmsgd.RMSGD(model.parameters(), lr=0.03, beta=0.98, rule="release", **options)
    for epoch in range(15):
        if epoch > 1:  # the first epochs find every layer empty: not_ready holds them
            grow(model, epoch)
        theirs.epoch_step()
        ours.epoch_step()
        np.testing.assert_allclose(list(ours.learning_rates().values()), theirs.lr_vector, rtol=1e-6)


@pytest.mark.parametrize("rule", ["bounded", "paper", "release", "published"])
def test_rates_stay_numbers_where_the_product_of_all_gammas_is_too_small_for_one(rule):
    model = torch.nn.Linear(20, 30)
    optimizer = rmsgd.RMSGD(model.parameters(), lr=0.03, rule=rule, step_size=1, gamma=1e-200)
    for _ in range(5):
        optimizer.epoch_step()
    assert np.isfinite(list(optimizer.learning_rates().values())).all()
    again = rmsgd.RMSGD(model.parameters(), lr=0.03, rule=rule)
    again.load_state_dict(optimizer.state_dict())
    assert again.learning_rates() == optimizer.learning_rates()
