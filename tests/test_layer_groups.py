"""layer_groups splits parameters into groups of one layer and those that follow it."""

import pytest
import torch
from torch import nn

import rmsgd


def names(groups):
    return [[name for name, _ in group["params"]] for group in groups]


def block(width=4):
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))


def test_every_layer_is_in_a_group_of_its_own_and_is_first_in_it():
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    groups = rmsgd.layer_groups(model.named_parameters(), weight_decay=0.1)
    # The first norm has no layer before it and shares no path: it is by itself.
    assert names(groups) == [
        ["0.weight", "0.bias"],
        ["1.weight", "1.bias", "2.weight", "2.bias"],
        ["3.weight", "3.bias"],
    ]
    assert all(group["weight_decay"] == 0.1 for group in groups)


def test_a_parameter_before_all_layers_is_with_the_layer_of_its_module():
    model = nn.ModuleDict({"a": block(), "b": block()})
    groups = rmsgd.layer_groups(model.named_parameters())
    assert names(groups)[0] == ["a.1.weight", "a.0.weight", "a.0.bias", "a.1.bias"]
    assert names(groups)[1] == ["a.3.weight", "a.3.bias", "b.0.weight", "b.0.bias"]


def test_the_groups_of_an_optimizer_are_split_and_keep_their_options():
    model = block()
    weights = [(n, p) for n, p in model.named_parameters() if p.ndim > 1]
    vectors = [(n, p) for n, p in model.named_parameters() if p.ndim == 1]
    given = [{"params": weights}, {"params": vectors, "weight_decay": 0.0, "lr": 0.5}]
    for source in (given, torch.optim.AdamW(given, weight_decay=0.1).param_groups):
        groups = rmsgd.layer_groups(source, weight_decay=0.1)
        assert names(groups) == [["1.weight"], ["3.weight"], ["0.weight", "0.bias"], ["1.bias"], ["3.bias"]]
        assert [group["weight_decay"] for group in groups[:3]] == [0.1, 0.1, 0.0]
        assert groups[2]["lr"] == 0.5


def test_vectors_of_another_group_are_split_by_the_modules_they_stand_in():
    model = nn.ModuleDict({"a": block(), "b": block()})
    groups = rmsgd.layer_groups(
        [
            {"params": [(n, p) for n, p in model.named_parameters() if p.ndim > 1]},
            {"params": [(n, p) for n, p in model.named_parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
    )
    assert names(groups)[4:] == [
        ["a.0.weight", "a.0.bias", "a.1.bias"],
        ["a.3.bias"],
        ["b.0.weight", "b.0.bias", "b.1.bias"],
        ["b.3.bias"],
    ]
    rmsgd.LayerRates(torch.optim.SGD(groups, lr=0.1))


def test_unnamed_parameters_and_single_tensors_are_split_too():
    model = block()
    groups = rmsgd.layer_groups(model.parameters())
    assert [len(group["params"]) for group in groups] == [2, 2, 2]
    (group,) = rmsgd.layer_groups([{"params": nn.Parameter(torch.ones(3))}])
    assert group["params"][0].shape == (3,)


def test_tied_weights_are_one_parameter():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    groups = rmsgd.layer_groups(model.named_parameters(remove_duplicate=False))
    assert names(groups) == [["embed.weight"]]
    rmsgd.LayerRates(torch.optim.SGD(groups, lr=0.1))


def test_a_frozen_layer_has_a_group_so_that_it_can_be_trained_later():
    model = block().requires_grad_(False)
    model[3].requires_grad_(True)
    assert [len(group) for group in names(rmsgd.layer_groups(model.named_parameters()))] == [2, 2, 2]


def test_no_parameters_are_no_groups_and_torch_says_so():
    assert rmsgd.layer_groups([]) == []
    with pytest.raises(ValueError, match="empty parameter list"):
        torch.optim.SGD(rmsgd.layer_groups([]), lr=0.1)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (block(), TypeError, r"takes model\.named_parameters\(\).*got a Sequential"),
        (torch.ones(3), TypeError, "got a Tensor"),
        ({"params": []}, TypeError, r"a list of groups"),
        ([{"lr": 0.1}], ValueError, r'group 0 has no "params"'),
        ([{"params": None}], TypeError, r'"params" of a group must be parameters, got None'),
        (
            [{"params": [torch.ones(2, 2)] * 2, "param_names": ["a"]}],
            ValueError,
            "2 parameters and 1 param_names",
        ),
        ([("a", 3)], TypeError, "parameter a must be a tensor"),
        ([1.0], TypeError, "parameter 0 must be a tensor"),
        (nn.LazyLinear(3).named_parameters(), TypeError, "parameter weight has no shape yet"),
    ],
)
def test_bad_input_is_named(params, error, message):
    with pytest.raises(error, match=message):
        rmsgd.layer_groups(params)
