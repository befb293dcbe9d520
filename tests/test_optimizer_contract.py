"""RMSGD keeps the promises of every optimizer of torch.

The checks follow those that torch runs over its own optimizers, in its own database of them.
"""

import functools
import operator
import pickle
from copy import deepcopy
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing import assert_close
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
    optims,
)
from torch.testing._internal.common_utils import TestCase
from torch.utils._pytree import tree_flatten

import rmsgd

SCHEDULERS = (
    [lambda opt: lr_scheduler.StepLR(opt, gamma=0.9, step_size=10)],
    [
        lambda opt: lr_scheduler.LinearLR(opt, start_factor=0.4, total_iters=4),
        lambda opt: lr_scheduler.ReduceLROnPlateau(opt),
    ],
    [
        lambda opt: lr_scheduler.PolynomialLR(opt, power=0.9, total_iters=50),
        lambda opt: lr_scheduler.ExponentialLR(opt, gamma=0.99),
    ],
)

KEYWORDS = (
    ("default", {}),
    ("non-default lr", {"lr": 1e-2}),
    ("tensor lr", {"lr": torch.tensor(0.001)}),
    ("weight decay", {"weight_decay": 0.1}),
    ("maximize", {"weight_decay": 0.1, "maximize": True}),
    ("no momentum", {"momentum": 0.0}),
    ("dampening", {"momentum": 0.9, "dampening": 0.5}),
    ("nesterov", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("rule of the release", {"rule": "release", "step_size": 2, "gamma": 0.9}),
    ("rule of the tables", {"rule": "published", "linear": False}),
    ("letter of the paper", {"rule": "paper"}),
)

INVALID = (
    ({"lr": -0.1}, "lr must be 0 or more, got -0.1"),
    ({"lr": float("nan")}, "lr must be 0 or more.*nan"),
    ({"beta": 1.0}, r"beta must be in \[0, 1\), got 1.0"),
    ({"beta": float("nan")}, "beta must be"),
    ({"step_size": 0}, "step_size must be a positive"),
    ({"step_size": 1.5}, "step_size must be a positive"),
    ({"gamma": 0.0}, "gamma must be above 0"),
    ({"gamma": float("nan")}, "gamma must be above 0"),
    ({"momentum": -0.5}, "momentum must be 0 or more, got -0.5"),
    ({"momentum": float("nan")}, "momentum must be"),
    ({"dampening": float("nan")}, "dampening must be finite"),
    ({"weight_decay": -1.0}, "weight_decay must be 0 or more"),
    ({"weight_decay": float("nan")}, "weight_decay must be"),
    ({"nesterov": True, "momentum": 0.0}, "nesterov needs a momentum"),
    ({"nesterov": True, "dampening": 0.1}, "nesterov needs a momentum above 0 and no dampening"),
    ({"zeta": 0.0}, "zeta must be above 0"),
    ({"zeta": float("nan")}, "zeta must be"),
    ({"min_lr": -1.0}, "min_lr must be 0 or more"),
    ({"min_lr": float("nan")}, "min_lr must be"),
    ({"rule": "adam"}, "rule must be one of bounded, paper, release, published, got 'adam'"),
    ({"initial_rank": "full"}, "initial_rank must be one of zero, measure"),
    ({"lr": "0.1"}, "lr must be 0 or more, got '0.1'"),
    ({"momentum": None}, "momentum must be 0 or more, got None"),
    ({"weight_decay": 10**400}, r"weight_decay must be 0 or more, got 1000+\.\.\.$"),
    ({"nesterov": "no"}, "nesterov must be True or False, got 'no'"),
    ({"rule": ["paper"]}, "rule must be one of"),
)

UNKNOWN = (
    *(({switch: True}, f"{switch}=True: leave it out") for switch in ("foreach", "fused", "capturable")),
    ({"differentiable": True}, "differentiable=True: .* that of torch.optim.SGD can"),
    ({"momentun": 0.9}, "RMSGD has no option 'momentun': did you mean 'momentum'"),
    ({"weight_decy": 0.1}, "did you mean 'weight_decay'"),
    ({"foreech": False}, "did you mean 'foreach'"),
    ({"amsgrad": True}, "RMSGD has no option 'amsgrad'; it has beta, .*, zeta$"),
    ({"probe": False}, "one of parameter groups"),
)


def inputs(device, dtype=None):
    return [OptimizerInput(params=None, kwargs=kwargs, desc=desc) for desc, kwargs in KEYWORDS]


def error_inputs(device, dtype):
    construction = [
        ErrorOptimizerInput(
            OptimizerInput(params=None, kwargs=kwargs, desc=message),
            error_type=ValueError,
            error_regex=message,
        )
        for kwargs, message in INVALID
    ]
    construction += [
        ErrorOptimizerInput(
            OptimizerInput(params=None, kwargs=kwargs, desc=message),
            error_type=TypeError,
            error_regex=message,
        )
        for kwargs, message in UNKNOWN
    ]
    return get_error_inputs_for_all_optims(device, dtype) + construction


OURS = OptimizerInfo(
    rmsgd.RMSGD,
    optim_inputs_func=inputs,
    scheduler_inputs=SCHEDULERS,
    optim_error_inputs_func=error_inputs,
    supported_impls=(),
    not_og_supported_flags=("maximize",),
    supports_complex=False,
)


def network(device, dtype):
    """A small network with every kind of parameter that RMSGD treats in its own way."""
    layers = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    return layers.to(device=device, dtype=dtype)


def train(model, optimizer, steps=3, epochs=1, seed=0):
    """Trains on noise; the same noise for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    p = next(model.parameters())
    for _ in range(epochs):
        for _ in range(steps):
            optimizer.zero_grad()
            x = torch.randn(8, 2, 4, 4, generator=generator).to(p)
            model(x).square().mean().backward()
            optimizer.step()
        optimizer.epoch_step()


same = functools.partial(assert_close, atol=0, rtol=0)


def same_state(a, b):
    """Whether two states hold the same keys and, bit for bit, the same values."""
    (a, keys), (b, others) = tree_flatten(a), tree_flatten(b)
    return keys == others and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else repr(x) == repr(y)
        for x, y in zip(a, b, strict=True)
    )


class TestContract(TestCase):
    @optims([OURS])
    def test_bad_input_is_refused_with_its_reason(self, device, dtype, optim_info):
        p = Parameter(torch.randn(2, 3, device=device, dtype=dtype))
        for error in optim_info.optim_error_inputs_func(device, dtype):
            assert error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
            given = error.optimizer_error_input
            params = [p] if given.params is None else given.params
            if issubclass(error.error_type, Warning):
                with pytest.warns(error.error_type, match=error.error_regex):
                    optim_info.optim_cls(params, **given.kwargs)
            else:
                with pytest.raises(error.error_type, match=error.error_regex):
                    optim_info.optim_cls(params, **given.kwargs)

    @optims([OURS])
    def test_it_goes_the_right_direction(self, device, dtype, optim_info):
        for given, scheduled, dense in product(
            optim_info.optim_inputs_func(device), (None, *optim_info.scheduler_inputs), (True, False)
        ):
            kwargs = deepcopy(given.kwargs) | {"lr": torch.tensor(0.01) if "tensor" in given.desc else 0.01}
            shape = ((6, 5), (6,)) if dense else ((6, 5, 2), (6, 2))
            weight, bias = (torch.randn(s, device=device, dtype=dtype) for s in shape)
            if not dense:
                weight, bias = weight[..., 0], bias[..., 0]
            weight, bias = Parameter(weight), Parameter(bias)
            x = torch.randn(5, device=device, dtype=dtype)
            optimizer = optim_info.optim_cls([weight, bias], **kwargs)
            schedulers = [make(optimizer) for make in scheduled or ()]

            def closure(optimizer=optimizer, weight=weight, bias=bias, x=x):
                optimizer.zero_grad()
                loss = (weight.mv(x) + bias).pow(2).sum()
                loss.backward()
                return loss

            before = closure().item()
            for _ in range(8):
                returned = optimizer.step(closure).detach()
                for scheduler in schedulers:
                    plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
                    scheduler.step(*([returned] if plateau else []))
            compare = operator.gt if kwargs.get("maximize", False) else operator.lt
            assert compare(closure().item(), before), (given.desc, dense)
            assert repr(optimizer).startswith("RMSGD (")

    @optims([OURS], dtypes=[torch.float32, torch.float64, torch.bfloat16])
    def test_gaps_in_memory_do_not_change_the_result(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device):
            start, grads = torch.randn(6, 5, 2), [torch.randn(6, 5) for _ in range(3)]
            spaced = Parameter(start.clone().to(device, dtype)[..., 0])
            dense = Parameter(spaced.detach().clone(memory_format=torch.contiguous_format))
            beside = spaced.detach().as_strided((6, 5), (10, 2), 1).clone()
            ours = [optim_info.optim_cls([p], **deepcopy(given.kwargs)) for p in (spaced, dense)]
            for grad in grads:
                for p, optimizer in zip((spaced, dense), ours, strict=True):
                    p.grad = grad.to(device, dtype)
                    optimizer.step()
                    optimizer.epoch_step()
            same(spaced, dense)
            same(spaced.detach().as_strided((6, 5), (10, 2), 1), beside)

    @optims([OURS])
    def test_without_gradients_a_step_changes_nothing(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device):
            params = [Parameter(torch.randn(2, 3, device=device, dtype=dtype)) for _ in range(2)]
            before = [p.detach().clone() for p in params]
            optimizer = optim_info.optim_cls(params, **deepcopy(given.kwargs))
            optimizer.step()
            assert all(map(torch.equal, params, before))
            params[1].grad = torch.ones_like(params[1])
            optimizer.step()
            assert torch.equal(params[0], before[0])
            assert not torch.equal(params[1], before[1])

    @optims([OURS])
    def test_zero_gradients_change_nothing_without_weight_decay(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device):
            p = Parameter(torch.randn(5, 1, device=device, dtype=dtype))
            before = p.detach().clone()
            optimizer = optim_info.optim_cls([p], **deepcopy(given.kwargs))
            p.grad = torch.zeros_like(p)
            optimizer.step()
            assert torch.equal(p, before) == (not given.kwargs.get("weight_decay"))

    @optims([OURS])
    def test_empty_parameters_and_gradients_are_passed_over(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device):
            empty = Parameter(torch.randn(4, 0, device=device, dtype=dtype))
            p = Parameter(torch.randn(3, 3, device=device, dtype=dtype))
            optimizer = optim_info.optim_cls([empty, p], **deepcopy(given.kwargs))
            for _ in range(2):
                empty.grad, p.grad = torch.empty_like(empty), torch.ones_like(p)
                optimizer.step()
            optimizer.epoch_step()
            assert empty.shape == (4, 0)

    @optims([OURS])
    def test_state_is_the_same_for_equal_parameters(self, device, dtype, optim_info):
        for given, named in product(optim_info.optim_inputs_func(device), (False, True)):
            models = [network(device, dtype)]
            models.append(deepcopy(models[0]))
            states = []
            for model in models:
                params = model.named_parameters() if named else model.parameters()
                optimizer = optim_info.optim_cls(params, **deepcopy(given.kwargs))
                train(model, optimizer)
                states.append(optimizer.state_dict())
            assert same_state(*states)

    @optims([OURS])
    def test_a_loaded_state_goes_on_as_the_saved_one(self, device, dtype, optim_info):
        for given, first, second in product(
            optim_info.optim_inputs_func(device), (False, True), (False, True)
        ):
            model = network(device, dtype)

            def make(model, named, kwargs=given.kwargs):
                params = model.named_parameters() if named else model.parameters()
                return optim_info.optim_cls(params, **deepcopy(kwargs))

            optimizer = make(model, first)
            train(model, optimizer)
            saved = deepcopy(optimizer.state_dict())
            untouched = deepcopy(saved)
            other_model = deepcopy(model)
            other = make(other_model, second)
            other.load_state_dict(saved)
            for m, o in ((model, optimizer), (other_model, other)):
                train(m, o, epochs=2, seed=1)
            assert same_state(saved, untouched)
            same(list(model.parameters()), list(other_model.parameters()))
            assert list(optimizer.learning_rates().values()) == list(other.learning_rates().values())
            assert ("param_names" in other.param_groups[0]) == (first or second)

    @optims([OURS])
    def test_a_state_without_the_newer_options_loads(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device):
            model = network(device, dtype)
            optimizer = optim_info.optim_cls(model.parameters(), **deepcopy(given.kwargs))
            train(model, optimizer)
            old = deepcopy(optimizer.state_dict())
            for group in old["param_groups"]:
                for flag in optim_info.not_og_supported_flags:
                    del group[flag]
            optimizer.load_state_dict(old)
            train(model, optimizer)

    @optims([OURS])
    def test_pickle_and_deepcopy_go_on_as_the_original(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device):
            model = network(device, dtype)
            optimizer = optim_info.optim_cls(model.named_parameters(), **deepcopy(given.kwargs))
            train(model, optimizer)
            for copy in (deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
                twin, twins = copy((model, optimizer))
                origin, original = deepcopy((model, optimizer))
                train(twin, twins, seed=2)
                train(origin, original, seed=2)
                same(list(twin.parameters()), list(origin.parameters()))
                assert twins.learning_rates() == original.learning_rates()

    @optims([OURS])
    def test_copies_have_all_public_attributes(self, device, dtype, optim_info):
        def public(optimizer):
            return {name for name in vars(optimizer) if not name.startswith("_")}

        for given in optim_info.optim_inputs_func(device):
            p = Parameter(torch.randn(2, 3, device=device, dtype=dtype))
            optimizer = optim_info.optim_cls([p], **deepcopy(given.kwargs))
            assert public(optimizer) == public(deepcopy(optimizer))
            assert public(optimizer) == public(pickle.loads(pickle.dumps(optimizer)))

    @optims([OURS])
    def test_a_deep_copy_has_the_same_process_group(self, device, dtype, optim_info):
        group = object()
        optimizer = optim_info.optim_cls([Parameter(torch.ones(2, 3))], process_group=group)
        assert deepcopy(optimizer).process_group is group

    @optims([OURS])
    def test_closures_run_with_gradients_and_their_loss_is_returned(self, device, dtype, optim_info):
        p = Parameter(torch.ones(2, 2, device=device, dtype=dtype))
        optimizer = optim_info.optim_cls([p])

        def closure():
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = p.square().sum()
            loss.backward()
            return loss

        with torch.no_grad():
            assert optimizer.step(closure).item() == 4.0
        assert (p < 1).all()
        assert optimizer.step() is None

    @optims([OURS])
    def test_hooks_run_in_torchs_order(self, device, dtype, optim_info):
        p = Parameter(torch.ones(2, 2, device=device, dtype=dtype))
        p.grad = torch.ones_like(p)
        optimizer = optim_info.optim_cls([p])
        seen = []

        def note(word, optimizer, args, kwargs):
            seen.append((word, p.detach().clone()))

        handles = [
            register_optimizer_step_pre_hook(functools.partial(note, "global pre")),
            register_optimizer_step_post_hook(functools.partial(note, "global post")),
            optimizer.register_step_pre_hook(functools.partial(note, "pre")),
            optimizer.register_step_post_hook(functools.partial(note, "post")),
        ]
        optimizer.step()
        for handle in handles:
            handle.remove()
        optimizer.step()
        assert [word for word, _ in seen] == ["global pre", "pre", "post", "global post"]
        assert torch.equal(seen[1][1], torch.ones_like(p))
        assert not torch.equal(seen[2][1], torch.ones_like(p))

    @optims([OURS])
    def test_state_dict_hooks_see_and_may_replace_it(self, device, dtype, optim_info):
        p = Parameter(torch.ones(2, 2, device=device, dtype=dtype))
        optimizer = optim_info.optim_cls([p])
        calls = []
        optimizer.register_state_dict_pre_hook(lambda o: calls.append("pre"))
        optimizer.register_state_dict_post_hook(lambda o, d: {**d, "note": 1})
        saved = optimizer.state_dict()
        assert calls == ["pre"]
        assert saved["note"] == 1

        def lower(o, state_dict):
            state_dict["param_groups"] = [{**g, "lr": 0.5} for g in state_dict["param_groups"]]

        def raise_momentum(o, state_dict):
            groups = [{**g, "momentum": g["lr"] + 0.1} for g in state_dict["param_groups"]]
            return {**state_dict, "param_groups": groups}

        optimizer.register_load_state_dict_pre_hook(raise_momentum)
        optimizer.register_load_state_dict_pre_hook(lower, prepend=True)
        optimizer.register_load_state_dict_post_hook(lambda o: calls.append(o.state[p]["velocity"].dtype))
        for _ in range(2):
            optimizer.load_state_dict(saved)
            assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.5, 0.6)
        assert calls == ["pre", dtype, dtype]

    @optims([OURS])
    def test_a_group_has_options_of_its_own(self, device, dtype, optim_info):
        still, decayed, faster = (Parameter(torch.ones(2, 2, device=device, dtype=dtype)) for _ in range(3))
        groups = [
            {"params": [still]},
            {"params": [decayed], "weight_decay": 0.5},
            {"params": [faster], "weight_decay": 0.5, "lr": 0.2},
        ]
        optimizer = optim_info.optim_cls(groups, lr=0.1, momentum=0.0)
        for p in (still, decayed, faster):
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert_close(still, torch.ones_like(still))
        assert_close(decayed, torch.full_like(decayed, 0.95))
        assert_close(faster, torch.full_like(faster, 0.9))
        with pytest.raises(ValueError, match="momentum must be 0 or more, got -1"):
            optim_info.optim_cls([{"params": [still]}, {"params": [decayed], "momentum": -1}])

    @optims([OURS])
    def test_a_group_added_late_begins_with_its_own_rate(self, device, dtype, optim_info):
        model, late = network(device, dtype), network(device, dtype)
        optimizer = optim_info.optim_cls(model.named_parameters(), lr=0.03, rule="paper")
        train(model, optimizer, epochs=2)
        before = optimizer.learning_rates()
        optimizer.add_param_group(
            {"params": [(f"late.{n}", p) for n, p in late.named_parameters()], "lr": 0.5}
        )
        after = optimizer.learning_rates()
        assert {n: after[n] for n in before} == before
        assert {after[n] for n in after if n not in before} == {0.5}
        train(late, optimizer)
        assert optimizer.learning_rates()["late.0.weight"] != 0.5
        for wrong, least in (("zeta", "above 0"), ("lr0", "0 or more")):  # lr0 comes with another's groups
            with pytest.raises(ValueError, match=f"{wrong} must be {least}, got -1"):
                optimizer.add_param_group({"params": [("x", Parameter(torch.ones(1)))], wrong: -1})
        assert len(optimizer.param_groups) == 2

    @optims([OURS])
    def test_rates_go_by_name_or_by_place(self, device, dtype, optim_info):
        model = network(device, dtype)
        names = [name for name, _ in model.named_parameters()]
        assert list(optim_info.optim_cls(model.named_parameters()).learning_rates()) == names
        anonymous = optim_info.optim_cls([{"params": [p]} for p in model.parameters()])
        assert list(anonymous.learning_rates()) == [f"{g}.0" for g in range(len(names))]

    @optims([OURS])
    def test_zero_grad_clears_or_zeroes(self, device, dtype, optim_info):
        p = Parameter(torch.ones(2, 2, device=device, dtype=dtype))
        optimizer = optim_info.optim_cls([p])
        p.grad = torch.ones_like(p)
        optimizer.zero_grad(set_to_none=False)
        assert torch.equal(p.grad, torch.zeros_like(p))
        optimizer.zero_grad()
        assert p.grad is None

    @optims([OURS])
    def test_a_step_tells_autograd_that_weights_changed(self, device, dtype, optim_info):
        p, q = (Parameter(torch.ones(2, 2, device=device, dtype=dtype)) for _ in range(2))
        optimizer = optim_info.optim_cls([p, q])
        loss = p.square().sum()
        p.grad, version = torch.ones_like(p), q._version
        optimizer.step()
        assert q._version == version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    @optims([OURS])
    def test_gradients_are_left_as_they_were(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device):
            p = Parameter(torch.ones(2, 2, device=device, dtype=dtype))
            optimizer = optim_info.optim_cls([p], **deepcopy(given.kwargs))
            p.grad = torch.randn_like(p)
            before, version = p.grad.clone(), p.grad._version
            optimizer.step()
            assert torch.equal(p.grad, before)
            assert p.grad._version == version


instantiate_device_type_tests(TestContract, globals(), only_for=("cpu", "cuda"))


@pytest.mark.parametrize("params", [[], [{"params": []}]])
def test_an_empty_list_of_parameters_is_refused_an_empty_group_is_not(params):
    if params:
        optimizer = rmsgd.RMSGD(params)
        optimizer.step()
        optimizer.epoch_step()
    else:
        with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
            rmsgd.RMSGD(params)
