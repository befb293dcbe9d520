"""A constant, which was not trained, is not a layer, and the report says what it is."""

import math

import pytest
import torch
from torch import nn

import rmsgd
from rmsgd import cli

WEIGHT = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))


def sines(rows, columns):
    angle = torch.arange(rows)[:, None] / 10000 ** (torch.arange(0, columns, 2) / columns)
    return torch.stack((angle.sin(), angle.cos()), 2).flatten(1)


def image_positions(side, columns):
    """The positions of masked autoencoders: a class token, then sines and cosines of rows and of columns."""
    angle = torch.arange(side)[:, None] / 10000 ** (torch.arange(columns // 4) * 4 / columns)
    half = torch.cat((angle.sin(), angle.cos()), 1)
    rows = half.repeat_interleave(side, 0)
    return torch.cat((torch.zeros(1, columns), torch.cat((rows, half.repeat(side, 1)), 1)))[None]


def couplings(l1=1, l2=1, l3=1):
    """The Levi-Civita symbol: the coefficients of three vectors."""
    symbol = torch.zeros(3, 3, 3)
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        symbol[i, j, k], symbol[i, k, j] = 1 / math.sqrt(6), -1 / math.sqrt(6)
    turn = torch.linalg.qr(torch.randn(3, 3))[0]  # any basis will do
    return torch.einsum("ijk,ai,bj,ck->abc", symbol, turn, turn, turn)


BLUR = torch.outer(torch.tensor([1.0, 4, 6, 4, 1]), torch.tensor([1.0, 4, 6, 4, 1])) / 256

CONSTANTS = {
    "a mask of zeros and ones": ("keep", (torch.rand(8, 8) > 0.5).float(), "only zeros and ones"),
    "a causal mask": ("h.0.attn.bias", torch.ones(12, 12).tril()[None, None], "mask"),
    "a mask by its name": ("attn.attn_mask", torch.full((8, 8), -100.0).triu(1) + 0.5, "by its name a mask"),
    "a blur of every channel": ("pool.filter", BLUR.expand(6, 1, 5, 5).clone(), "the same kernel"),
    "one blur": (
        "up.taps",
        BLUR[None, None].repeat(2, 3, 1, 1) * torch.rand(2, 3, 1, 1),
        "exactly symmetric",
    ),
    "a filter by its name": ("pool.filt", torch.randn(6, 1, 3, 3), "by its name a fixed filter"),
    "a table of numbers": ("bins", torch.arange(24.0).view(4, 6), "only whole numbers"),
    "a constant": ("scale", torch.full((4, 6), 0.25), None),
    "whole constants": ("ones", torch.ones(4, 6), "every entry is 1"),
    "positions": ("pe", sines(50, 16), "sines and cosines"),
    "positions of three dimensions": ("encoding", sines(50, 16)[None], "sines and cosines"),
    "positions in halves": (
        "table",
        sines(50, 16)[:, [*range(0, 16, 2), *range(1, 16, 2)]],
        "sines and cosines",
    ),
    "positions of an image": ("pos_embed", image_positions(5, 16), "sines and cosines"),
    "rotary tables": (
        "attn.rotary_emb.cos_cached",
        torch.randn(1, 1, 64, 16),
        "by its name a table of positions",
    ),
    "couplings": ("tp.coefficients", couplings(), "Clebsch-Gordan"),
    "couplings by their name": (
        "conv.tp._w3j_1_1_2",
        torch.randn(3, 3, 5),
        "by its name constants of rotation",
    ),
    "a filter bank": ("mel_scale.fb", torch.rand(20, 8), "by its name a fixed filter"),
}


@pytest.mark.parametrize("kind", CONSTANTS)
def test_a_constant_is_skipped_with_its_reason(kind):
    name, value, reason = CONSTANTS[kind]
    constant, weight = rmsgd.probe({name: value, "weight": WEIGHT}).layers
    assert weight.skipped is None
    if reason is None:
        assert constant.skipped is None  # fractions: trained weights can begin like this too
    else:
        assert reason in constant.skipped


@pytest.mark.parametrize("kind", CONSTANTS)
def test_constants_are_measured_where_that_is_asked_for(kind):
    name, value, _ = CONSTANTS[kind]
    [layer] = rmsgd.probe({name: value}, include_buffers=True).layers
    assert layer.skipped in (None, "a single row or column has no spectrum")


WEIGHTS = {
    "zero": torch.zeros(8, 8),
    "a zero convolution": torch.zeros(8, 4, 3, 3),
    "binary": torch.where(torch.randn(8, 8) > 0, 0.1, -0.1),
    "ternary with a scale": torch.randint(-1, 2, (8, 8)) * 0.07,
    "pruned": torch.randn(64, 100) * (torch.arange(64)[:, None] > 60),
    "symmetric": (lambda w: w + w.t())(torch.randn(8, 8)),
    "orthogonal": torch.linalg.qr(torch.randn(9, 9))[0],
    "one filter per channel": torch.randn(6, 1, 3, 3),
    "learned positions": torch.randn(1, 50, 16),
    "rounded to eight bits": (torch.randn(8, 8) * 100).round() / 100,
    "experts": torch.randn(3, 5, 7),
    "too large for fractions": torch.randn(8, 8) * 1e30,
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_weight_is_measured_whatever_it_looks_like(kind):
    assert rmsgd.probe({"w": WEIGHTS[kind]}).layers[0].skipped is None


def test_numbers_that_are_none_are_called_so():
    for value in (math.nan, math.inf):
        [layer] = rmsgd.probe({"w": torch.full((4, 4), value)}).layers
        assert layer.skipped == "NaN or infinite entries"


def test_the_parameters_of_a_module_are_never_taken_for_constants():
    module = nn.Linear(4, 6)
    nn.init.ones_(module.weight)
    module.register_buffer("mask", torch.ones(4, 4))
    module.register_parameter("filt", nn.Parameter(BLUR.expand(6, 1, 5, 5).clone()))
    reasons = {layer.name: layer.skipped for layer in rmsgd.probe(module).layers}
    assert reasons == {"weight": None, "filt": None, "mask": "a buffer, not a parameter"}
    reasons = {layer.name: layer.skipped for layer in rmsgd.probe(module, include_buffers=True).layers}
    assert set(reasons.values()) == {None}


def test_a_constant_does_not_move_q():
    weights = {"a": torch.randn(20, 30), "b": torch.randn(30, 40)}
    beside = {name: value for name, value, reason in CONSTANTS.values() if reason}
    assert rmsgd.probe({**weights, **beside}).quality == rmsgd.probe(weights).quality


# -- exclude -------------------------------------------------------------------------------------


def test_what_is_excluded_is_not_listed():
    state = {"a.weight": WEIGHT, "b.weight": WEIGHT.clone(), "b.extra": WEIGHT.clone()}
    for exclude, expected in (("b", ["a.weight"]), (["*.weight"], ["b.extra"]), ((), list(state))):
        assert [layer.name for layer in rmsgd.probe(state, exclude=exclude).layers] == expected
    both = rmsgd.probe(state, filter="b", exclude="extra")
    assert [layer.name for layer in both.layers] == ["b.weight"]
    with pytest.raises(ValueError, match="every layer's name matches 'weight', which is excluded"):
        rmsgd.probe(state, filter="a.", exclude="weight")


def test_the_command_excludes_and_includes(capsys, tmp_path):
    torch.save({"a": WEIGHT, "b": WEIGHT.clone(), "mask": torch.ones(4, 4)}, tmp_path / "m.pt")
    cli.main(["probe", str(tmp_path / "m.pt"), "--csv", "--exclude", "[a]", "--exclude", "[b]"])
    assert "by its name a mask" in capsys.readouterr().out.splitlines()[-1]
    cli.main(["probe", str(tmp_path / "m.pt"), "--csv", "--exclude", "[ab]", "--include-buffers"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("mask,4x4,matrix,")
