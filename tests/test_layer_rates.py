"""LayerRates gives the layers of any optimizer rates of their own, and group["lr"] stays the user's."""

import warnings
from copy import deepcopy

import pytest
import torch
from matrices import planted
from test_frozen_parameters import KINDS
from torch import nn
from torch.optim import lr_scheduler as schedulers

import rmsgd
from rmsgd.integrations import log_dict

LR = 0.03


def network(seed=0):
    torch.manual_seed(seed)
    return planted(nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 3)))


def matrices(seed=0):
    """A network whose parameters are matrices alone, which is what Muon takes."""
    torch.manual_seed(seed)
    return planted(nn.Sequential(nn.Linear(8, 12, bias=False), nn.Tanh(), nn.Linear(12, 6, bias=False)))


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)


def shift(model, amount):
    """Weights that have learned something: their stable rank is another one."""
    with torch.no_grad():
        for p in model.parameters():
            p[0] += amount


def moved(model, optimizer, rates):
    """After two epoch ends the layers have rates that differ."""
    for epoch in range(2):
        rates.step()
        shift(model, epoch + 1.0)
    rates.step()
    assert len(set(rates.learning_rates().values())) > 1
    return rates


OPTIMIZERS = {
    "AdamW": lambda groups, lr: torch.optim.AdamW(groups, lr=lr),
    "AdamW foreach": lambda groups, lr: torch.optim.AdamW(groups, lr=lr, foreach=True),
    "AdamW fused": lambda groups, lr: torch.optim.AdamW(groups, lr=lr, fused=True),
    "SGD": lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=0.01),
    "SGD fused": lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=True),
    "RMSprop": lambda groups, lr: torch.optim.RMSprop(groups, lr=lr),
    "Muon": lambda groups, lr: torch.optim.Muon(groups, lr=lr),
}


def model_for(name):
    if name == "Muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    return matrices() if name == "Muon" else network()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_that_of_the_optimizer_with_each_layers_own_rate(name):
    model = model_for(name)
    optimizer = OPTIMIZERS[name](rmsgd.layer_groups(model.named_parameters()), LR)
    rates = moved(model, optimizer, rmsgd.LayerRates(optimizer))
    other = deepcopy(model)
    applied = rates.learning_rates()
    groups = [{"params": [p], "lr": applied[n]} for n, p in other.named_parameters()]
    expected = OPTIMIZERS[name](groups, LR)
    for seed in range(3):
        for m in (model, other):
            gradients(m, seed)
        optimizer.step()
        expected.step()
        assert [group["lr"] for group in optimizer.param_groups] == [LR] * len(optimizer.param_groups)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.filterwarnings("ignore:learning rates have grown")  # under the letter
@pytest.mark.parametrize("rule", ["rank-momentum", "paper", "release", "published"])
def test_the_layers_have_the_rates_that_rmsgd_gives(rule):
    model, other = network(), network()
    theirs = torch.optim.AdamW(rmsgd.layer_groups(model.named_parameters()), lr=LR)
    rates = rmsgd.LayerRates(theirs, rule=rule)
    ours = rmsgd.RMSGD(other.named_parameters(), lr=LR, rule="bounded" if rule == "rank-momentum" else rule)
    seen = set()
    for epoch in range(4):
        rates.step()
        ours.epoch_step()
        assert rates.learning_rates() == pytest.approx(ours.learning_rates(), rel=1e-12)
        assert rates.report().to_dict() == ours.report().to_dict()
        seen |= set(rates.learning_rates().values())
        for m in (model, other):
            shift(m, 0.1 * epoch)
    assert len(seen) > 2  # the first and at least two others
    # The same numbers are remembered, and none of them in the optimizer.
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert rates.state[p] == {name: ours.state[q][name] for name in rates.state[p]}
    assert theirs.state == {}


def test_sgd_with_the_rates_of_the_release_takes_rmsgds_steps():
    model, other = network(), network()
    theirs = torch.optim.SGD(rmsgd.layer_groups(model.named_parameters()), lr=LR, momentum=0.9)
    rates = rmsgd.LayerRates(theirs, rule="release")
    ours = rmsgd.RMSGD(other.named_parameters(), lr=LR, rule="release")
    for t in range(9):
        for m in (model, other):
            gradients(m, t)
        theirs.step()
        ours.step()
        if t % 3 == 2:
            rates.step()
            ours.epoch_step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_gain_counts_for_the_same_ratio_at_every_lr():
    ratios = []
    for lr in (1e-4, LR, 3.0):
        model = network()
        optimizer = torch.optim.SGD(rmsgd.layer_groups(model.named_parameters()), lr=lr)
        rates = moved(model, optimizer, rmsgd.LayerRates(optimizer)).learning_rates()
        ratios.append({name: rate / lr for name, rate in rates.items()})
    assert ratios[0] == pytest.approx(ratios[1])
    assert ratios[2] == pytest.approx(ratios[1])
    assert all(0.5 <= ratio <= 2.0 for ratio in ratios[0].values())


def test_the_ratio_of_a_layer_is_the_one_computed_by_hand():
    weight = nn.Parameter(torch.zeros(4, 64))
    with torch.no_grad():
        weight[0, 0] = 3.0
    optimizer = torch.optim.SGD([("w", weight)], lr=0.5)
    rates = rmsgd.LayerRates(optimizer, beta=0.5, zeta=0.01)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()  # measures s(0)
    first = 0.25  # one direction of four
    assert rates.learning_rates() == {"w": 0.5}
    rates.step()
    assert rates.report().layers[0].stable_rank == pytest.approx(first)
    with torch.no_grad():
        weight[1, 1] = 3.0
    rates.step()
    n = 4 * 0.03
    gain = 0.01 * n * n / (1 + n * n) * 0.25 / 0.03
    assert rates.learning_rates()["w"] == pytest.approx(0.5 * (1 + gain))
    rates.step()  # no gain: half of the way back
    assert rates.learning_rates()["w"] == pytest.approx(0.5 * (1 + 0.5 * gain))


@pytest.mark.parametrize(("rule", "metric"), [("rank-momentum", "stable_rank"), ("tempbalance", "alpha")])
def test_rates_and_metrics_are_one_dict_for_a_tracker(rule, metric):
    optimizer = torch.optim.SGD(rmsgd.layer_groups(network().named_parameters()), lr=LR)
    rates = rmsgd.LayerRates(optimizer, rule=rule)
    assert log_dict(rates) == {f"learning_rate/{n}": rate for n, rate in rates.learning_rates().items()}
    rates.step()
    found = log_dict(rates)
    assert found["learning_rate/0.weight"] == rates.learning_rates()["0.weight"]
    assert found[f"{metric}/3.weight"] == getattr(rates.report().layers[1], metric)
    assert all(type(value) is float for value in found.values())


# -- group["lr"] stays the user's -------------------------------------------------------------------


def ready(optimizer_of=OPTIMIZERS["SGD"], lr=LR, **options):
    model = network()
    optimizer = optimizer_of(rmsgd.layer_groups(model.named_parameters()), lr)
    rates = moved(model, optimizer, rmsgd.LayerRates(optimizer, **options))
    gradients(model, 0)
    return model, optimizer, rates


def test_the_lr_is_restored_after_a_step_that_raises():
    model, optimizer, _ = ready()
    seen = []

    def closure():
        seen.append([group["lr"] for group in optimizer.param_groups])
        raise KeyError("in the closure")

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert len(set(seen[0])) > 1
    assert {group["lr"] for group in optimizer.param_groups} == {LR}
    gradients(model, 0)
    optimizer.step()  # and the next one is taken
    assert {group["lr"] for group in optimizer.param_groups} == {LR}
    # The class's own step, as somebody calls it who had got hold of it before, does so by hooks.
    hooked = []
    optimizer.register_step_pre_hook(lambda *_: hooked.append([g["lr"] for g in optimizer.param_groups]))
    torch.optim.SGD.step(optimizer)
    assert hooked == seen
    assert {group["lr"] for group in optimizer.param_groups} == {LR}


def test_an_lr_that_is_given_during_a_step_stays():
    _, optimizer, _ = ready()

    def closure():
        for group in optimizer.param_groups:
            group["lr"] = 0.5
        return torch.zeros(())

    optimizer.step(closure)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


@pytest.mark.parametrize("optimizer_of", [OPTIMIZERS["AdamW"], OPTIMIZERS["SGD fused"]])
def test_a_tensor_as_lr_stays_the_users(optimizer_of):
    model, other = network(), network()
    groups = rmsgd.layer_groups(model.named_parameters(), lr=torch.tensor(LR))
    assert len({id(group["lr"]) for group in groups}) == len(groups)
    optimizer = optimizer_of(groups, LR)
    tensors = [group["lr"] for group in optimizer.param_groups]
    rates = moved(model, optimizer, rmsgd.LayerRates(optimizer))
    other.load_state_dict(model.state_dict())
    expected = optimizer_of(
        [{"params": [p], "lr": rates.learning_rates()[n]} for n, p in other.named_parameters()], LR
    )
    for m in (model, other):
        gradients(m, 0)
    optimizer.step()
    expected.step()
    assert all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, tensors, strict=True))
    assert {float(lr) for lr in tensors} == {float(torch.tensor(LR))}
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    for lr in tensors:  # as a scheduler writes it, and not even during a step it is undone
        lr.fill_(0.5)
    optimizer.step(lambda: [lr.fill_(0.25) for lr in tensors] and torch.zeros(()))
    assert {float(lr) for lr in tensors} == {0.25}


def test_one_tensor_as_lr_of_several_groups_is_refused():
    groups = rmsgd.layer_groups(network().named_parameters())
    optimizer = torch.optim.AdamW(groups, lr=torch.tensor(LR))
    with pytest.raises(ValueError, match=r'groups 0 and 1 share one tensor as "lr".*layer_groups'):
        rmsgd.LayerRates(optimizer)


SCHEDULERS = {
    "LambdaLR": lambda opt: schedulers.LambdaLR(opt, lambda t: 1 / (1 + t)),
    "OneCycleLR": lambda opt: schedulers.OneCycleLR(opt, 0.1, total_steps=10),
    "CosineAnnealingLR": lambda opt: schedulers.CosineAnnealingLR(opt, 8),
    "ReduceLROnPlateau": lambda opt: schedulers.ReduceLROnPlateau(opt, patience=0, factor=0.5),
    "MultiplicativeLR": lambda opt: schedulers.MultiplicativeLR(opt, lambda t: 0.9),
}


@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_multiplies_every_rate(name, made):
    model, alone = network(), network()
    groups = rmsgd.layer_groups(model.named_parameters())
    optimizer = torch.optim.SGD(groups, lr=LR, momentum=0.5)
    plain = torch.optim.SGD(alone.parameters(), lr=LR, momentum=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where it does not see that the optimizer has stepped
        first = SCHEDULERS[name](optimizer) if made == "before" else None
        rates = rmsgd.LayerRates(optimizer)
        scheduler = first or SCHEDULERS[name](optimizer)
        pair = scheduler, SCHEDULERS[name](plain)
        for t in range(6):
            gradients(model, t)
            gradients(alone, t)
            optimizer.step()
            plain.step()
            shift(model, 1.0)
            rates.step()
            for each in pair:
                each.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            base = plain.param_groups[0]["lr"]
            assert [group["lr"] for group in optimizer.param_groups] == [base] * len(groups)
            ratios = {layer: rate / base for layer, rate in rates.learning_rates().items()}
            assert len(set(ratios.values())) > 1
            assert all(0.5 <= ratio <= 2.0 for ratio in ratios.values())


def test_an_lr_of_zero_is_a_rate_of_zero_and_no_obstacle():
    model = network()
    optimizer = torch.optim.SGD(rmsgd.layer_groups(model.named_parameters()), lr=0.0)
    rates = rmsgd.LayerRates(optimizer)
    rates.step()
    assert set(rates.learning_rates().values()) == {0.0}
    shift(model, 3.0)
    rates.step()
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    assert len(set(rates.learning_rates().values())) > 1


# -- bad input --------------------------------------------------------------------------------------


def test_groups_that_mix_layers_are_refused_and_named():
    model = network()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=LR)
    step = optimizer.step
    with pytest.raises(ValueError, match=r"group 0 .* 2 layers \(0\.weight, 3\.weight\).*layer_groups"):
        rmsgd.LayerRates(optimizer)
    assert optimizer.step == step
    rmsgd.LayerRates(torch.optim.SGD(rmsgd.layer_groups(optimizer.param_groups), lr=LR))


def test_a_group_of_vectors_that_follow_different_layers_is_refused():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    groups = [
        {"params": [("a.weight", model["a"].weight)]},
        {"params": [("b.weight", model["b"].weight)]},
        {"params": [("a.bias", model["a"].bias), ("b.bias", model["b"].bias)]},
    ]
    with pytest.raises(ValueError, match=r"group 2 has one lr.*a\.weight, b\.weight"):
        rmsgd.LayerRates(torch.optim.SGD(groups, lr=LR))


def test_a_layer_is_first_or_last_in_its_group_and_the_others_follow_it():
    model = network()
    shuffled = [
        {"params": [("1.bias", model[1].bias), ("0.weight", model[0].weight), ("0.bias", model[0].bias)]},
        {"params": [("1.weight", model[1].weight), ("3.bias", model[3].bias), ("3.weight", model[3].weight)]},
    ]
    optimizer = torch.optim.SGD(shuffled, lr=LR)
    rates = moved(model, optimizer, rmsgd.LayerRates(optimizer)).learning_rates()
    assert list(rates) == ["1.bias", "0.weight", "0.bias", "1.weight", "3.bias", "3.weight"]
    assert rates["1.bias"] == rates["0.weight"] == rates["0.bias"]
    assert rates["1.weight"] == rates["3.bias"] == rates["3.weight"]


def test_a_group_may_join_and_another_may_leave():
    _, optimizer, rates = ready()
    more = nn.Linear(6, 6)
    for group in rmsgd.layer_groups(more.named_parameters(prefix="more")):
        optimizer.add_param_group(group)
    known = rates.learning_rates()
    assert known["more.weight"] == LR
    optimizer.step()
    rates.step()
    assert len(rates.report().layers) == 3
    gone = optimizer.param_groups.pop(0)
    optimizer.step()
    rates.step()
    assert set(rates.learning_rates()) == set(known) - {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert rates.learning_rates()["3.weight"] == pytest.approx(known["3.weight"], rel=0.1)
    assert {p for p in rates.state}.isdisjoint(gone["params"])


def test_a_group_that_joins_and_mixes_layers_is_refused_before_the_step():
    model, optimizer, rates = ready()
    pair = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer.add_param_group({"params": list(pair.named_parameters(prefix="pair"))})
    before = [p.detach().clone() for p in model.parameters()]
    for call in (optimizer.step, rates.step):
        with pytest.raises(ValueError, match=r"pair\.0\.weight, pair\.1\.weight"):
            call()
    assert all(map(torch.equal, model.parameters(), before))
    assert {group["lr"] for group in optimizer.param_groups} == {LR}
    del optimizer.param_groups[-1]
    optimizer.step()
    rates.step()


def test_a_tied_weight_is_one_layer_with_one_rate_under_every_rule():
    for rule in ("rank-momentum", "tempbalance", "llr"):
        model = nn.ModuleDict({"embed": nn.Embedding(70, 60), "head": nn.Linear(60, 70, bias=False)})
        model["head"].weight = model["embed"].weight
        optimizer = torch.optim.AdamW(
            rmsgd.layer_groups(model.named_parameters(remove_duplicate=False)), lr=LR
        )
        rates = rmsgd.LayerRates(optimizer, rule=rule)
        rates.step()
        gradients(model, 0)
        optimizer.step()
        assert [layer.name for layer in rates.report().layers] == ["embed.weight"]
        assert list(rates.learning_rates()) == ["embed.weight"]
        assert rates.learning_rates()["embed.weight"] == pytest.approx(5 * LR if rule == "llr" else LR)


def test_a_parameter_in_two_groups_is_refused():
    class Simple:
        def __init__(self, groups):
            self.param_groups = groups

        def step(self): ...

    weight = nn.Parameter(torch.randn(4, 4))
    with pytest.raises(ValueError, match=r"1\.0 is in the groups 0 and 1: a parameter has one rate"):
        rmsgd.LayerRates(Simple([{"params": [weight], "lr": LR}, {"params": [weight], "lr": LR}]))


def test_a_group_that_is_emptied_or_leaves_on_the_way_to_new_rates_takes_nothing_along():
    model, optimizer, _ = ready()
    rates = rmsgd.LayerRates(optimizer, lambda report: {x.name: 3.0 for x in report.layers}, transition=4)
    rates.step()
    optimizer.param_groups[0]["params"].clear()
    assert rates.learning_rates() == pytest.approx(dict.fromkeys(("3.weight", "3.bias"), 1.5 * LR))
    optimizer.step()
    del optimizer.param_groups[0]
    assert rates.learning_rates() == pytest.approx(dict.fromkeys(("3.weight", "3.bias"), 2.0 * LR))
    optimizer.step()
    rates.step()
    assert [layer.name for layer in rates.report().layers] == ["3.weight"]
    assert {group["lr"] for group in optimizer.param_groups} == {LR}
    assert model[3].weight in rates.state


def test_a_frozen_layer_keeps_its_rate_and_is_measured_once_it_is_trained():
    model = network()
    model[3].requires_grad_(False)
    optimizer = torch.optim.SGD(rmsgd.layer_groups(model.named_parameters()), lr=LR)
    rates = rmsgd.LayerRates(optimizer)
    rates.step()
    assert [layer.name for layer in rates.report().layers] == ["0.weight"]
    model[3].requires_grad_(True)
    rates.step()
    assert [layer.name for layer in rates.report().layers] == ["0.weight", "3.weight"]


@pytest.mark.filterwarnings("ignore")  # torch's own, of some kinds
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_frozen_may_be_a_tensor_of_any_kind(kind):
    weight, bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.ones(4))
    made = KINDS[kind]()
    frozen = made if isinstance(made, nn.Parameter) else nn.Parameter(made, requires_grad=False)
    with torch._C.DisableTorchFunctionSubclass():  # a lazy one has no such method
        frozen.requires_grad_(False)
    groups = rmsgd.layer_groups([("a.weight", weight), ("a.frozen", frozen), ("a.bias", bias)])
    optimizer = torch.optim.SGD(groups, lr=LR)
    for rule in ("rank-momentum", "llr"):
        rates = rmsgd.LayerRates(optimizer, rule=rule)
        weight.grad, bias.grad = torch.ones_like(weight), torch.ones_like(bias)
        optimizer.step()
        rates.step()
        optimizer.step()
        assert [layer.name for layer in rates.report().layers] == ["a.weight"]
        assert rates.learning_rates()["a.bias"] == rates.learning_rates()["a.weight"]
        rates.load_state_dict(rates.state_dict())


def test_a_layer_of_nan_keeps_its_rate_and_is_named():
    model, _, rates = ready()
    before = rates.learning_rates()
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nan
    shift(model, 1.0)
    with pytest.warns(UserWarning, match=r"NaN or infinite weights in 3\.weight") as caught:
        rates.step()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert rates.learning_rates()["3.weight"] == before["3.weight"]
    assert rates.learning_rates()["0.weight"] != before["0.weight"]


class Deaf(torch.optim.Optimizer):
    """An optimizer with a rate of its own."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=0.1)


def test_an_optimizer_that_ignores_the_lr_is_named_once():
    model = network()
    optimizer = Deaf(rmsgd.layer_groups(model.named_parameters()), LR)
    groups = list(optimizer.param_groups)
    rmsgd.LayerRates(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()  # without a gradient nothing has to be read
    gradients(model, 0)
    with pytest.warns(UserWarning, match=r"Deaf has taken a step without reading group\['lr'\]") as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    assert all(a is b and type(a) is dict for a, b in zip(optimizer.param_groups, groups, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_reads_the_lr_is_not_named(name):
    model = model_for(name)
    optimizer = OPTIMIZERS[name](rmsgd.layer_groups(model.named_parameters()), LR)
    rmsgd.LayerRates(optimizer)
    gradients(model, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_an_optimizer_that_does_not_derive_from_torchs_is_served_too():
    class Simple:
        def __init__(self, groups):
            self.param_groups = groups

        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data -= group["lr"] * p.grad

    model = network()
    groups = [{"params": [p], "lr": LR} for p in model.parameters() if p.ndim > 1]
    optimizer = Simple(groups)
    rates = moved(model, optimizer, rmsgd.LayerRates(optimizer))
    gradients(model, 0)
    before = model[3].weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(
        model[3].weight.detach(), before - rates.learning_rates()["1.0"] * model[3].weight.grad
    )
    assert groups[0]["lr"] == LR


def test_an_optimizer_that_accelerate_has_wrapped_is_served_as_well():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model, other = network(), network()
    results = []
    for wraps in (False, True):
        m = (model, other)[wraps]
        optimizer = torch.optim.SGD(rmsgd.layer_groups(m.named_parameters()), lr=LR)
        wrapped = accelerator.prepare(optimizer) if wraps else optimizer
        rates = moved(m, wrapped, rmsgd.LayerRates(wrapped))
        gradients(m, 0)
        wrapped.step()
        assert {group["lr"] for group in optimizer.param_groups} == {LR}
        results.append([*rates.learning_rates().values(), *(float(p.detach().sum()) for p in m.parameters())])
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    assert results[0] == pytest.approx(results[1])


def test_a_second_one_takes_the_place_of_the_first():
    _, optimizer, first = ready()
    step = optimizer.step
    second = rmsgd.LayerRates(optimizer)
    assert optimizer.step == step
    assert len(set(first.learning_rates().values())) > 1
    seen = []
    optimizer.step(lambda: seen.append([group["lr"] for group in optimizer.param_groups]) or torch.zeros(()))
    assert set(seen[0]) == {LR} == set(second.learning_rates().values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "rank-momentums"}, "did you mean 'rank-momentum'"),
        ({"rule": None}, "rule must be a function or one of rank-momentum"),
        ({"beta": 1.0}, r"beta must be in \[0, 1\), got 1.0"),
        ({"zeta": 0.0}, "zeta must be above 0"),
        ({"linear": "no"}, "linear must be True or False"),
        ({"initial_rank": "none"}, "initial_rank must be one of zero, measure"),
    ],
)
def test_an_option_out_of_its_range_is_named(options, message):
    optimizer = torch.optim.SGD(rmsgd.layer_groups(network().named_parameters()), lr=LR)
    with pytest.raises(ValueError, match=message):
        rmsgd.LayerRates(optimizer, **options)
    assert "step" not in vars(optimizer)


def test_what_is_no_optimizer_is_refused():
    model = network()
    with pytest.raises(TypeError, match=r"RMSGD moves its learning rates itself: call its epoch_step\(\)"):
        rmsgd.LayerRates(rmsgd.RMSGD(model.parameters()))
    with pytest.raises(TypeError, match=r"an optimizer with param_groups and step\(\)"):
        rmsgd.LayerRates(model)
    optimizer = torch.optim.SGD(rmsgd.layer_groups(model.named_parameters()), lr=LR)
    optimizer.param_groups[1]["lr"] = None
    with pytest.raises(ValueError, match='group 1: "lr" must be a number'):
        rmsgd.LayerRates(optimizer)
    optimizer.param_groups[1]["lr"] = torch.ones(2)
    with pytest.raises(ValueError, match=r'group 1: "lr" must be a number.*shape \(2,\)'):
        rmsgd.LayerRates(optimizer)


def test_a_report_comes_after_a_step_and_nothing_to_measure_is_said_once():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3, 1))], lr=LR)
    rates = rmsgd.LayerRates(optimizer)
    with pytest.raises(RuntimeError, match=r"report\(\) needs a step\(\) of LayerRates first"):
        rates.report()
    with pytest.warns(UserWarning, match="no layer is measured"):
        rates.step()
    rates.step()
    assert rates.report().layers == ()


def test_parameters_that_cannot_be_measured_are_followed_by_nobody_and_keep_the_lr():
    complex_weight = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))
    weight = nn.Parameter(planted(nn.Linear(6, 6)).weight.detach())
    optimizer = torch.optim.SGD(rmsgd.layer_groups([("a", weight), ("b", complex_weight)]), lr=LR)
    rates = rmsgd.LayerRates(optimizer)
    rates.step()
    assert [layer.name for layer in rates.report().layers] == ["a"]
    for p in (weight, complex_weight):
        p.grad = torch.ones_like(p)
    optimizer.step()
