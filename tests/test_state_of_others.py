"""Entries that others keep in the optimizer's state stay there, and are part of checkpoints and copies."""

import io
import pickle
from collections import OrderedDict, defaultdict
from copy import deepcopy

import pytest
import torch
from matrices import planted
from torch import nn

import rmsgd
from rmsgd.optim.rates import Rates


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return planted(nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 8))).to(dtype)


def step(model, optimizer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p)
    optimizer.step()


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def loaded(optimizer, model):
    other = rmsgd.RMSGD(model.named_parameters())
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    return other


COPIES = {
    "a checkpoint": loaded,
    "deepcopy": lambda optimizer, model: deepcopy(optimizer),
    "pickle": lambda optimizer, model: pickle.loads(pickle.dumps(optimizer)),
}

ENTRIES = {
    "a number": ("mine", 1),
    "a dict": ("mine", {"n": 1, "names": ["a"], "s": torch.ones(3), "deep": {"t": (torch.zeros(2), 2)}}),
    "a tensor": ("mine", torch.arange(3.0)),
    "a key of two": ((0, 1), {"slow": torch.ones(2)}),
    "a list": ("mine", [torch.ones(2), None]),
    "none": ("mine", None),
    "ordered": ("mine", OrderedDict(a=torch.ones(1))),
    "words of ours": ("mine", {"rate": 0.5, "epoch": 7}),
    "a number of its own": (1729, {"slow": torch.ones(2)}),
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return type(a) is type(b) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_an_entry_that_is_no_parameters_stays_through_steps_and_epoch_ends(entry):
    key, value = entry
    model = network()
    optimizer = rmsgd.RMSGD(model.named_parameters())
    optimizer.state[key] = value
    for call in (lambda: step(model, optimizer), optimizer.epoch_step, optimizer.learning_rates):
        call()
        assert optimizer.state[key] is value
    optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(3)))]})
    optimizer.step()
    assert optimizer.state[key] is value


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_an_entry_that_is_no_parameters_goes_through(copy, entry):
    key, value = entry
    model = network()
    optimizer = rmsgd.RMSGD(model.named_parameters())
    step(model, optimizer)
    optimizer.state[key] = deepcopy(value)
    assert same(copy(optimizer, model).state[key], value)


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_added_to_a_parameters_state_goes_through_and_keeps_its_type(copy, dtype):
    model = network(dtype)
    optimizer = rmsgd.RMSGD(model.named_parameters())
    added = {
        "z": torch.rand(30, 20),
        "step": torch.tensor(3.0),
        "count": 7,
        "history": [torch.ones(2, dtype=torch.float64)],
        "nested": defaultdict(int, {"t": torch.arange(3)}),
    }
    if copy is loaded:
        added["nested"] = dict(added["nested"])  # torch.load(weights_only=True) knows no defaultdict
    optimizer.state[model[0].weight].update(deepcopy(added))
    for _ in range(2):
        step(model, optimizer)
        optimizer.epoch_step()
    other = copy(optimizer, model)
    state = next(iter(other.state.values()))
    assert same({name: state[name] for name in added}, added)
    assert other.learning_rates() == optimizer.learning_rates()


def test_what_is_loaded_is_a_copy():
    model = network()
    optimizer = rmsgd.RMSGD(model.named_parameters())
    optimizer.state["mine"] = {"deep": [torch.ones(2)]}
    optimizer.state[model[0].weight]["z"] = {"deep": [torch.ones(2)]}
    checkpoint = optimizer.state_dict()
    other = rmsgd.RMSGD(model.named_parameters())
    other.load_state_dict(checkpoint)
    other.state["mine"]["deep"][0].zero_()
    other.state[model[0].weight]["z"]["deep"][0].zero_()
    assert torch.equal(checkpoint["state"]["mine"]["deep"][0], torch.ones(2))
    assert torch.equal(checkpoint["state"][0]["z"]["deep"][0], torch.ones(2))


def test_parameters_as_keys_of_others_stay_parameters():
    model = network()
    optimizer = rmsgd.RMSGD(model.named_parameters())
    start = {p: p.detach().clone() for p in model.parameters()}
    state_dict = optimizer.state_dict()
    state_dict["state"]["trac"] = start
    optimizer.load_state_dict(state_dict)
    assert same(optimizer.state["trac"], start)
    twins, twin = deepcopy((model, optimizer))
    assert list(map(id, twin.state["trac"])) == list(map(id, twins.parameters()))


def test_a_new_entry_of_others_at_every_step_costs_no_new_tables(monkeypatch):
    model = network()
    optimizer = rmsgd.RMSGD(model.named_parameters())
    step(model, optimizer)
    monkeypatch.delattr(Rates, "build")
    for n in range(3):
        optimizer.state["mine"] = {"n": n}
        step(model, optimizer, n)
        optimizer.state[n] = {}
        step(model, optimizer, n)
    assert optimizer.state["mine"] == {"n": 2}


def test_state_of_a_parameter_that_leaves_is_forgotten_with_what_others_kept_in_it():
    model = network()
    params = list(model.parameters())
    optimizer = rmsgd.RMSGD([{"params": params[:2]}, {"params": params[2:]}])
    optimizer.state["mine"] = 1
    optimizer.state[params[3]]["z"] = torch.ones(1)
    step(model, optimizer)
    del optimizer.param_groups[1]
    assert set(optimizer.state_dict()["state"]) == {"mine", 0, 1}
    optimizer.add_param_group({"params": params[2:]})
    assert "z" not in optimizer.state[params[3]]


@pytest.mark.parametrize("where", ["beside", "within"])
def test_in_another_optimizers_checkpoint_what_is_unknown_is_refused(where):
    model = network()
    sgd = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    step(model, sgd)
    if where == "beside":
        sgd.state["mine"] = {"n": 1}
    else:
        sgd.state[model[0].weight]["z"] = torch.ones(1)
    optimizer = rmsgd.RMSGD(model.named_parameters())
    before = deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"none of its groups: 'mine'|0\.weight in the checkpoint has z: it"):
        optimizer.load_state_dict(sgd.state_dict())
    assert same(optimizer.state_dict()["state"], before["state"])


def test_a_parameters_state_under_a_name_is_not_taken_for_something_of_others():
    optimizer = rmsgd.RMSGD(network().named_parameters())
    state_dict = optimizer.state_dict()
    state_dict["state"]["0.weight"] = state_dict["state"].pop(0)
    with pytest.raises(ValueError, match=r"state for parameters in none of its groups: '0\.weight'"):
        optimizer.load_state_dict(state_dict)


def test_a_wrapper_that_saves_the_state_itself_finds_it_up_to_date():
    model = network()
    optimizer = rmsgd.RMSGD(model.named_parameters(), rule="paper", step_size=1, gamma=0.9)

    def held():  # reads the state without a call of the optimizer
        return [dict(state) for state in optimizer.state.values()]

    for seed in range(3):
        step(model, optimizer, seed)
        assert not any(state["fresh"] for state in held())
        optimizer.epoch_step()
        now = held()
        assert same(now, list(optimizer.state_dict()["state"].values()))
    assert len({state["rate"] for state in now}) > 1
