"""Parameters and state that change between steps are followed, or refused by name."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import Parameter

import rmsgd


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 3))


def give_gradients(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator).to(p)


def steps(model, optimizer, count=2):
    for seed in range(count):
        give_gradients(model, seed)
        optimizer.step()


def trained():
    model = network()
    optimizer = rmsgd.RMSGD(model.named_parameters())
    steps(model, optimizer)
    optimizer.epoch_step()
    return model, optimizer


def assert_equal(model, other):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0, check_stride=False)


# -- what is followed ----------------------------------------------------------------------------


def moved(model):
    for p in model.parameters():
        p.data = p.data.clone()


def in_another_layout(model):
    model.to(memory_format=torch.channels_last)


def with_gaps(model):
    weight = model[3].weight
    spaced = torch.zeros(*weight.shape, 2)
    spaced[..., 0] = weight.detach()
    weight.data = spaced[..., 0]


@pytest.mark.parametrize("change", [moved, in_another_layout, with_gaps])
def test_weights_in_other_memory_go_on_with_their_past(backend, change):
    model, optimizer = trained()
    other, alone = trained()
    change(model)
    for m, o in ((model, optimizer), (other, alone)):
        steps(m, o)
        o.epoch_step()
    assert_equal(model, other)
    assert optimizer.learning_rates() == pytest.approx(alone.learning_rates(), rel=1e-6)


def data_moved(velocity):  # as scripts do that bring an optimizer to another device
    velocity.data = velocity.data.clone()


@pytest.mark.parametrize("change", [data_moved, torch.Tensor.share_memory_])
def test_past_gradients_in_other_memory_are_gone_on_with(backend, change):
    model, optimizer = trained()
    other, alone = trained()
    for state in optimizer.state.values():
        change(state["velocity"])
    steps(model, optimizer)
    steps(other, alone)
    assert_equal(model, other)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["velocity"], alone.state[q]["velocity"])


def test_weights_of_another_type_keep_rates_and_velocities(backend):
    model, optimizer = trained()
    rates = optimizer.learning_rates()
    model.to(torch.bfloat16)
    steps(model, optimizer, 1)
    assert optimizer.learning_rates() == rates
    assert {s["velocity"].dtype for s in optimizer.state.values()} == {torch.float32}
    model.double()
    steps(model, optimizer, 1)
    assert {s["velocity"].dtype for s in optimizer.state.values()} == {torch.float64}


def test_a_parameter_put_in_anothers_place_begins_afresh():
    model, optimizer = trained()
    old, new = model[3].bias, Parameter(torch.zeros(3))
    assert optimizer.param_groups[0]["params"][-1] is old
    optimizer.param_groups[0]["params"][-1] = model[3].bias = new
    give_gradients(model)
    optimizer.step()
    assert optimizer.learning_rates()["3.bias"] == 0.03
    torch.testing.assert_close(new.detach(), -0.03 * new.grad)
    assert old not in optimizer.state


def test_a_group_that_is_removed_is_forgotten():
    model = network()
    params = list(model.parameters())
    optimizer = rmsgd.RMSGD([{"params": params[:2]}, {"params": params[2:4]}, {"params": params[4:]}])
    steps(model, optimizer)
    optimizer.epoch_step()
    before = params[2].detach().clone()
    del optimizer.param_groups[1]
    steps(model, optimizer)
    optimizer.epoch_step()
    assert torch.equal(params[2], before)
    assert list(optimizer.learning_rates()) == ["0.0", "0.1", "1.0", "1.1"]
    assert len(optimizer.state_dict()["state"]) == 4


def test_a_state_that_is_replaced_counts():
    model, optimizer = trained()
    weight = model[0].weight
    optimizer.state[weight]["velocity"] = torch.zeros_like(weight)
    optimizer.param_groups[0]["momentum"] = 0.5
    before = weight.detach().clone()
    rate = optimizer.learning_rates()["0.weight"]
    give_gradients(model)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before - rate * weight.grad)
    optimizer.state[weight] = {"rate": 0.5}
    assert optimizer.learning_rates()["0.weight"] == 0.5
    optimizer.state.clear()
    assert set(optimizer.learning_rates().values()) == {0.03}
    steps(model, optimizer)


def test_momentum_may_be_switched_on_and_off():
    model = network()
    optimizer = rmsgd.RMSGD(model.parameters(), momentum=0.0)
    steps(model, optimizer)
    assert all("velocity" not in state for state in optimizer.state.values())
    for momentum in (0.9, 0.0, 0.5):
        optimizer.param_groups[0]["momentum"] = momentum
        steps(model, optimizer)


def test_frozen_parameters_cost_no_memory_and_join_when_they_thaw():
    model = network()
    model[0].requires_grad_(False)
    optimizer = rmsgd.RMSGD(model.named_parameters())
    steps(model, optimizer)
    optimizer.epoch_step()
    assert "velocity" not in optimizer.state[model[0].weight]
    assert [layer.name for layer in optimizer.report().layers] == ["3.weight"]
    model[0].requires_grad_(True)
    before = model[0].weight.detach().clone()
    give_gradients(model)
    optimizer.step()
    assert not torch.equal(model[0].weight, before)
    optimizer.epoch_step()
    assert [layer.name for layer in optimizer.report().layers] == ["0.weight", "3.weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_may_be_float32_beside_half_precision_weights(backend, dtype):
    p, q = Parameter(torch.ones(4, 3, dtype=dtype)), Parameter(torch.ones(4, 3, dtype=dtype))
    grad = torch.linspace(-1, 1, 12).reshape(4, 3)
    for parameter, given in ((p, grad), (q, grad.to(dtype))):
        if given.dtype != dtype:
            if not hasattr(parameter, "grad_dtype"):
                pytest.skip("this torch ties a gradient's type to its parameter's")
            parameter.grad_dtype = given.dtype
        parameter.grad = given
        rmsgd.RMSGD([parameter], lr=0.5).step()
    torch.testing.assert_close(p, q)


def test_the_same_parameter_twice_is_stepped_once():
    p = Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = rmsgd.RMSGD([p, p], lr=0.1)
    p.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.9))


# -- what is refused -----------------------------------------------------------------------------


def test_a_resized_parameter_is_named_and_nothing_changes(backend):
    model, optimizer = trained()
    model[3].weight.data, model[3].weight.grad = torch.zeros(3, 7), None
    before = [p.detach().clone() for p in model.parameters()]
    model[0].weight.grad = torch.ones_like(model[0].weight)
    for call in (optimizer.step, optimizer.epoch_step, optimizer.learning_rates):
        with pytest.raises(RuntimeError, match=r"3\.weight was resized to \(3, 7\).*shape \(3, 32\)"):
            call()
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize(
    "change",
    [lambda w: w[:2], lambda w: w.t(), lambda w: w.reshape(32, 3), lambda w: w.flatten(), lambda w: w[:0]],
)
def test_another_shape_in_the_same_memory_is_named_and_nothing_changes(backend, change):
    model, optimizer = trained()
    memory = model[3].weight.data
    model[3].weight.grad = None
    model[3].weight.data = change(memory)
    give_gradients(model)
    before = [p.detach().clone() for p in (*model.parameters(), memory)]
    for call in (optimizer.step, optimizer.epoch_step, optimizer.learning_rates):
        with pytest.raises(RuntimeError, match=r"3\.weight was resized to .*shape \(3, 32\)"):
            call()
    assert all(map(torch.equal, (*model.parameters(), memory), before))


def test_another_type_in_the_same_memory_is_followed(backend):
    model, optimizer = trained()
    weight = model[3].weight
    memory = weight.data.untyped_storage()
    half = weight.data.half()
    weight.grad = None
    weight.data = torch.empty(0, dtype=torch.float16).set_(memory, 0, weight.shape).copy_(half)
    assert weight.data_ptr() == memory.data_ptr()
    velocity = optimizer.state[weight]["velocity"].clone()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    moved = 0.9 * velocity - optimizer.learning_rates()["3.weight"]
    torch.testing.assert_close(weight.detach(), (half + moved).half())


def test_a_sparse_gradient_is_named_and_nothing_changes(backend):
    table = nn.Embedding(5, 3, sparse=True)
    dense = nn.Linear(3, 1)
    optimizer = rmsgd.RMSGD([*dense.named_parameters(), ("table.weight", table.weight)])
    before = dense.weight.detach().clone()
    dense(table(torch.tensor([1, 2]))).sum().backward()
    with pytest.raises(RuntimeError, match=r"table\.weight has one .*sparse=False"):
        optimizer.step()
    assert torch.equal(dense.weight, before)
    assert all(state["fresh"] for state in optimizer.state_dict()["state"].values())


@pytest.mark.parametrize(
    ("p", "message"),
    [
        (torch.ones(2, 2, dtype=torch.complex64), r"parameter 0\.1 is complex .*complex64"),
        (torch.ones(2, 2, dtype=torch.int64), r"parameter 0\.1 has dtype torch.int64; RMSGD knows float32"),
        (torch.ones(2, 2, dtype=torch.float8_e4m3fn), r"parameter 0\.1 has dtype torch.float8_e4m3fn"),
        (torch.ones(2, 2).to_sparse(), r"parameter 0\.1 has layout torch.sparse_coo"),
    ],
)
def test_parameters_of_other_kinds_are_refused_by_name(p, message):
    ours = rmsgd.RMSGD([torch.ones(2)])
    with pytest.raises(TypeError, match=message):
        rmsgd.RMSGD([torch.ones(2), p])
    with pytest.raises(TypeError, match=message.replace(r"0\.1", r"1\.0")):
        ours.add_param_group({"params": [p]})
    assert len(ours.param_groups) == 1
    ours.step()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_keep_their_rate_and_are_named_once(backend, bad):
    model, optimizer = trained()
    other, healthy = trained()
    with torch.no_grad():
        model[0].weight[3, 1, 0, 0] = bad
    before, state = optimizer.learning_rates(), optimizer.state_dict()["state"][0]
    known = (state["rate"], state["stable_rank"])
    with pytest.warns(UserWarning, match="NaN") as caught:
        optimizer.epoch_step()
    assert [str(w.message) for w in caught] == [
        "NaN or infinite weights in 0.weight: not measured, the learning rate stays"
    ]
    assert caught[0].filename == __file__
    healthy.epoch_step()
    after, expected = optimizer.learning_rates(), healthy.learning_rates()
    assert after["0.weight"] == before["0.weight"]
    assert after["3.weight"] == expected["3.weight"]
    state = optimizer.state_dict()["state"][0]
    assert (state["rate"], state["stable_rank"]) == known
    assert optimizer.report().layers[0].skipped is not None

    with torch.no_grad():
        model[0].weight.copy_(other[0].weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.epoch_step()
    assert all(math.isfinite(rate) for rate in optimizer.learning_rates().values())


def test_pretrained_weights_that_are_not_finite_at_first_are_measured_when_they_are():
    model = network()
    optimizer = rmsgd.RMSGD(model.named_parameters(), initial_rank="measure")
    good = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    with pytest.warns(UserWarning, match=r"0\.weight"):
        optimizer.epoch_step()
    with torch.no_grad():
        model[0].weight.copy_(good)
    optimizer.epoch_step()
    assert optimizer.learning_rates()["0.weight"] == pytest.approx(0.03 * 0.98)
    assert optimizer.learning_rates()["3.weight"] == pytest.approx(0.03 * 0.98**2)


def test_a_report_needs_an_epoch_end_first():
    with pytest.raises(RuntimeError, match=r"needs an epoch_step\(\) first"):
        rmsgd.RMSGD(network().parameters()).report()
