"""Options that code sets in a group later are checked where they are used, and nothing is lost."""

import copy

import pytest
import torch
from torch import nn

import rmsgd


def trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    optimizer = rmsgd.RMSGD(
        [{"params": model[0].named_parameters()}, {"params": model[1].named_parameters()}], lr=0.03
    )
    model(torch.randn(8, 16)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def everything(model, optimizer):
    state = optimizer.state_dict()["state"]
    return copy.deepcopy(([p.detach() for p in model.parameters()], state))


GONE = object()
STEP = [
    *(
        (name, value)
        for name in ("lr", "momentum", "dampening", "weight_decay")
        for value in (float("nan"), float("inf"))
    ),
    ("lr", None),
    ("lr", "fast"),
    ("lr", torch.ones(2)),
    ("lr", GONE),
    ("momentum", None),
    ("momentum", GONE),
    ("dampening", "x"),
    ("weight_decay", None),
    ("weight_decay", GONE),
    ("nesterov", GONE),
    ("maximize", GONE),
    ("rule", "papr"),
    ("rule", GONE),
    ("lr0", None),
]
EPOCH_END = [
    ("beta", 1.0),
    ("beta", None),
    ("zeta", 0.0),
    ("gamma", -1.0),
    ("step_size", 1.5),
    ("step_size", 0),
    ("min_lr", -1.0),
    ("rule", None),
    ("linear", 2),
    ("probe", "no"),
    ("lr0", -1.0),
    ("zeta", GONE),
    ("probe", GONE),
]


@pytest.mark.parametrize(
    ("call", "name", "value"),
    [("step", *case) for case in STEP] + [("epoch_step", *case) for case in EPOCH_END],
)
def test_what_no_call_can_use_is_named_with_its_group_and_changes_nothing(call, name, value):
    model, optimizer = trained()
    before = everything(model, optimizer)
    good = optimizer.param_groups[1].pop(name)
    if value is not GONE:
        optimizer.param_groups[1][name] = value
    with pytest.raises(ValueError, match=rf"^group 1: {name} (must be|is missing)"):
        getattr(optimizer, call)()
    optimizer.param_groups[1][name] = good
    torch.testing.assert_close(everything(model, optimizer), before, rtol=0, atol=0)
    getattr(optimizer, call)()


def test_a_schedule_may_go_beyond_the_ranges_as_with_torchs_sgd():
    model, optimizer = trained()
    before = model[1].weight.detach().clone()
    for group in optimizer.param_groups:
        group["lr"] = -0.01  # a LambdaLR past its end
        group["momentum"] = 0.0
    optimizer.step()
    torch.testing.assert_close(model[1].weight.detach(), before + 0.01 * model[1].weight.grad)
