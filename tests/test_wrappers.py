"""Inside the wrappers of real packages, a run with RMSGD goes on after a resume as if nothing had happened.

A package that is not installed is skipped. The extra ``integrations`` installs all of them.
"""

import importlib
import io
from copy import deepcopy

import pytest
import torch
from matrices import planted
from torch import nn

import rmsgd

STEPS, EPOCH, STOP = 12, 3, 7


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return planted(nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 8))).to(dtype)


class Plain:
    """A wrapper around one optimizer, with nothing beside it."""

    def __init__(self, model, make, optimizer, **options):
        self.model = model
        self.base = optimizer(model.named_parameters(), lr=0.03, **options)
        self.outer = make(self.base) if make is not None else self.base
        self.others = ()

    def step(self, closure):
        closure()
        self.outer.step()

    def mode(self, name):
        getattr(self.outer, name, lambda: None)()

    def state_dicts(self):
        self.mode("eval")
        return [thing.state_dict() for thing in (self.model, self.outer, *self.others)]

    def load(self, state_dicts):
        for thing, state_dict in zip((self.model, self.outer, *self.others), state_dicts, strict=True):
            thing.load_state_dict(state_dict)


class Sam(Plain):
    """SAM makes its base optimizer itself, and wants a closure for its second pass."""

    def __init__(self, model, make, optimizer, **options):
        self.model = model
        self.outer = make(model.named_parameters(), optimizer, lr=0.03, **options)
        self.base = self.outer.base_optimizer
        self.others = ()

    def step(self, closure):
        closure()
        self.outer.step(closure)


class Averaged(Plain):
    """Averages of the weights, beside an optimizer that is not wrapped."""

    def __init__(self, model, make, optimizer, **options):
        super().__init__(model, None, optimizer, **options)
        self.others = (make(model),)

    def step(self, closure):
        super().step(closure)
        average = self.others[0]
        getattr(average, "update_parameters", getattr(average, "update", None))(self.model)


def named(path):
    """The class or function at that path; skips the test where its package is not installed."""
    module, name = path.rsplit(".", 1)
    importlib.import_module("trainers").import_torchvision()
    pytest.importorskip(module.split(".")[0])
    return getattr(importlib.import_module(module), name)


def with_ema(model):
    return torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )


WRAPPERS = {
    "none": (Plain, None, {}),
    "schedulefree": (Plain, "schedulefree.ScheduleFreeWrapper", {"momentum": 0.0}),
    "schedulefree, both momenta": (Plain, "schedulefree.ScheduleFreeWrapper", {}),
    "timm's Lookahead": (Plain, "timm.optim.Lookahead", {}),
    "Lookahead": (Plain, "pytorch_optimizer.Lookahead", {}),
    "TRAC": (Plain, "pytorch_optimizer.TRAC", {}),
    "OrthoGrad": (Plain, "pytorch_optimizer.OrthoGrad", {}),
    "ScheduleFree": (Plain, "pytorch_optimizer.ScheduleFreeWrapper", {"momentum": 0.0}),
    "SAM": (Sam, "pytorch_optimizer.SAM", {}),
    "torch's EMA": (Averaged, "test_wrappers.with_ema", {}),
    "timm's EMA": (Averaged, "timm.utils.ModelEmaV3", {}),
}


COPIED = ("none", "schedulefree", "schedulefree, both momenta", "torch's EMA", "timm's EMA")
"""The wrappers whose deep copies work. The others cannot be copied around SGD either."""


@pytest.fixture(params=WRAPPERS, ids=lambda name: name)
def wrapped(request):
    """Makes RMSGD for a model within one of the wrappers."""
    kind, path, options = WRAPPERS[request.param]
    make = path and (with_ema if path == "test_wrappers.with_ema" else named(path))

    def wrap(model, optimizer=rmsgd.RMSGD, **more):
        return kind(model, make, optimizer, **({"momentum": 0.9} | options | more))

    wrap.name = request.param
    return wrap


def train(run, begin, end, epoch=EPOCH):
    run.mode("train")
    for t in range(begin, end):
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(16, 20, generator=generator).to(run.model[0].weight)

        def closure(x=x):
            run.base.zero_grad()
            loss = run.model(x).square().mean()
            loss.backward()
            return loss

        run.step(closure)
        if (t + 1) % epoch == 0 and hasattr(run.base, "epoch_step"):
            run.base.epoch_step()


def through_a_file(state_dicts):
    file = io.BytesIO()
    torch.save(state_dicts, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # TRAC and Lookahead have keys of their own


def assert_same(run, other):
    run.mode("eval")
    other.mode("eval")
    torch.testing.assert_close(
        run.model.state_dict(), other.model.state_dict(), rtol=0, atol=0, equal_nan=True
    )
    assert run.base.learning_rates() == other.base.learning_rates()
    assert len(set(run.base.learning_rates().values())) > 1
    for mine, theirs in zip(run.others, other.others, strict=True):
        torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def whole_and_resumed(make):
    """A run in one piece, and one that was stopped, saved and loaded."""
    whole, first, second = (make() for _ in range(3))
    train(whole, 0, STOP)
    whole.mode("eval")  # the other one is saved in this mode
    train(whole, STOP, STEPS)
    train(first, 0, STOP)
    second.load(through_a_file(first.state_dicts()))
    train(second, STOP, STEPS)
    for run in (whole, second):
        run.mode("eval")
    return whole, second


def resumes_around_sgd(wrapped):
    """Whether the wrapper itself can go on after a resume, which that of an older package may not."""
    try:
        whole, second = whole_and_resumed(lambda: wrapped(network(), torch.optim.SGD))
    except KeyError:  # the wrapper's own state is not there
        return False
    weights = zip(whole.model.parameters(), second.model.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in weights)


def test_a_wrapped_run_resumes_bit_for_bit(wrapped):
    try:
        whole, second = whole_and_resumed(lambda: wrapped(network(), rule="paper"))
        assert_same(second, whole)
    except (AssertionError, KeyError):
        if resumes_around_sgd(wrapped):
            raise
        pytest.skip("this version of the wrapper does not resume around SGD either")


def test_a_deep_copy_of_a_wrapped_run_goes_on_as_the_original(wrapped):
    if wrapped.name not in COPIED:
        pytest.skip("this wrapper's copies lack its settings, around any optimizer")
    run = wrapped(network(), rule="paper")
    train(run, 0, STOP)
    copy = deepcopy(run)
    for one in (run, copy):
        train(one, STOP, STEPS)
    assert_same(copy, run)


@pytest.mark.parametrize("rule", ["paper", "release"])
def test_a_wrapped_run_whose_rates_stay_is_the_one_around_sgd(wrapped, rule):
    ours, theirs = (
        wrapped(network(torch.float64), rule=rule),
        wrapped(network(torch.float64), torch.optim.SGD),
    )
    start = network(torch.float64)
    for run in (ours, theirs):
        train(run, 0, STEPS, epoch=STEPS + 1)
        run.mode("eval")
    torch.testing.assert_close(ours.model.state_dict(), theirs.model.state_dict(), rtol=1e-9, atol=1e-12)
    assert not torch.equal(ours.model[0].weight, start[0].weight)


class Sharing(torch.optim.Optimizer):
    """A wrapper that has ``param_groups`` in common with the optimizer inside, and adds to them itself."""

    def __init__(self, base):  # as those of others do, without torch's
        self.base, self.state = base, base.state
        self.defaults, self.param_groups = base.defaults, base.param_groups

    def step(self, closure=None):
        return self.base.step(closure)


AROUND_ONE = [name for name, (kind, path, _) in WRAPPERS.items() if kind is Plain and path is not None]


@pytest.fixture(params=["a shared list", *AROUND_ONE])
def adds_groups(request):
    """Puts an optimizer into one of the wrappers; what comes out is asked to add a group."""
    return Sharing if request.param == "a shared list" else named(WRAPPERS[request.param][1])


@pytest.mark.parametrize("then", ["train", "save", "copy"])
def test_a_group_added_through_a_wrapper_is_as_one_added_to_the_optimizer(adds_groups, then):
    def begun(through):
        model = network()
        optimizer = rmsgd.RMSGD([model[0].weight], lr=0.03)
        outer = through(optimizer)
        outer.add_param_group({"params": [model[2].weight], "lr": 0.01})
        if then == "save":
            again = rmsgd.RMSGD([{"params": [model[0].weight]}, {"params": [model[2].weight]}])
            again.load_state_dict(optimizer.state_dict())
            optimizer = again
        if then == "copy":
            model, optimizer = deepcopy((model, optimizer))
        for t in range(4):
            for p in (model[0].weight, model[2].weight):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
            optimizer.step()
            optimizer.epoch_step()
        return model, optimizer

    (model, ours), (expected, plain) = begun(adds_groups), begun(lambda optimizer: optimizer)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert ours.learning_rates() == plain.learning_rates()
    assert len(set(ours.learning_rates().values())) == 2
    assert [group["lr0"] for group in ours.param_groups] == [0.03, 0.01]


def test_a_group_that_a_wrapper_adds_is_checked_by_name():
    optimizer = rmsgd.RMSGD([("a", nn.Parameter(torch.ones(3, 4)))])
    Sharing(optimizer).add_param_group({"params": [("b", nn.Parameter(torch.ones(2, 2) * 1j))]})
    with pytest.raises(TypeError, match="parameter b is complex"):
        optimizer.step()
