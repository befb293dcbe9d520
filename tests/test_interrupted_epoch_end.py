"""An epoch end that Ctrl-C or an error ends early has changed nothing, and the next one goes on."""

import pytest
import torch
from matrices import planted
from torch import nn

import rmsgd
from rmsgd.optim.device_rates import DeviceRates
from rmsgd.rules import RULES


def network():
    torch.manual_seed(0)
    return planted(nn.Sequential(nn.Conv2d(2, 8, 3), nn.Flatten(), nn.Linear(32, 6)))


def gain(model):
    """A change of the weights that moves every stable rank."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.linspace(-1, 1, p.numel()).view_as(p))


def raising(error):
    def function(*arguments):
        raise error

    return function


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("rule", RULES)
def test_rmsgd_goes_on_as_before(rule, error, monkeypatch):
    def optimizer(model):
        return rmsgd.RMSGD(model.named_parameters(), rule=rule, step_size=1, gamma=0.5)

    disturbed, undisturbed = network(), network()
    mine, other = optimizer(disturbed), optimizer(undisturbed)
    for _ in range(3):
        gain(disturbed)
        gain(undisturbed)
        other.epoch_step()
        before = mine.learning_rates()
        monkeypatch.setattr(DeviceRates, "_measurement", raising(error))
        with pytest.raises(error):
            mine.epoch_step()
        monkeypatch.undo()
        assert mine.learning_rates() == before
        mine.epoch_step()
    assert mine.learning_rates() == other.learning_rates()
    assert str(mine.state_dict()) == str(other.state_dict())


@pytest.mark.parametrize("rule", ["rank-momentum", "tempbalance"])
def test_layer_rates_go_on_as_before(rule, monkeypatch):
    def rates(model):
        return rmsgd.LayerRates(torch.optim.SGD(rmsgd.layer_groups(model.named_parameters()), lr=0.1), rule)

    disturbed, undisturbed = network(), network()
    mine, other = rates(disturbed), rates(undisturbed)
    gain(disturbed)
    gain(undisturbed)
    other.step()
    with monkeypatch.context() as patch:
        patch.setattr(DeviceRates, "_measurement", raising(KeyboardInterrupt))
        patch.setattr(DeviceRates, "set_ratios", raising(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            mine.step()
    with pytest.raises(RuntimeError, match="nothing has been measured yet"):
        mine.report()
    mine.step()
    assert mine.learning_rates() == other.learning_rates()
    assert str(mine.state_dict()) == str(other.state_dict())
