"""Which parameters are probed, how weights unfold, and whom the others follow."""

import warnings

import pytest
import torch
from torch import nn

import rmsgd
from rmsgd.layers import as_matrix, leader_of, unfoldings
from rmsgd.rules import RULES

PAPER = {"probe": True, "linear": True, "rule": "paper"}


def test_a_conv_weight_has_an_in_mode_and_an_out_mode():
    found = {u.modes: (u.L, u.M, u.channels) for u in unfoldings((16, 8, 3, 3))}
    assert found == {("in",): (8, 144, (8,)), ("out",): (16, 72, (16,))}


def test_the_modes_of_a_1x1_kernel_share_one_spectrum():
    (only,) = unfoldings((16, 8, 1, 1))
    assert (only.modes, only.L, only.M, only.channels) == (("in", "out"), 8, 16, (8, 16))


def test_the_modes_of_a_1x3_kernel_are_two_spectra():
    found = {u.modes: (u.L, u.M) for u in unfoldings((16, 8, 1, 3))}
    assert found == {("in",): (8, 48), ("out",): (16, 24)}


def test_a_mode_with_one_row_is_left_out():
    assert [u.modes for u in unfoldings((8, 1, 3, 3))] == [("out",)]
    assert unfoldings((5, 1)) == ()


def test_unfolding_gives_the_modes_matrix_with_the_smaller_side_first():
    weight = torch.randn(4, 3, 2, 2)
    into, out = unfoldings(weight.shape)
    assert torch.equal(as_matrix(weight, into), weight.permute(1, 0, 2, 3).reshape(3, 16))
    assert torch.equal(as_matrix(weight, out), weight.reshape(4, 12))
    wide = torch.randn(2, 9)
    (matrix,) = unfoldings((9, 2))
    assert torch.equal(as_matrix(wide.T, matrix), wide)


def test_the_release_divides_by_channels_and_counts_missing_modes_as_zero():
    weights = RULES["release"].mode_weights
    assert weights((16, 8, 3, 3), 0.03) == [1 / 16, 1 / 32]
    assert weights((8, 1, 3, 3), 0.03) == [1 / 16]
    assert weights((16, 8, 1, 1), 0.03) == [(1 / 8 + 1 / 16) / 2]
    assert RULES["paper"].mode_weights((16, 8, 1, 1), 0.03) == [1.0]


def probed(module, **options):
    optimizer = rmsgd.RMSGD(module.named_parameters(), **options)
    optimizer.epoch_step()
    return [layer.name for layer in optimizer.report().layers]


def test_probed_are_floating_weights_of_two_to_five_dimensions():
    module = nn.ModuleDict(
        {
            "linear": nn.Linear(6, 4),
            "conv1d": nn.Conv1d(3, 5, 3),
            "conv2d": nn.Conv2d(3, 5, 3),
            "conv3d": nn.Conv3d(3, 5, 2),
            "norm": nn.BatchNorm2d(5),
            "column": nn.Linear(1, 7, bias=False),
        }
    )
    weights = ["linear.weight", "conv1d.weight", "conv2d.weight", "conv3d.weight"]
    assert probed(module) == weights
    assert probed(module, linear=False) == weights[1:]
    assert probed(module, rule="release") == ["linear.weight", "conv2d.weight", "column.weight"][:2]


def test_published_leaves_kernels_with_a_side_of_1_alone():
    module = nn.Sequential(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, (1, 3)))
    assert probed(module, rule="published") == ["1.weight"]


def test_frozen_parameters_and_groups_that_opt_out_are_not_probed():
    a, b, c = (nn.Linear(6, 5) for _ in range(3))
    a.requires_grad_(False)
    groups = [
        {"params": [*a.parameters(), *b.parameters()]},
        {"params": list(c.parameters()), "probe": False},
    ]
    optimizer = rmsgd.RMSGD(groups, lr=0.1)
    optimizer.epoch_step()
    assert [layer.name for layer in optimizer.report().layers] == ["0.2"]
    a.requires_grad_(True)
    optimizer.epoch_step()
    assert [layer.name for layer in optimizer.report().layers] == ["0.0", "0.2"]


def test_a_warning_says_when_there_is_no_layer_to_measure_unless_that_was_asked_for():
    with pytest.warns(UserWarning, match="no layer is measured, so every learning rate stays"):
        rmsgd.RMSGD(nn.Linear(6, 5).parameters(), linear=False).epoch_step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rmsgd.RMSGD([{"params": nn.Linear(6, 5).parameters(), "probe": False}]).epoch_step()


def epoch_ends_without_warning(optimizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.epoch_step()


def test_the_warning_comes_once_for_an_optimizer_and_not_for_one_of_biases_alone():
    optimizer = rmsgd.RMSGD(nn.Linear(6, 5).parameters(), linear=False)
    with pytest.warns(UserWarning, match="no layer is measured"):
        optimizer.epoch_step()
    epoch_ends_without_warning(optimizer)
    for p in nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5)).parameters():  # an optimizer for each
        epoch_ends_without_warning(rmsgd.RMSGD([p], lr=1e-3))


def test_the_warning_comes_where_all_that_could_be_measured_is_frozen():
    model = nn.Linear(6, 5)
    model.weight.requires_grad_(False)
    with pytest.warns(UserWarning, match="matrices that are trained$"):
        rmsgd.RMSGD(model.parameters()).epoch_step()


def test_a_shared_weight_counts_once():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    assert probed(model) == ["0.weight"]


@pytest.mark.parametrize(
    ("name", "earlier", "expected"),
    [
        ("layer2.bn.bias", 0, 0),  # its own group decides first
        ("layer2.bn.bias", None, 1),  # else the longest common module path
        ("head.norm.weight", None, -1),  # nothing in common: the mean ratio
        (None, None, -1),
    ],
)
def test_who_leads_a_parameter_that_is_not_probed(name, earlier, expected):
    assert (
        leader_of(name, earlier, ["layer1.conv.weight", "layer2.conv.weight", "layer2.conv2.weight"])
        == expected
    )


def test_under_the_released_rule_a_parameter_before_every_layer_keeps_its_rate():
    parameters = [("bias", nn.Parameter(torch.zeros(4))), ("weight", nn.Parameter(torch.randn(6, 4)))]
    optimizer = rmsgd.RMSGD(parameters, lr=0.1, rule="release")
    optimizer.epoch_step()
    assert optimizer.learning_rates()["bias"] == 0.1 != optimizer.learning_rates()["weight"]


def test_followers_take_their_leaders_ratio_times_their_own_groups_lr():
    conv, norm = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)
    groups = [
        {"params": [("block.conv.weight", conv.weight)], "lr": 0.1},
        {"params": [("block.norm.weight", norm.weight), ("other.bias", norm.bias)], "lr": 0.02},
    ]
    optimizer = rmsgd.RMSGD(groups)
    optimizer.epoch_step()
    rates = optimizer.learning_rates()
    assert rates["block.norm.weight"] == pytest.approx(rates["block.conv.weight"] / 0.1 * 0.02, rel=1e-14)
    assert rates["other.bias"] == pytest.approx(rates["block.conv.weight"] / 0.1 * 0.02, rel=1e-14)
    assert list(rates) == ["block.conv.weight", "block.norm.weight", "other.bias"]


def test_a_follower_in_a_group_without_layers_goes_by_name_and_not_by_order():
    conv, norm, head = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Linear(8, 9)
    layers = [("block.conv.weight", conv.weight), ("head.weight", head.weight)]
    optimizer = rmsgd.RMSGD(
        [{"params": layers}, {"params": [("block.norm.weight", norm.weight)]}], beta=0.5, initial_rank="zero"
    )
    with torch.no_grad():
        head.weight[0] += 10.0
    optimizer.epoch_step()
    rates = optimizer.learning_rates()
    assert rates["block.norm.weight"] == rates["block.conv.weight"] != rates["head.weight"]
