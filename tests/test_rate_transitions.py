"""Rates that move to new ones in a number of the optimizer's steps: the ratio of every step, by hand."""

import io
from dataclasses import replace

import pytest
import torch
from test_layer_rates import LR, gradients, network
from torch import nn

import rmsgd
from rmsgd.tail_rules import LLR

NAMES = ("0.weight", "3.weight")


def given(*ratios):
    """A rule that gives the first layer these ratios, one after the other, and the second layer always 1."""
    left = iter(ratios)
    return lambda report: {NAMES[0]: next(left), NAMES[1]: 1.0}


def make(rule, **options):
    model = network()
    optimizer = torch.optim.SGD(rmsgd.layer_groups(model.named_parameters()), lr=LR)
    return model, optimizer, rmsgd.LayerRates(optimizer, rule, **options)


def taken(model, optimizer, rates, count):
    """The ratios of the first layer in so many steps. Those that ``learning_rates`` tells are the same."""
    found = []
    for step in range(count):
        gradients(model, step)
        told = rates.learning_rates()
        seen = []
        optimizer.step(lambda seen=seen: seen.append([g["lr"] for g in optimizer.param_groups]) or 0.0)
        assert seen[0] == pytest.approx([told[name] for name in NAMES])
        assert told["0.bias"] == told["1.weight"] == told[NAMES[0]]
        assert told[NAMES[1]] == pytest.approx(LR)
        found.append(seen[0][0] / LR)
    return found


def test_the_ratio_of_every_step_is_the_one_computed_by_hand():
    job = make(given(3.0, 1.0), transition=4)
    assert taken(*job, 2) == pytest.approx([1.0, 1.0])
    job[-1].step()
    assert taken(*job, 6) == pytest.approx([1.5, 2.0, 2.5, 3.0, 3.0, 3.0])
    job[-1].step()
    assert taken(*job, 5) == pytest.approx([2.5, 2.0, 1.5, 1.0, 1.0])


def test_a_measurement_on_the_way_goes_on_from_the_rate_of_the_last_step():
    job = make(given(3.0, 5.0), transition=4)
    job[-1].step()
    assert taken(*job, 2) == pytest.approx([1.5, 2.0])
    job[-1].step()
    assert taken(*job, 4) == pytest.approx([2.75, 3.5, 4.25, 5.0])


def test_without_a_transition_new_ratios_hold_at_once():
    for options in ({}, {"transition": 0}):
        job = make(given(3.0, 5.0), **options)
        job[-1].step()
        assert taken(*job, 2) == pytest.approx([3.0, 3.0])
        job[-1].step()
        assert taken(*job, 1) == pytest.approx([5.0])


def test_llr_takes_half_of_the_steps_between_two_measurements():
    rule = given(3.0, 1.0, 5.0)
    rule.gradual = LLR.gradual
    job = make(rule)
    job[-1].step()  # before the training there is nothing to come from
    assert taken(*job, 4) == pytest.approx([3.0] * 4)
    job[-1].step()
    assert taken(*job, 6) == pytest.approx([2.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    job[-1].step()
    assert taken(*job, 4) == pytest.approx([1 + 4 / 3, 1 + 8 / 3, 5.0, 5.0])


@pytest.mark.parametrize("rule", [replace(LLR, least_values=0), "tempbalance", "rank-momentum"])
def test_only_llr_is_gradual_by_itself(rule):
    model, optimizer, rates = make(rule)
    for step in range(8):
        if step % 4 == 0:
            with torch.no_grad():
                model[0].weight[0] += step
            rates.step()
            steps = rates.state_dict()["transition"]["steps"]
            assert steps == (2 if step and rule not in ("tempbalance", "rank-momentum") else 0)
        gradients(model, step)
        optimizer.step()


def test_rank_momentum_may_be_gradual_too_and_a_scheduler_acts_on_top():
    model, optimizer, rates = make("rank-momentum", transition=2)
    gradients(model, 0)
    optimizer.step()  # measures s(0)
    with torch.no_grad():
        model[0].weight[0] += 3.0
    rates.step()
    first = rates.learning_rates()[NAMES[0]] / LR
    gradients(model, 1)
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = LR / 2
    second = rates.learning_rates()[NAMES[0]] / (LR / 2)
    assert first != pytest.approx(1.0)
    assert second - 1.0 == pytest.approx(2 * (first - 1.0))


@pytest.mark.parametrize("stop", [0, 1, 3, 5])
def test_a_checkpoint_on_the_way_goes_on_from_there(stop):
    whole, first, second = (make(given(3.0, 5.0), transition=4) for _ in range(3))
    for job in (whole, first):
        job[-1].step()
    expected = taken(*whole, 6)
    begun = taken(*first, stop)
    file = io.BytesIO()
    torch.save(first[-1].state_dict(), file)
    file.seek(0)
    second[-1].load_state_dict(torch.load(file, weights_only=True))
    assert second[-1].learning_rates() == first[-1].learning_rates()
    assert begun + taken(*second, 6 - stop) == pytest.approx(expected)
    assert second[-1].state_dict() == whole[-1].state_dict()


def test_a_group_that_joins_on_the_way_has_its_ratio_at_once():
    _, optimizer, rates = make(given(3.0), transition=4)
    rates.step()
    joined = nn.Linear(6, 6)
    optimizer.add_param_group({"params": [("more", joined.weight)]})
    assert rates.learning_rates()["more"] == pytest.approx(LR)
    assert rates.learning_rates()[NAMES[0]] == pytest.approx(1.5 * LR)


@pytest.mark.parametrize("transition", [-1, 1.5, True, "4"])
def test_a_number_of_steps_that_is_none_is_refused(transition):
    with pytest.raises(ValueError, match="transition must be a whole number of steps from 0 on"):
        make("llr", transition=transition)
