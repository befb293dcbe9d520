"""A checkpoint carries everything a run needs to go on, and nothing that is not a number."""

import io
import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from matrices import planted
from torch import nn

import rmsgd
from bench import peers
from rmsgd.rules import RULES


def network(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 3))
    return planted(model).to(dtype)


def step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    p = next(model.parameters())
    optimizer.zero_grad()
    model(torch.randn(8, 2, 4, 4, generator=generator).to(p)).square().mean().backward()
    optimizer.step()


def run(model, optimizer, begin, end, epoch=4):
    """Take the steps from begin to end, with an epoch end after every fourth."""
    for t in range(begin, end):
        step(model, optimizer, t)
        if isinstance(optimizer, rmsgd.RMSGD) and (t + 1) % epoch == 0:
            optimizer.epoch_step()


def saved(state_dict, **kwargs):
    """The state_dict after it was saved to a file and loaded."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, **kwargs)


def size(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    return len(file.getbuffer())


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def identical(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def state_of(optimizer):
    """A copy of everything the optimizer holds, to compare with later."""
    return deepcopy(optimizer.state_dict())


def unchanged(optimizer, before):
    after = optimizer.state_dict()
    for key, state in before["state"].items():
        for name, value in state.items():
            now = after["state"][key][name]
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, now)
            else:
                assert value == now or (math.isnan(value) and math.isnan(now))
    assert after["param_groups"] == before["param_groups"]


def test_the_state_is_tensors_and_plain_numbers():
    model = network()
    optimizer = rmsgd.RMSGD(model.named_parameters(), initial_rank="measure", step_size=2, gamma=0.9)
    run(model, optimizer, 0, 9)
    state_dict = saved(optimizer.state_dict(), weights_only=True)
    for state in state_dict["state"].values():
        assert all(type(value) in (torch.Tensor, float, int, bool) for value in state.values())
    for group in state_dict["param_groups"]:
        values = [v for k, v in group.items() if k not in ("params", "param_names")]
        assert all(isinstance(value, (float, int, str, type(None))) for value in values)


def test_options_and_schedules_of_numpy_numbers_are_stored_as_plain_ones():
    model = network()
    options = {"lr": 0.1, "gamma": 0.5, "weight_decay": 1e-4}
    numbers = {name: np.float64(value) for name, value in options.items()}
    optimizer = rmsgd.RMSGD(model.parameters(), step_size=np.int64(1), nesterov=np.bool_(True), **numbers)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: np.exp(-epoch))
    for _ in range(3):
        optimizer.epoch_step()
        schedule.step()
    state_dict = saved(optimizer.state_dict(), weights_only=True)
    assert state_dict["param_groups"][0]["lr"] == pytest.approx(0.1 * math.exp(-3))
    assert state_dict["param_groups"][0]["step_size"] == 1
    assert state_dict["state"][0]["decay"] == 0.25


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_checkpoint_is_hardly_larger_than_sgds(momentum):
    torch.manual_seed(0)
    blocks = [nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)]
    model = nn.Sequential(*(deepcopy(blocks[i % 2]) for i in range(80)))
    frozen = [model[0].weight, model[3].bias]
    for p in frozen:
        p.requires_grad_(False)
    ours = rmsgd.RMSGD(model.parameters(), momentum=momentum)
    theirs = torch.optim.SGD(model.parameters(), lr=0.03, momentum=momentum)
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    for optimizer in (ours, theirs):
        optimizer.step()
    ours.epoch_step()
    count = sum(1 for _ in model.parameters())
    assert size(ours.state_dict()) <= 1.01 * size(theirs.state_dict()) + 64 * count


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_run_resumed_at_any_step_goes_on_bit_for_bit(rule, dtype):
    options = dict(rule=rule, step_size=1, gamma=0.9, initial_rank="measure", nesterov=True)
    model = network(dtype)
    optimizer = rmsgd.RMSGD(model.named_parameters(), **options)
    stops = {}
    for t in range(12):
        run(model, optimizer, t, t + 1)
        stops[t + 1] = saved((model.state_dict(), optimizer.state_dict()))
    expected, rates = weights(model), optimizer.learning_rates()
    for t, (model_state, optimizer_state) in stops.items():
        other = network(dtype)
        other.load_state_dict(model_state)
        resumed = rmsgd.RMSGD(other.named_parameters())
        resumed.load_state_dict(optimizer_state)
        run(other, resumed, t, 12)
        assert identical(weights(other), expected), t
        assert resumed.learning_rates() == rates


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_velocities_and_rates_keep_their_precision_beside_half_precision_weights(dtype):
    model = network(dtype)
    optimizer = rmsgd.RMSGD(model.named_parameters(), lr=0.0301)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.epoch_step()
    before = state_of(optimizer)
    other = rmsgd.RMSGD(model.named_parameters())
    other.load_state_dict(saved(before))
    for p in model.parameters():
        velocity = other.state[p]["velocity"]
        assert velocity.dtype == torch.float32
        assert not torch.equal(velocity, velocity.to(dtype).float())
    unchanged(other, before)


def test_a_loaded_checkpoint_is_copied():
    model = network()
    optimizer = rmsgd.RMSGD(model.parameters())
    run(model, optimizer, 0, 2)
    checkpoint = optimizer.state_dict()
    others = network()
    other = rmsgd.RMSGD(others.parameters())
    other.load_state_dict(checkpoint)
    before = checkpoint["state"][0]["velocity"].clone()
    run(others, other, 2, 4)
    assert torch.equal(checkpoint["state"][0]["velocity"], before)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "flags",
    [
        {"momentum": 0.9, "weight_decay": 1e-2},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "dampening": 0.5, "maximize": True},
        {"momentum": 0.0},
    ],
)
def test_a_checkpoint_of_sgd_loads_and_the_next_step_is_sgds(rule, flags):
    model = network(torch.float64)
    sgd = torch.optim.SGD(model.named_parameters(), lr=0.1, **flags)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.7)
    run(model, sgd, 0, 3)
    scheduler.step()
    other = deepcopy(model)
    ours = rmsgd.RMSGD(other.named_parameters(), lr=0.03, rule=rule, beta=0.5)
    ours.load_state_dict(saved(sgd.state_dict()))
    group = ours.param_groups[0]
    assert (group["lr"], group["beta"], group["rule"]) == (0.1 * 0.7, 0.5, rule)
    assert set(ours.learning_rates().values()) == {0.1 * 0.7}
    for t in (3, 4):
        step(model, sgd, t)
        step(other, ours, t)
    for a, b in zip(weights(other), weights(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)
    ours.epoch_step()


def test_past_gradients_of_half_precision_become_a_velocity_in_single():
    p = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    p.grad = torch.randn_like(p)
    sgd = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    sgd.step()
    optimizer = rmsgd.RMSGD([p])
    optimizer.load_state_dict(sgd.state_dict())
    torch.testing.assert_close(optimizer.state[p]["velocity"], -0.1 * p.grad.float(), rtol=1e-6, atol=0.0)


def test_parameters_of_sgd_that_never_had_a_gradient_begin_afresh():
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    sgd.step()
    ours = rmsgd.RMSGD(model.parameters())
    ours.load_state_dict(sgd.state_dict())
    fresh = [state["fresh"] for state in ours.state_dict()["state"].values()]
    assert fresh == [False] + [True] * 5


def test_a_schedule_that_ends_below_zero_by_a_rounding_leaves_a_checkpoint_that_loads():
    model = network()
    ours = rmsgd.RMSGD(model.named_parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(ours, 1 / 3, 0.0, total_iters=4)
    for i in range(4):
        step(model, ours, i)
        scheduler.step()
    assert -1e-15 < ours.param_groups[0]["lr"] < 0.0
    other = rmsgd.RMSGD(model.named_parameters())
    other.load_state_dict(ours.state_dict())
    assert other.learning_rates() == ours.learning_rates()


def test_a_checkpoint_of_sgd_whose_schedule_ended_at_zero_loads():
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run(model, sgd, 0, 1)
    sgd.param_groups[0]["lr"] = 0.0
    ours = rmsgd.RMSGD(model.parameters(), lr=0.03)
    ours.load_state_dict(sgd.state_dict())
    assert set(ours.learning_rates().values()) == {0.0}
    ours.param_groups[0]["lr"] = 0.03
    assert set(ours.learning_rates().values()) == {0.03}


@pytest.mark.parametrize(
    ("before", "after"),
    [("paper", "release"), ("release", "paper"), ("bounded", "release"), ("release", "bounded")],
)
def test_past_gradients_change_their_form_with_the_rule(before, after):
    model = network(torch.float64)
    optimizer = rmsgd.RMSGD(model.parameters(), rule=before)
    run(model, optimizer, 0, 3)
    other = deepcopy(model)
    twin = rmsgd.RMSGD(other.parameters(), rule=before)
    twin.load_state_dict(saved(optimizer.state_dict()))
    twin.param_groups[0]["rule"] = after
    for one in (optimizer, twin):  # a schedule does the same
        one.param_groups[0]["lr"] *= 0.5
    step(model, optimizer, 3)
    step(other, twin, 3)
    for a, b in zip(weights(other), weights(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)
    keys = {key for state in twin.state.values() for key in state}
    assert ("velocity" in keys) == (after != "release")
    assert ("momentum_buffer" in keys) == (after == "release")


def test_a_velocity_at_rate_zero_tells_no_past_gradients_and_another_rule_begins_afresh():
    model = network()
    optimizer = rmsgd.RMSGD(model.parameters())
    run(model, optimizer, 0, 3)
    optimizer.param_groups[0].update(rule="release", lr=0.0)
    before = weights(model)
    step(model, optimizer, 3)
    assert all(map(torch.equal, weights(model), before))
    assert torch.equal(optimizer.state[model[0].weight]["momentum_buffer"], model[0].weight.grad)


def test_a_buffer_that_is_none_as_older_torch_wrote_it_is_none_at_all():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    sgd = torch.optim.SGD([p], lr=0.1)
    sgd.state[p]["momentum_buffer"] = None
    optimizer = rmsgd.RMSGD([p], rule="release")
    optimizer.load_state_dict(sgd.state_dict())
    assert "momentum_buffer" not in optimizer.state_dict()["state"][0]


def test_one_of_rmsgd_1_0_2_is_refused_with_the_reason():
    try:
        release = peers.load_rmsgd_1_0_2()
    except peers.PeerUnavailableError as error:
        pytest.skip(str(error))
    model = network()
    theirs = release.RMSGD(model.parameters(), lr=0.03, momentum=0.9)
    step(model, theirs, 0)
    theirs.epoch_step()
    ours = rmsgd.RMSGD(model.parameters())
    before = state_of(ours)
    with pytest.raises(ValueError, match=r"written by rmsgd 1\.0\.2.*initial_rank='measure'"):
        ours.load_state_dict(theirs.state_dict())
    unchanged(ours, before)


def grown():
    """A network with another last layer and one more."""
    model = network()
    model[3] = nn.Linear(32, 5)
    model.append(nn.Linear(5, 2))
    return model


@pytest.mark.parametrize(
    ("other", "named", "message"),
    [
        (
            grown,
            True,
            r"groups of \[8\] parameters, the optimizer of \[6\].*missing.*none; unexpected: 4.bias",
        ),
        (grown, False, r"groups of \[8\] parameters, the optimizer of \[6\]"),
        (lambda: network()[:3], True, r"missing in the checkpoint: 3.bias, 3.weight; unexpected: none"),
        (lambda: grown()[:4], True, r"shapes differ.*3.weight is \(3, 32\), its velocity \(5, 32\), 3.bias"),
        (lambda: grown()[:4], False, r"shapes differ.*0.4 is \(3, 32\), its velocity \(5, 32\)"),
    ],
)
def test_other_parameters_are_named_and_nothing_changes(other, named, message):
    def make(model):
        return rmsgd.RMSGD(model.named_parameters() if named else model.parameters())

    model, theirs = network(), make(other())
    ours = make(model)
    run(model, ours, 0, 5)
    before = state_of(ours)
    with pytest.raises(ValueError, match=message):
        ours.load_state_dict(theirs.state_dict())
    unchanged(ours, before)
    step(model, ours, 6)


def test_the_same_parameters_in_another_order_are_refused():
    model = network()
    named = list(model.named_parameters())
    theirs = rmsgd.RMSGD(named[2:] + named[:2])
    ours = rmsgd.RMSGD(named)
    with pytest.raises(ValueError, match=r"lists 1.weight where the optimizer has 0.weight"):
        ours.load_state_dict(theirs.state_dict())
    prefixed = rmsgd.RMSGD([(f"module.{name}", p) for name, p in named])
    ours.load_state_dict(prefixed.state_dict())


def test_an_order_that_differs_is_seen_beside_a_group_without_names():
    def make(first):
        optimizer = rmsgd.RMSGD([(name, nn.Parameter(torch.zeros(3))) for name in first])
        optimizer.add_param_group({"params": [("c", nn.Parameter(torch.zeros(3)))]})
        return optimizer

    state_dict = make(["b", "a"]).state_dict()
    del state_dict["param_groups"][1]["param_names"]
    with pytest.raises(ValueError, match="lists b where the optimizer has a"):
        make(["a", "b"]).load_state_dict(state_dict)


def test_state_of_parameters_in_no_group_is_refused():
    ours = rmsgd.RMSGD(network().parameters())
    state_dict = ours.state_dict()
    state_dict["state"][17] = {"rate": 0.1}
    with pytest.raises(ValueError, match="state for parameters in none of its groups: 17"):
        ours.load_state_dict(state_dict)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "Adagrad", "Rprop", "ASGD", "LBFGS", "NAdam"])
def test_another_optimizers_checkpoint_is_refused_before_its_first_step_too(name):
    model = nn.Linear(4, 3)
    other = getattr(torch.optim, name)(model.parameters(), lr=0.5)
    other.state.clear()
    optimizer = rmsgd.RMSGD(model.parameters(), lr=0.03)
    with pytest.raises(ValueError, match=r"group 0 .* another optimizer's checkpoint"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.03


@pytest.mark.parametrize("other", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adadelta])
def test_another_optimizers_state_is_refused(other):
    model = network()
    theirs = other(model.parameters())
    step(model, theirs, 0)
    ours = rmsgd.RMSGD(model.named_parameters())
    before = state_of(ours)
    with pytest.raises(ValueError, match=r"0.weight in the checkpoint has .*(exp_avg|square_avg).*another"):
        ours.load_state_dict(theirs.state_dict())
    unchanged(ours, before)


def changed(state_dict, path, value):
    """A copy of a state dict with another value at one place."""
    state_dict = deepcopy(state_dict)
    place = state_dict
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return state_dict


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("state",), None, "state of the checkpoint must be a dict, got None"),
        (("state", 0), [], "state of parameter 0 in the checkpoint must be a dict"),
        (("state", 0, "rate"), float("nan"), "0.weight in the checkpoint: rate must be finite, got nan"),
        (("state", 2, "epoch"), 1.5, "1.weight in the checkpoint: epoch must be a whole number, got 1.5"),
        (("state", 0, "velocity"), 3, "velocity must be a dense tensor of floating-point numbers, got 3"),
        (("state", 0, "velocity"), torch.zeros(8, 2, 3, 3).long(), "velocity must be a dense.*torch.int64"),
        (("state", 0, "velocity"), torch.zeros(8, 2, 3, 3, device="meta"), "0.weight.*on the meta device"),
        (("param_groups",), {}, "param_groups of the checkpoint must be a list"),
        (("param_groups", 0), 7, "group 0 of the checkpoint must be a dict, got 7"),
        (("param_groups", 0, "momentum"), "x", "group 0 of the checkpoint: momentum must be 0 or more"),
        (("param_groups", 0, "lr"), math.nan, "group 0 of the checkpoint: lr must be 0 or more, got nan"),
        (("param_groups", 0, "lr0"), -1.0, "group 0 of the checkpoint: lr0 must be 0 or more, got -1.0"),
        (("param_groups", 0, "rule"), "adam", "group 0 of the checkpoint: rule must be one of"),
        (("param_groups", 0, "params"), None, "group 0 of the checkpoint: params must be a list"),
        (("param_groups", 0, "params", 1), 0, "params holds 0, which the checkpoint has already listed"),
        (("param_groups", 0, "param_names"), ["a"], "param_names must be 6 names"),
    ],
)
def test_what_no_optimizer_writes_is_named_and_nothing_changes(path, value, message):
    model = network()
    ours = rmsgd.RMSGD(model.named_parameters())
    run(model, ours, 0, 5)
    before = state_of(ours)
    with pytest.raises(ValueError, match=message):
        ours.load_state_dict(changed(before, path, value))
    unchanged(ours, before)


@pytest.mark.parametrize(
    ("other", "got"),
    [
        (None, "None"),
        ([], r"\[\]"),
        ({}, "an empty dict"),
        (network().state_dict(), "a dict of '0.weight', '0.bias', .*"),
    ],
)
def test_what_is_no_state_dict_of_an_optimizer_is_refused(other, got):
    ours = rmsgd.RMSGD(network().parameters())
    expected = "a checkpoint of an optimizer must be a dict with 'state' and 'param_groups'"
    with pytest.raises(ValueError, match=f"{expected}, got {got}$"):
        ours.load_state_dict(other)


def test_numbers_that_were_stored_as_tensors_become_numbers():
    ours = rmsgd.RMSGD(network().parameters())
    before = state_of(ours)
    stored = deepcopy(before)
    for state in stored["state"].values():
        state.update((k, torch.tensor(v)) for k, v in list(state.items()) if not isinstance(v, torch.Tensor))
        state["rate"] = torch.tensor(0.03, dtype=torch.float64)
    ours.load_state_dict(stored)
    unchanged(ours, before)
    assert {type(v) for state in ours.state.values() for v in state.values()} == {
        torch.Tensor,
        float,
        int,
        bool,
    }


def test_reading_the_state_does_not_disturb_the_run():
    model, other = network(), network()
    watched, alone = rmsgd.RMSGD(model.parameters()), rmsgd.RMSGD(other.parameters())
    for t in range(8):
        run(model, watched, t, t + 1)
        watched.state_dict()
        run(other, alone, t, t + 1)
    assert identical(weights(model), weights(other))
