"""A group may be created with lr = 0, as torch's SGD allows: it stands still until its lr is raised."""

import io
import math

import pytest
import torch
from matrices import planted
from torch import nn
from torch.optim import lr_scheduler as schedulers

import rmsgd
from rmsgd import rules

LR = 0.03


def network():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(2, 16, 3), nn.BatchNorm2d(16), nn.Flatten())
    return planted(nn.ModuleDict({"body": body, "head": nn.Linear(64, 40)})).double()


def groups(model, **body):
    return [
        {"params": list(model["body"].named_parameters("body")), **body},
        {"params": list(model["head"].named_parameters("head"))},
    ]


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)


def run(model, optimizer, begin, end, epoch=2):
    for t in range(begin, end):
        gradients(model, t)
        optimizer.step()
        if (t + 1) % epoch == 0:
            optimizer.epoch_step()


def unchanged(module, before):
    return all(map(torch.equal, module.parameters(), before))


def copies(module):
    return [p.detach().clone() for p in module.parameters()]


@pytest.fixture(params=sorted(rules.RULES))
def rule(request):
    return request.param


def test_a_group_at_zero_stands_still_and_the_others_go_on_without_it(backend):
    model, alone = network(), network()
    optimizer = rmsgd.RMSGD(groups(model, lr=0.0), lr=LR)
    other = rmsgd.RMSGD(groups(alone)[1:], lr=LR)
    before = copies(model["body"])
    run(model, optimizer, 0, 6)
    run(alone, other, 0, 6)
    assert unchanged(model["body"], before)
    assert unchanged(model["head"], copies(alone["head"]))
    rates = optimizer.learning_rates()
    assert {name: rates[name] for name in other.learning_rates()} == other.learning_rates()
    assert {rate for name, rate in rates.items() if name.startswith("body")} == {0.0}
    assert [layer.name for layer in optimizer.report().layers] == ["head.weight"]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0.0)], ids=str)
def test_all_may_stand_still(zero, momentum, recwarn):
    model = network()
    optimizer = rmsgd.RMSGD(model.named_parameters(), lr=zero, momentum=momentum, weight_decay=0.1)
    before = copies(model)
    run(model, optimizer, 0, 4)
    assert unchanged(model, before)
    assert set(optimizer.learning_rates().values()) == {0.0}
    assert not recwarn.list


def test_a_raised_group_begins_as_one_that_is_added_then(backend, rule):
    models = [network(), network()]
    options = {"lr": LR, "rule": rule, "step_size": 1, "gamma": 0.9}
    raised = rmsgd.RMSGD(list(reversed(groups(models[0], lr=0.0))), **options)
    added = rmsgd.RMSGD(groups(models[1])[1:], **options)
    run(models[0], raised, 0, 4)
    run(models[1], added, 0, 4)
    raised.param_groups[1]["lr"] = 0.02
    for p in models[1]["body"].parameters():
        p.grad = None
    added.add_param_group({**groups(models[1])[0], "lr": 0.02})
    if rule in ("release", "published"):  # torch's form remembers gradients also where they move nothing
        for p in models[0]["body"].parameters():
            raised.state[p]["momentum_buffer"].zero_()
    if rule in ("bounded", "paper"):
        assert all(not raised.state[p]["velocity"].any() for p in models[0]["body"].parameters())
    run(models[0], raised, 4, 10)
    run(models[1], added, 4, 10)
    assert raised.param_groups[1]["lr0"] == 0.02
    assert unchanged(models[0], copies(models[1]))
    assert raised.learning_rates() == added.learning_rates()
    assert len(set(raised.learning_rates().values())) > 1


def test_a_late_start_is_measured_where_it_starts():
    model = network()
    optimizer = rmsgd.RMSGD(groups(model, lr=0.0), lr=LR, rule="paper", initial_rank="measure", beta=0.5)
    optimizer.epoch_step()
    with torch.no_grad():
        model["body"][0].weight.mul_(2.0)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    optimizer.epoch_step()  # its weight has not changed since: the rate decays, and no more
    assert optimizer.learning_rates()["body.0.weight"] == pytest.approx(0.05)


SCHEDULES = {
    "by hand": (None, None),
    "initial_lr": (None, 0.1),
    "warm-up": (lambda opt: schedulers.LambdaLR(opt, lambda t: min(t / 4, 1.0)), None),
    "OneCycle": (lambda opt: schedulers.OneCycleLR(opt, 0.1, total_steps=10), None),
    "Cyclic": (lambda opt: schedulers.CyclicLR(opt, 0.01, 0.1, step_size_up=2), None),
    "Sequential": (
        lambda opt: schedulers.SequentialLR(
            opt,
            [
                schedulers.ConstantLR(opt, 0.5, total_iters=3),
                schedulers.CosineAnnealingLR(opt, 4, eta_min=0.01),
            ],
            milestones=[2],
        ),
        None,
    ),
}


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_under_a_schedule_a_run_whose_rates_stay_is_sgds(name, tensor):
    """This holds also where a schedule raises a group from 0, and where a schedule begins at 0."""
    make, initial_lr = SCHEDULES[name]
    zero = torch.tensor(0.0, dtype=torch.float64) if tensor else 0.0
    body = {"lr": zero} if initial_lr is None else {"lr": zero, "initial_lr": initial_lr}
    runs = []
    for optimizer in (lambda g: rmsgd.RMSGD(g, lr=LR, rule="release"), lambda g: torch.optim.SGD(g, lr=LR)):
        model = network()
        given = groups(model, **{k: v.clone() if torch.is_tensor(v) else v for k, v in body.items()})
        optimizer = optimizer(given)
        optimizer.param_groups[0]["momentum"] = optimizer.param_groups[1]["momentum"] = 0.9
        scheduler = make and make(optimizer)
        for t in range(8):
            if make is None and t == 4:
                optimizer.param_groups[0]["lr"] = 0.05
            gradients(model, t)
            optimizer.step()
            if scheduler:
                scheduler.step()
        runs.append((model, optimizer))
    (ours, optimizer), (theirs, _) = runs
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    lr = float(optimizer.param_groups[0]["lr"])
    rates = [r for n, r in optimizer.learning_rates().items() if n.startswith("body")]
    assert rates == pytest.approx([lr] * len(rates), rel=1e-12)


def test_lr0_is_initial_lr_or_the_first_lr_above_zero():
    def lr0(optimizer):
        return [group["lr0"] for group in optimizer.param_groups]

    model = network()
    optimizer = rmsgd.RMSGD(groups(model, lr=0.0), lr=LR)
    assert lr0(optimizer) == [0.0, LR]
    optimizer.param_groups[0]["lr"] = 0.02
    assert optimizer.learning_rates()["body.0.weight"] == 0.02
    optimizer.param_groups[0]["lr"] = 0.04
    optimizer.step()
    assert lr0(optimizer) == [0.02, LR]
    assert optimizer.learning_rates()["body.0.weight"] == 0.04
    optimizer.param_groups[0]["lr"] = 0.0
    assert optimizer.learning_rates()["body.0.weight"] == 0.0
    assert lr0(optimizer) == [0.02, LR]
    assert lr0(rmsgd.RMSGD(groups(model, lr=0.0, initial_lr=0.1))) == [0.1, LR]
    assert lr0(rmsgd.RMSGD(groups(model, lr=0.05, initial_lr=0.1))) == [0.05, LR]
    late = rmsgd.RMSGD(groups(model, lr=0.0))
    late.param_groups[0].update(lr=0.001, initial_lr=0.1)
    assert late.learning_rates()["body.0.weight"] == pytest.approx(0.001)
    assert lr0(late) == [0.1, LR]


@pytest.mark.parametrize("stop", [3, 5, 7])
def test_a_run_resumes_before_and_after_its_group_is_raised(stop, rule):
    def make():
        model = network()
        optimizer = rmsgd.RMSGD(groups(model, lr=0.0), lr=LR, rule=rule)
        return model, optimizer, schedulers.MultiStepLR(optimizer, [6], gamma=0.5)

    def go(model, optimizer, scheduler, begin, end):
        for t in range(begin, end):
            if t == 5:
                optimizer.param_groups[0]["lr"] = 0.04
            run(model, optimizer, t, t + 1)
            scheduler.step()

    whole, first, second = make(), make(), make()
    go(*whole, 0, 10)
    go(*first, 0, stop)
    file = io.BytesIO()
    torch.save([thing.state_dict() for thing in first], file)
    file.seek(0)
    for thing, state_dict in zip(second, torch.load(file, weights_only=False), strict=True):
        thing.load_state_dict(state_dict)
    go(*second, stop, 10)
    assert unchanged(second[0], copies(whole[0]))
    assert second[1].learning_rates() == whole[1].learning_rates()


def test_a_checkpoint_of_sgd_at_zero_loads_and_starts_when_it_is_raised():
    model = network()
    sgd = torch.optim.SGD(groups(model, lr=0.0), lr=LR, momentum=0.9)
    run_sgd = [gradients(model, 0), sgd.step()]
    assert run_sgd
    optimizer = rmsgd.RMSGD(groups(model, lr=0.0), lr=LR)
    optimizer.load_state_dict(sgd.state_dict())
    assert optimizer.learning_rates()["body.0.weight"] == 0.0
    optimizer.param_groups[0]["lr"] = 0.02
    optimizer.epoch_step()
    assert optimizer.param_groups[0]["lr0"] == 0.02
    assert optimizer.learning_rates()["body.0.weight"] > 0.0


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf, "0", torch.zeros(2)], ids=str)
def test_an_lr_that_is_none_is_refused_still(bad):
    with pytest.raises(ValueError, match="lr"):
        rmsgd.RMSGD(groups(network(), lr=bad))
