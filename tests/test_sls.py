"""The stochastic line search takes the right step, which brings the decrease that it must."""

import math

import pytest
import torch

from bench import epoch_timing, training
from bench.data import registry
from bench.sls import SLS, TRIALS
from bench.study.config import RunConfig
from bench.study.run import Run


def quadratic(curvature, start, **settings):
    """f(w) = curvature w^2 / 2, its optimizer, and a function that takes one step and returns f before."""
    w = torch.tensor([float(start)], dtype=torch.float64, requires_grad=True)
    optimizer = SLS([w], **settings)

    def loss():
        return curvature * w.square().sum() / 2

    def step():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step(loss, value)
        return value.item()

    return w, optimizer, step


def test_the_first_step_that_decreases_enough_is_taken():
    # On curvature a, Armijo holds for eta <= 2 (1 - c) / a: 1.8 / 4 = .45. From 1: .9^8 = .43.
    w, optimizer, step = quadratic(4.0, 1.0, lr=1.0, gamma=1.0)
    step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.9**8)
    assert w.item() == pytest.approx(1 - 4 * 0.9**8)


def test_a_step_grows_by_gamma_in_one_epoch_at_most():
    _, optimizer, step = quadratic(1e-6, 1.0, lr=0.5, gamma=2.0, batches_per_epoch=10)
    for _ in range(10):
        step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1.0)
    for _ in range(100):
        step()
    assert optimizer.param_groups[0]["lr"] == 10.0


def growth_in_an_epoch(optimizer, steps):
    return optimizer.param_groups[0]["growth"] ** steps


def test_in_every_benchmark_an_epoch_is_as_many_steps_as_it_has_batches(tmp_path):
    settings = training.Settings(optimizers=("sls",), seeds=(0,), batch=100, width=0.25)
    ((trained,),) = training.prepare(settings)
    assert growth_in_an_epoch(trained._optimizer, len(trained._batches)) == pytest.approx(2)
    timed = epoch_timing.Settings("resnet14-digits", "digits", ("sls",), 100, 1, "cpu", 0.25, 1)
    work = epoch_timing.workload(timed)
    assert growth_in_an_epoch(epoch_timing.Case(timed, work, "sls")._optimizer, work.steps) == pytest.approx(
        2
    )
    config = RunConfig("resnet14-digits", "digits", "sls", batch=100, width=0.25)
    source = registry.source(config.dataset, None, config.network, torch.device("cpu"))
    studied = Run(config, source, tmp_path, torch.device("cpu"))
    assert growth_in_an_epoch(studied._optimizer, source.batches(config.batch)) == pytest.approx(2)


def test_every_step_keeps_the_armijo_condition():
    w, optimizer, step = quadratic(30.0, 2.0, batches_per_epoch=3)
    for _ in range(50):
        gradient = 30 * w.item()
        before = step()
        after = 15 * w.item() ** 2
        eta = optimizer.param_groups[0]["lr"]
        assert after <= before - 0.1 * eta * gradient**2 + 1e-15


def test_where_no_step_decreases_the_smallest_is_taken():
    w = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = SLS([w])
    w.grad = torch.ones_like(w)
    calls = []

    def rising():
        calls.append(w.item())
        return torch.tensor(2.0)

    optimizer.step(rising, torch.tensor(1.0))
    assert len(calls) == TRIALS
    assert w.item() == pytest.approx(1 - 1e-6, abs=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_moves_nothing(value):
    w = torch.ones(1, requires_grad=True)
    w.grad = torch.ones(1)
    SLS([w]).step(lambda: pytest.fail("no trial was to be made"), torch.tensor(value))
    assert w.item() == 1


def test_trials_share_their_dropout():
    w = torch.ones(8, requires_grad=True)
    w.grad = torch.ones(8)
    seen = []

    def noisy():
        seen.append(torch.rand(4))
        return torch.tensor(2.0 if len(seen) < 3 else 0.0)

    SLS([w]).step(noisy, torch.tensor(1.0))
    assert len(seen) == 3
    assert all(torch.equal(seen[0], draw) for draw in seen)


def test_its_state_goes_through_a_checkpoint():
    _, first, step = quadratic(4.0, 1.0)
    step()
    _, second, _ = quadratic(4.0, 1.0)
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["lr"] == first.param_groups[0]["lr"] != 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr must be positive"),
        ({"c": 1.0}, "c must be between 0 and 1"),
        ({"backtrack": 0.0}, "backtrack must be between 0 and 1"),
        ({"gamma": 0.5}, "gamma must be at least 1"),
        ({"batches_per_epoch": 0}, "batches_per_epoch must be positive"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SLS([torch.ones(1, requires_grad=True)], **settings)


def test_one_step_size_means_one_group():
    groups = [{"params": [torch.ones(1)]}, {"params": [torch.ones(1)]}]
    with pytest.raises(ValueError, match="one group"):
        SLS(groups)
