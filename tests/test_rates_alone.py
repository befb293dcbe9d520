"""The epoch end moves the rates of any optimizer: it needs neither RMSGD nor its step."""

from collections import ChainMap

import pytest
import torch
from matrices import planted
from torch import nn

import rmsgd
from rmsgd.optim.rates import Rates
from rmsgd.optim.records import by_device, records_of
from rmsgd.optim.state import complete_rates


def network():
    torch.manual_seed(0)
    return planted(nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 3)))


def options_of_rmsgd(lr, **changed):
    """The options that a group needs for its rates to move: RMSGD's defaults, except the given ones."""
    (group,) = rmsgd.RMSGD([nn.Parameter(torch.ones(1))], lr=lr, **changed).param_groups
    return {name: value for name, value in group.items() if name not in ("params", "lr")}


@pytest.mark.parametrize("rule", ["bounded", "paper", "release"])
def test_the_layers_of_another_optimizer_get_the_rates_that_rmsgd_gives(rule):
    model, other = network(), network()
    theirs = torch.optim.AdamW(model.named_parameters(), lr=0.03)
    ours = rmsgd.RMSGD(other.named_parameters(), lr=0.03, rule=rule, initial_rank="measure")

    groups = [
        ChainMap(options_of_rmsgd(0.03, rule=rule, initial_rank="measure"), g) for g in theirs.param_groups
    ]
    states = {p: {} for p in model.parameters()}
    for p in model.parameters():
        complete_rates(p, states[p], groups[0])
    rates = Rates()
    rates.build(by_device(records_of(groups)), groups, states, None)
    for device in rates.devices:
        device.measure_first()
    ours.step()  # measures first too
    for epoch in range(3):
        for pair in zip(model.parameters(), other.parameters(), strict=True):
            for p in pair:
                p.detach()[0] += epoch + 1.0
        assert rates.epoch_step(groups, states) == []
        ours.epoch_step()
    assert rates.by_name(groups) == ours.learning_rates()
    assert rates.report().to_dict() == ours.report().to_dict()
    assert any(rate != 0.03 for rate in ours.learning_rates().values())
    assert {name: p for name, p in theirs.state.items()} == {}
    names = ("rate", "stable_rank", "epoch", "decay", "ready")
    for state, expected in zip(states.values(), ours.state.values(), strict=True):
        assert state == {name: expected[name] for name in names}

    # The schedule of the other optimizer multiplies, as RMSGD's does.
    theirs.param_groups[0]["lr"] *= 0.1
    ours.param_groups[0]["lr"] *= 0.1
    assert rates.by_name(groups) == ours.learning_rates()
