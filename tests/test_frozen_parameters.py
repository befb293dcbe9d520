"""A frozen parameter may be a tensor of any kind; an error names a trained one of a wrong kind."""

import io
from copy import deepcopy

import pytest
import torch
from matrices import planted
from torch import nn
from torch.nn import Parameter
from trainers import import_torchvision

import rmsgd


class Packed(torch.Tensor):
    """A wrapper subclass such as quantised weights: it has a shape and a type, and no memory of its own."""

    @staticmethod
    def __new__(cls, codes):
        shape = (codes.shape[0], 2 * codes.shape[1])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bfloat16, requires_grad=False)

    def __init__(self, codes):
        self.codes = codes

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Packed(args[0].codes)
        raise NotImplementedError(f"{func} of packed weights")


class Untouchable(torch.Tensor):
    """A tensor on which no operation may be called and no attribute read that torch knows."""

    asked = None

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if cls.asked is not None:
            cls.asked.append(func)
        return super().__torch_function__(func, types, args, kwargs)


def nested(layout):
    parts = [torch.ones(2, 3), torch.ones(4, 3)]
    return torch.nested.nested_tensor(parts, layout=layout)


KINDS = {
    "uint8": lambda: torch.zeros(8, 1, dtype=torch.uint8),
    "int8": lambda: torch.zeros(8, 4, dtype=torch.int8),
    "bool": lambda: torch.ones(3, 4, dtype=torch.bool),
    "float8": lambda: torch.ones(3, 4).to(torch.float8_e4m3fn),
    "complex": lambda: torch.ones(3, 4, dtype=torch.complex64),
    "sparse": lambda: torch.eye(4).to_sparse(),
    "csr": lambda: torch.eye(4).to_sparse_csr(),
    "meta": lambda: torch.ones(3, 4, device="meta"),
    "expanded": lambda: torch.ones(1, 4).expand(3, 4),
    "negative": lambda: torch.zeros(2, 3, dtype=torch.complex64).conj().imag,
    "nested": lambda: nested(torch.strided),
    "jagged": lambda: nested(torch.jagged),
    "wrapper": lambda: Packed(torch.zeros(3, 2, dtype=torch.uint8)),
    "lazy": lambda: nn.LazyLinear(3).weight,
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.qint8),
}
COPIED = KINDS.keys() - {"lazy", "wrapper", "nested", "jagged", "sparse", "csr"}
"""The kinds that torch itself can copy."""

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")


def thaw(p, on=True):
    with torch._C.DisableTorchFunctionSubclass():  # a lazy one has no such method
        return p.requires_grad_(on)


def frozen(kind):
    tensor = KINDS[kind]()
    return thaw(tensor, False) if isinstance(tensor, Parameter) else Parameter(tensor, False)


def network():
    torch.manual_seed(0)
    return planted(nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 8)))


def train(model, optimizer, steps=range(4)):
    for seed in steps:
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        if seed % 2:
            optimizer.epoch_step()


def beside(model, kind, first=False):
    """The optimizer of a network and of something frozen in front of it or behind it."""
    mine = [("frozen", kind if isinstance(kind, torch.Tensor) else frozen(kind))]
    named = list(model.named_parameters())
    return rmsgd.RMSGD(mine + named if first else named + mine, rule="paper", step_size=1, gamma=0.9)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_parameter_of_any_kind_changes_nothing_for_the_others(kind, first):
    model, alone = network(), network()
    optimizer = beside(model, kind, first)
    other = rmsgd.RMSGD(alone.named_parameters(), rule="paper", step_size=1, gamma=0.9)
    train(model, optimizer)
    train(alone, other)
    assert all(map(torch.equal, model.parameters(), alone.parameters()))
    rates = optimizer.learning_rates()
    assert rates.pop("frozen") > 0.0
    assert rates == other.learning_rates()
    assert [layer.name for layer in optimizer.report().layers] == ["0.weight", "2.weight"]


def test_nothing_is_asked_of_a_frozen_parameter(monkeypatch):
    model = network()
    optimizer = beside(model, torch.ones(3, 4).as_subclass(Untouchable))  # torch looks whether it is a leaf
    monkeypatch.setattr(Untouchable, "asked", [])
    train(model, optimizer)
    optimizer.learning_rates()
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer)
    assert Untouchable.asked == []


def test_frozen_parameters_alone_are_left_alone():
    optimizer = rmsgd.RMSGD([("a", frozen("uint8")), ("b", frozen("meta"))], lr=0.1)
    optimizer.step()
    with pytest.warns(UserWarning, match="no layer is measured"):
        optimizer.epoch_step()
    assert optimizer.learning_rates() == {"a": 0.1, "b": 0.1}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_beside_a_frozen_parameter_resumes(kind):
    whole, first, second = network(), network(), network()
    optimizers = [beside(model, kind) for model in (whole, first, second)]
    train(whole, optimizers[0], range(8))
    train(first, optimizers[1], range(4))
    file = io.BytesIO()
    torch.save(optimizers[1].state_dict(), file)
    file.seek(0)
    optimizers[2].load_state_dict(torch.load(file, weights_only=True))
    second.load_state_dict(first.state_dict())
    train(second, optimizers[2], range(4, 8))
    assert all(map(torch.equal, second.parameters(), whole.parameters()))
    assert optimizers[2].learning_rates() == optimizers[0].learning_rates()


@pytest.mark.parametrize("kind", sorted(COPIED))
def test_a_deep_copy_beside_a_frozen_parameter_goes_on(kind):
    model = network()
    optimizer = beside(model, kind)
    train(model, optimizer)
    twin, twins = deepcopy((model, optimizer))
    for one in ((model, optimizer), (twin, twins)):
        train(*one, range(4, 8))
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_what_was_frozen_joins_when_it_thaws_and_leaves_when_it_freezes():
    model, alone = network(), network()
    model[0].requires_grad_(False)
    optimizer = rmsgd.RMSGD(model.named_parameters(), momentum=0.5)
    only = rmsgd.RMSGD(alone[2].parameters(), momentum=0.5)
    for m, o in ((model, optimizer), (alone, only)):
        m[0].weight.grad = None
        for p in m[2].parameters():
            p.grad = torch.ones_like(p)
        o.step()
    assert torch.equal(model[2].weight, alone[2].weight)
    before = model[0].weight.detach().clone()
    model[0].requires_grad_(True)
    train(model, optimizer)
    assert not torch.equal(model[0].weight, before)
    model.zero_grad()
    model[0].requires_grad_(False)
    at = model[0].weight.detach().clone()
    model[2].weight.data = model[2].weight.data.clone()  # for which the tables are made anew
    model[2].weight.grad = torch.ones_like(model[2].weight)
    optimizer.step()
    optimizer.epoch_step()
    assert torch.equal(model[0].weight, at)
    assert [layer.name for layer in optimizer.report().layers] == ["2.weight"]


TRAINED = {
    "complex": r"is complex .*complex64.*view_as_real",
    "float8": r"has dtype torch.float8_e4m3fn; RMSGD knows float32",
    "sparse": r"has layout torch.sparse_coo",
    "expanded": r"has elements that share memory",
    "negative": r"is the negative",
    "nested": r"is a nested tensor",
    "jagged": r"is a nested tensor",
    "wrapper": r"is of type Packed, which has no memory.*requires_grad_\(False\).*as LoRA does",
    "lazy": r"has no shape yet.*call the model once",
}


@pytest.mark.parametrize("kind", TRAINED)
def test_what_is_trained_and_cannot_be_is_named_when_it_is_given(kind):
    p = frozen(kind)
    thaw(p)
    ours = rmsgd.RMSGD([Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match=rf"parameter 0\.1 {TRAINED[kind]}") as caught:
        rmsgd.RMSGD([Parameter(torch.ones(2)), p])
    assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match=rf"parameter 1\.0 {TRAINED[kind]}"):
        ours.add_param_group({"params": [p]})
    assert len(ours.param_groups) == 1
    ours.step()


@pytest.mark.parametrize("kind", TRAINED)
def test_what_thaws_and_cannot_be_trained_is_named_at_its_first_epoch_end_and_nothing_changes(kind):
    model = network()
    p = frozen(kind)
    optimizer = beside(model, p)
    train(model, optimizer)
    thaw(p)
    before, rates = deepcopy(list(model.parameters())), optimizer.learning_rates()
    with pytest.raises(TypeError, match=f"parameter frozen {TRAINED[kind]}"):
        optimizer.epoch_step()
    assert all(map(torch.equal, model.parameters(), before))
    thaw(p, False)
    assert optimizer.learning_rates() == rates
    train(model, optimizer)


@pytest.mark.parametrize("kind", ["uint8", "complex", "int8", "expanded"])
def test_what_is_given_a_gradient_and_cannot_be_trained_is_named_and_nothing_changes(kind):
    model = network()
    p = frozen(kind)
    optimizer = beside(model, p)
    train(model, optimizer)
    before = deepcopy(list(model.parameters()))
    p.grad = torch.ones(p.shape).to(p.dtype)
    with pytest.raises(TypeError, match="parameter frozen "):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))
    p.grad = None
    train(model, optimizer)


def test_a_loaded_state_leaves_what_has_thawed_since_to_the_step():
    model = network()
    p = frozen("wrapper")
    optimizer = beside(model, p)
    train(model, optimizer)
    thaw(p)
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(TypeError, match="parameter frozen is of type Packed"):
        optimizer.epoch_step()


# -- the packages that quantise ------------------------------------------------------------------


def trained_adapters(model, adapters):
    """Trains the parameters that are not frozen, on random gradients; the base must stay as it was."""
    optimizer = rmsgd.RMSGD(model.named_parameters())
    x = torch.randn(16, 64)
    before = model(x).detach()
    for _ in range(2):
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        optimizer.epoch_step()
    assert model(x).square().mean() < before.square().mean()
    assert [layer.name for layer in optimizer.report().layers] == adapters
    assert optimizer.learning_rates().keys() == dict(model.named_parameters()).keys()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    return optimizer


@pytest.fixture
def int8():
    """Makes the weights of a model's layers of these names torchao's Int8Tensor."""
    torchao = pytest.importorskip("torchao.quantization")

    def int8(model, ending=""):
        torchao.quantize_(
            model,
            torchao.Int8WeightOnlyConfig(),
            filter_fn=lambda module, name: isinstance(module, nn.Linear) and name.endswith(ending),
        )

    return int8


def test_a_head_is_trained_on_a_quantised_body(int8):
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    model[0].requires_grad_(False)
    int8(model, "0")
    optimizer = trained_adapters(model, ["2.weight"])
    thaw(model[0].weight)
    with pytest.raises(TypeError, match=r"parameter 0\.weight is of type Int8Tensor, .* as LoRA does"):
        optimizer.epoch_step()


def test_pefts_lora_is_trained_over_a_quantised_base(int8):
    import_torchvision()
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0", "2"], r=4))
    int8(model, "base_layer")
    names = [f"base_model.model.{i}.lora_{side}.default.weight" for i in (0, 2) for side in "AB"]
    trained_adapters(model, names)
