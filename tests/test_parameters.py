"""Parameters and state that change between steps are followed, or refused by name."""

import gc
import math
import warnings
import weakref

import pytest
import torch
from matrices import planted
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

import rmsgd
from rmsgd.optim import layouts, torch_compile
from rmsgd.rules import RULES


def network():
    torch.manual_seed(0)
    return planted(nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 3)))


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


CHANGES = {
    "place": lambda weight: weight.clone(),
    "type": lambda weight: weight.half(),
    "shape": lambda weight: weight[:2],
    "strides": lambda weight: weight.t(),
}


@pytest.mark.parametrize("core", [layouts._cpu, None], ids=["compiled", "python"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_any_parameter_in_memory_is_noticed(core, change, monkeypatch):
    monkeypatch.setattr(layouts, "_cpu", core)
    parameters = [Parameter(torch.zeros(3, 3)) for _ in range(3)]
    known = layouts.Layouts(parameters)
    assert known.hold()
    parameters[1].data = change(parameters[1].data)
    assert not known.hold()


def test_a_gradient_may_lie_in_memory_in_any_way(backend):
    weight = torch.randn(4, 6)
    gradient = torch.randn(6, 4, 2)[..., 0]
    stepped = []
    for grad in (gradient, gradient.t().contiguous().t()):
        p = Parameter(weight.clone().t())
        p.grad = grad
        rmsgd.RMSGD([p]).step()
        stepped.append(p)
    assert torch.equal(*stepped)
    assert not torch.equal(stepped[0], weight.t())


def data_moved(velocity):  # scripts do this to move an optimizer to another device
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
    optimizer.state[weight] = {"rate": 0.05}
    assert optimizer.learning_rates()["0.weight"] == 0.05
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


def test_a_frozen_parameter_that_has_a_gradient_is_stepped_as_by_sgd():
    ours, theirs = (Parameter(torch.ones(3, 4), requires_grad=False) for _ in range(2))
    optimizers = rmsgd.RMSGD([ours], lr=0.1), torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    for _ in range(2):
        ours.grad, theirs.grad = torch.ones(3, 4), torch.ones(3, 4)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


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


@pytest.mark.parametrize("gaps", [False, True])
def test_tiny_gradients_are_not_rounded_before_they_are_unscaled(backend, gaps):
    p, q = (Parameter(torch.zeros(4, 6, dtype=torch.float16)[:, :: 1 + g]) for g in (gaps, 0))
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch ties a gradient's type to its parameter's")
    p.grad_dtype = torch.float32
    p.grad, q.grad = torch.full(p.shape, 2.0**-10), torch.full_like(q, 2.0**-10)
    optimizer = rmsgd.RMSGD([p, q], lr=2.0**10)
    optimizer.grad_scale = torch.tensor(2.0**16)
    optimizer.step()
    assert torch.equal(p.detach(), torch.full_like(p, -(2.0**-16)))
    assert torch.equal(q.detach(), torch.full_like(q, -(2.0**-16)))


@pytest.mark.parametrize("gaps", [False, True])
def test_a_scaled_gradient_that_half_precision_cannot_hold_is_unscaled_first(backend, gaps):
    p = Parameter(torch.ones(4, 6, dtype=torch.float16)[:, :: 1 + gaps])
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch ties a gradient's type to its parameter's")
    p.grad_dtype = torch.float32
    p.grad = torch.full(p.shape, 2.0**16)
    optimizer = rmsgd.RMSGD([p], lr=1.0)
    optimizer.grad_scale = torch.tensor(2.0**17)
    optimizer.step()
    assert torch.equal(p.detach(), torch.full_like(p, 0.5))


def test_fake_parameters_are_refused_by_name():
    with FakeTensorMode():
        layer = nn.Linear(3, 4)
        optimizer = rmsgd.RMSGD(layer.named_parameters())
        layer(torch.ones(2, 3)).sum().backward()
        for call in (optimizer.step, optimizer.epoch_step):
            with pytest.raises(RuntimeError, match="parameter weight is a fake tensor"):
                call()


def test_a_fake_mode_around_real_parameters_is_refused_and_changes_nothing():
    layer = nn.Linear(3, 4)
    optimizer = rmsgd.RMSGD(layer.named_parameters())
    layer(torch.ones(2, 3)).sum().backward()
    before = layer.weight.detach().clone()
    with FakeTensorMode(), pytest.raises(RuntimeError, match="outside FakeTensorMode"):
        optimizer.step()
    assert torch.equal(layer.weight, before)
    optimizer.step()
    assert not torch.equal(layer.weight, before)


def test_a_matrix_of_gradients_with_a_sign_still_to_be_applied_is_descended_along(backend):
    w = Parameter(torch.zeros(3, 4))
    w.grad = torch._neg_view(torch.ones(3, 4))
    optimizer = rmsgd.RMSGD([w], lr=1.0, momentum=0.0)
    for _ in range(2):  # the first step makes the tables that the second one finds
        optimizer.step()
    assert torch.equal(w.detach(), torch.full((3, 4), 2.0))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_gradient_with_a_sign_still_to_be_applied_is_descended_along(backend, shape):
    w = Parameter(torch.zeros(shape))
    (torch.complex(torch.ones(shape), w).conj() * torch.tensor([1 + 2j])).real.sum().backward()
    assert w.grad.is_neg()
    assert w.grad.item() == 2.0
    rmsgd.RMSGD([w], lr=1.0).step()
    assert w.item() == -2.0


def test_looking_at_rates_in_inference_mode_changes_nothing(backend):
    model = network()
    optimizer = rmsgd.RMSGD(model.named_parameters(), initial_rank="measure")
    with torch.inference_mode():
        optimizer.learning_rates()
    steps(model, optimizer)
    optimizer.epoch_step()
    with torch.inference_mode():
        assert len(optimizer.learning_rates()) == len(list(model.parameters()))


def _made(model):
    return rmsgd.RMSGD(model.parameters())


def _loaded(model):
    optimizer = _made(model)
    optimizer.load_state_dict(optimizer.state_dict())
    return optimizer


def _grown(model):
    optimizer = rmsgd.RMSGD(model[0].parameters())
    optimizer.add_param_group({"params": list(model[1:].parameters())})
    return optimizer


@pytest.mark.parametrize("make", [_made, _loaded, _grown])
def test_an_optimizer_made_in_inference_mode_steps_after_it(backend, make):
    model = network()
    with torch.inference_mode():
        optimizer = make(model)
    before = [p.detach().clone() for p in model.parameters()]
    steps(model, optimizer)
    optimizer.epoch_step()
    assert not any(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("rule", RULES)
def test_a_layer_that_thaws_begins_at_the_rank_it_is_found_with(rule):
    model = nn.Sequential(nn.Linear(60, 40), nn.Linear(40, 30))
    with torch.no_grad():
        for layer in model:  # a low-rank part that stands out of the noise
            layer.weight.copy_(0.01 * torch.randn_like(layer.weight))
            layer.weight[0] += 1.0
    model[1].weight.requires_grad_(False)
    optimizer = rmsgd.RMSGD(model.named_parameters(), initial_rank="measure", beta=0.9, rule=rule)
    optimizer.epoch_step()
    optimizer.epoch_step()
    model[1].weight.requires_grad_(True)
    before = optimizer.learning_rates()["1.weight"]
    optimizer.epoch_step()  # its weight has not changed: the rate decays, and no more
    anchor = RULES[rule].anchor * 0.03
    assert optimizer.learning_rates()["1.weight"] == pytest.approx(anchor + 0.9 * (before - anchor))


@pytest.mark.parametrize("option", ["probe", "linear"])
def test_a_group_may_say_anew_what_is_measured_before_any_epoch_end(option):
    optimizer = rmsgd.RMSGD([("w", Parameter(torch.randn(6, 4))), ("k", Parameter(torch.randn(4, 4, 3)))])
    (group,) = optimizer.param_groups
    measured = []
    for value in (True, False, True):
        group[option] = value
        optimizer.epoch_step()
        measured.append([layer.name for layer in optimizer.report().layers])
    assert measured == [["w", "k"], [] if option == "probe" else ["k"], ["w", "k"]]


@pytest.mark.parametrize("options", [{}, {"momentum": 0.0}, {"rule": "paper"}], ids=str)
def test_tables_are_made_at_the_first_step_and_no_other_step_measures(options, monkeypatch):
    model = network()
    optimizer = rmsgd.RMSGD(model.parameters(), **options)
    steps(model, optimizer)
    monkeypatch.delattr("rmsgd.optim.rates.Rates.build")
    optimizer.epoch_step()
    monkeypatch.delattr("rmsgd.optim.device_rates.DeviceRates._measure")
    steps(model, optimizer)


@pytest.mark.parametrize("rule", ["bounded", "paper", "release"])
def test_a_parameter_in_anothers_place_does_not_set_back_its_groups_clock(rule):
    def rates(replace):
        torch.manual_seed(0)
        p, q = Parameter(torch.randn(8, 12)), Parameter(torch.randn(8, 12))
        optimizer = rmsgd.RMSGD([p, q], beta=0.9, rule=rule, step_size=1, gamma=0.5)
        for epoch in range(6):
            with torch.no_grad():
                q[0] += 1.0
            if replace and epoch == 3:
                optimizer.param_groups[0]["params"][0] = Parameter(torch.randn(8, 12))
            optimizer.epoch_step()
        return optimizer.learning_rates()["0.1"]

    assert rates(replace=True) == rates(replace=False)


def test_two_models_parameters_of_the_same_names_are_told_apart_by_group():
    models = [nn.Linear(3, 2), nn.Linear(3, 2)]
    optimizer = rmsgd.RMSGD([{"params": model.named_parameters()} for model in models])
    assert list(optimizer.learning_rates()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    optimizer.epoch_step()
    assert [layer.name for layer in optimizer.report().layers] == ["0.weight", "1.weight"]


def test_two_models_parameters_of_the_same_names_in_one_group_are_told_apart_by_index():
    models = [nn.Linear(3, 2), nn.Linear(3, 2, bias=False)]
    optimizer = rmsgd.RMSGD([pair for model in models for pair in model.named_parameters()])
    assert list(optimizer.learning_rates()) == ["weight#0", "bias", "weight#2"]
    optimizer.epoch_step()
    assert [layer.name for layer in optimizer.report().layers] == ["weight#0", "weight#2"]


def test_where_new_tensors_are_made_does_not_matter(backend):
    (_, optimizer), (_, alone) = trained(), trained()
    with torch.device("meta"):
        optimizer.epoch_step()
    alone.epoch_step()
    assert optimizer.learning_rates() == alone.learning_rates()


def test_an_optimizer_that_its_parameter_refers_to_is_collected():
    p = Parameter(torch.ones(3))
    p.optimizer = rmsgd.RMSGD([p])
    p.grad = torch.ones(3)
    p.optimizer.step()
    gone, number = weakref.ref(p), p.optimizer._number
    del p
    gc.collect()
    assert gone() is None
    assert number not in torch_compile._STEPS  # where a compiled graph would look for its step


class NoFloat64(TorchFunctionMode):
    """A meta device without float64, like Apple's device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_meta and result.dtype == torch.float64:
            raise TypeError("this device has no float64")
        return result


def test_a_device_without_float64_is_stepped_on():
    weights = [Parameter(torch.randn(8, 8, device="meta")) for _ in range(2)]
    optimizer = rmsgd.RMSGD(weights)
    for p in weights:
        p.grad = torch.randn(8, 8, device="meta")
    with NoFloat64():
        optimizer.step()
        assert optimizer.learning_rates() == {"0.0": 0.03, "0.1": 0.03}
    assert optimizer.state_dict()["state"][0]["fresh"] is False


def test_an_epoch_end_of_parameters_without_values_names_one_and_moves_no_rate():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2, device="meta"))
    optimizer = rmsgd.RMSGD(model.named_parameters())
    model[1].to_empty(device="cpu")
    before = optimizer.learning_rates()
    with pytest.raises(RuntimeError, match=r"1\.weight is on the meta device.*model\.to_empty\(\) leaves"):
        optimizer.epoch_step()
    assert optimizer.learning_rates() == before


@pytest.mark.parametrize(("before", "after"), [("meta", "cpu"), ("cpu", "meta")])
def test_memory_follows_a_parameter_to_another_device(before, after):
    p = Parameter(torch.ones(3, 4, device=before))
    optimizer = rmsgd.RMSGD([p], lr=0.25)
    torch.utils.swap_tensors(p, Parameter(torch.ones(3, 4, device=after)))
    p.grad = torch.ones(3, 4, device=after)
    optimizer.step()
    assert optimizer.state[p]["velocity"].device.type == after
    assert p.is_meta or torch.equal(p, torch.full((3, 4), 0.75))


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


def test_a_sparse_gradient_on_one_device_stops_the_step_on_all():
    here, there = Parameter(torch.ones(2)), Parameter(torch.ones(2, device="meta"))
    optimizer = rmsgd.RMSGD([here, there])
    here.grad = torch.ones(2)
    there.grad = torch.sparse_coo_tensor(size=(2,), device="meta")
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
    assert torch.equal(here.detach(), torch.ones(2))


def test_a_lazy_modules_parameter_is_refused_with_what_to_do_and_its_group_forgotten():
    model = nn.Sequential(nn.Linear(2, 4), nn.LazyLinear(3))
    optimizer = rmsgd.RMSGD(model[0].named_parameters())
    named = [("1." + name, p) for name, p in model[1].named_parameters()]
    with pytest.raises(TypeError, match=r"1\.weight has no shape yet.*call the model once on an input"):
        optimizer.add_param_group({"params": named})
    assert len(optimizer.param_groups) == 1
    model(torch.ones(5, 2)).sum().backward()
    optimizer.add_param_group({"params": [("1." + name, p) for name, p in model[1].named_parameters()]})
    optimizer.step()


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
    for name in ("0.weight", "0.bias"):  # which follows it
        assert after[name] == before[name]
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
    optimizer = rmsgd.RMSGD(model.named_parameters(), rule="paper", initial_rank="measure")
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
