"""Every scheduler of torch multiplies the layers' rates, and group["lr"] belongs to the user."""

import inspect

import pytest
import torch
from matrices import planted
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

import rmsgd

LR = 0.03


def chained(opt):
    return schedulers.ChainedScheduler([schedulers.StepLR(opt, 2), schedulers.ExponentialLR(opt, 0.9)])


def sequential(opt):
    warm_up, decay = schedulers.LinearLR(opt, 0.1, total_iters=3), schedulers.CosineAnnealingLR(opt, 5)
    return schedulers.SequentialLR(opt, [warm_up, decay], milestones=[3])


SCHEDULERS = {
    "LambdaLR": lambda opt: schedulers.LambdaLR(opt, lambda epoch: 1 / (1 + epoch)),
    "MultiplicativeLR": lambda opt: schedulers.MultiplicativeLR(opt, lambda epoch: 0.9),
    "StepLR": lambda opt: schedulers.StepLR(opt, 2, gamma=0.5),
    "MultiStepLR": lambda opt: schedulers.MultiStepLR(opt, [2, 4]),
    "ConstantLR": lambda opt: schedulers.ConstantLR(opt, 0.5, total_iters=3),
    "LinearLR": lambda opt: schedulers.LinearLR(opt, 0.1, total_iters=3),
    "ExponentialLR": lambda opt: schedulers.ExponentialLR(opt, 0.9),
    "SequentialLR": sequential,
    "PolynomialLR": lambda opt: schedulers.PolynomialLR(opt, total_iters=4, power=2.0),
    "CosineAnnealingLR": lambda opt: schedulers.CosineAnnealingLR(opt, 4),
    "CosineAnnealingWarmRestarts": lambda opt: schedulers.CosineAnnealingWarmRestarts(opt, 3),
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": lambda opt: schedulers.ReduceLROnPlateau(opt, patience=0, factor=0.5),
    "CyclicLR": lambda opt: schedulers.CyclicLR(opt, 0.001, 0.1, step_size_up=2),
    "OneCycleLR": lambda opt: schedulers.OneCycleLR(opt, 0.1, total_steps=10),
    "SWALR": lambda opt: SWALR(opt, swa_lr=0.001, anneal_epochs=3),
}


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 3))
    return planted(model).double()


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)


def advance(scheduler):
    scheduler.step(*([1.0] if isinstance(scheduler, schedulers.ReduceLROnPlateau) else []))


def test_no_scheduler_of_torch_is_left_out():
    known = {
        name
        for name, value in vars(schedulers).items()
        if inspect.isclass(value) and issubclass(value, schedulers.LRScheduler) and not name.startswith("_")
    }
    assert known - {"LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_multiplies_every_rate(name, tensor_lr):
    model, alone = network(), network()
    scheduled = rmsgd.RMSGD(
        model.named_parameters(), lr=torch.tensor(LR, dtype=torch.float64) if tensor_lr else LR, rule="paper"
    )
    plain = rmsgd.RMSGD(alone.named_parameters(), lr=LR, rule="paper")
    scheduler = SCHEDULERS[name](scheduled)
    seen = set()
    for _ in range(8):
        # Equal weights measure equally, so that the schedule is the only difference.
        with torch.no_grad():
            for p, q in zip(model.parameters(), alone.parameters(), strict=True):
                q.copy_(p)
        for optimizer in (scheduled, plain):
            optimizer.epoch_step()
        now = float(scheduled.param_groups[0]["lr"])
        seen.add(now)
        expected = {layer: rate * (now / LR) for layer, rate in plain.learning_rates().items()}
        assert scheduled.learning_rates() == pytest.approx(expected, rel=1e-12)
        gradients(model, 0)
        before = [p.detach().clone() for p in model.parameters()]
        momenta = [scheduled.state[p]["velocity"].clone() for p in model.parameters()]
        scheduled.step()
        momentum = scheduled.param_groups[0]["momentum"]
        for p, old, v, rate in zip(
            model.parameters(), before, momenta, scheduled.learning_rates().values(), strict=True
        ):
            torch.testing.assert_close(p.detach(), old + momentum * v - rate * p.grad)
        advance(scheduler)
    assert len(seen) > 1


@pytest.mark.parametrize("rule", ["paper", "release"])
@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_a_cycled_momentum_enters_each_step(name, rule):
    """Under the release's rule a run whose rates stay equals SGD under the same scheduler."""
    model, other = network(), network()
    ours = rmsgd.RMSGD(model.parameters(), lr=LR, rule=rule)
    theirs = torch.optim.SGD(other.parameters(), lr=LR, momentum=0.9)
    pair = [SCHEDULERS[name](ours), SCHEDULERS[name](theirs)]
    velocity = [torch.zeros_like(p) for p in other.parameters()]
    reference = [p.detach().clone() for p in other.parameters()]
    seen = set()
    for t in range(8):
        for m, optimizer in ((model, ours), (other, theirs)):
            gradients(m, t)
            optimizer.step()
        group = theirs.param_groups[0]
        seen.add(group["momentum"])
        for w, v, p in zip(reference, velocity, other.parameters(), strict=True):
            v.mul_(group["momentum"]).sub_(p.grad, alpha=group["lr"])
            w.add_(v)
        for scheduler in pair:
            scheduler.step()
    assert len(seen) > 2
    expected = reference if rule == "paper" else other.parameters()
    for p, q in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p, q, check_layout=False)


@pytest.mark.parametrize("rule", ["paper", "release"])
def test_an_lr_of_zero_later_is_a_rate_of_zero(rule):
    model = network()
    optimizer = rmsgd.RMSGD(model.named_parameters(), lr=LR, rule=rule, momentum=0.0)
    optimizer.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    gradients(model, 0)
    optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))
    assert set(optimizer.learning_rates().values()) == {0.0}
    optimizer.epoch_step()
    optimizer.param_groups[0]["lr"] = LR
    assert min(optimizer.learning_rates().values()) > 0.0


def test_monitors_read_the_users_lr_in_every_group():
    model = network()
    params = list(model.parameters())
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.3}]
    optimizer = rmsgd.RMSGD(groups, lr=LR)
    scheduler = schedulers.StepLR(optimizer, 1, gamma=0.5)
    for epoch in range(3):
        assert [group["lr"] for group in optimizer.param_groups] == scheduler.get_last_lr()
        assert scheduler.get_last_lr() == pytest.approx([LR * 0.5**epoch, 0.3 * 0.5**epoch])
        gradients(model, 0)
        optimizer.step()
        optimizer.epoch_step()
        scheduler.step()


def test_scheduler_and_optimizer_resume_together():
    def make():
        model = network()
        optimizer = rmsgd.RMSGD(model.named_parameters(), lr=LR)
        return model, optimizer, schedulers.OneCycleLR(optimizer, 0.1, total_steps=12)

    def run(model, optimizer, scheduler, begin, end):
        for t in range(begin, end):
            gradients(model, t)
            optimizer.step()
            scheduler.step()
            if t % 3 == 2:
                optimizer.epoch_step()

    whole = make()
    run(*whole, 0, 10)
    first, second = make(), make()
    run(*first, 0, 5)
    for old, new in zip(first, second, strict=True):
        new.load_state_dict(old.state_dict())
    run(*second, 5, 10)
    assert all(map(torch.equal, second[0].parameters(), whole[0].parameters()))
    assert second[1].learning_rates() == whole[1].learning_rates()
