"""TempBalance, LLR and rules of one's own: functions from what was measured to ratios of the rate."""

import math
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_spectrum import with_singular_values
from torch import nn

import rmsgd
from rmsgd.backends.spectra import eigenvalues
from rmsgd.reference import hill_alpha
from rmsgd.tail_rules import LLR, TEMPBALANCE, linear_map
from rmsgd.tails import LayerTail, Slices, TailReport, tail_exponents

LR = 0.01


def tail(name, alpha, values=64, skipped=None):
    return LayerTail(name, (values, values), values, alpha, skipped)


def of(*tails):
    return TailReport(tails)


# -- the formulas, by hand --------------------------------------------------------------------------


def test_the_heaviest_tail_gets_the_lowest_ratio_and_the_lightest_the_highest():
    assert linear_map([2.0, 3.0, 6.0], 0.5, 1.5) == [0.5, 0.75, 1.5]
    assert linear_map([6.0, 2.0, 4.0], 1.0, 5.0) == [5.0, 1.0, 3.0]


def test_equal_tails_leave_the_rate_as_it_is():
    assert linear_map([3.0, 3.0], 0.5, 1.5) == [1.0, 1.0]
    assert linear_map([3.0], 2.0, 5.0) == [2.0]
    assert linear_map([], 0.5, 1.5) == []


def test_a_spectrum_without_any_tail_is_the_lightest_and_moves_no_other():
    assert linear_map([2.0, math.inf, 4.0], 0.5, 1.5) == [0.5, 1.5, 1.5]
    assert linear_map([2.0, math.inf], 0.5, 1.5) == [0.5, 1.5]
    assert linear_map([math.inf, math.inf], 0.5, 1.5) == [1.5, 1.5]


def test_tempbalance_spares_the_ends_and_small_layers():
    report = of(
        tail("stem", 9.0),
        tail("a", 2.0),
        tail("small", 1.5, values=49),
        tail("flat", math.nan),
        tail("b", 3.0, values=50),
        tail("c", 4.0),
        tail("head", 1.1),
    )
    assert TEMPBALANCE(report) == {
        "stem": 1.0,
        "a": 0.5,
        "small": 1.0,
        "flat": 1.0,
        "b": 1.0,
        "c": 1.5,
        "head": 1.0,
    }


def test_llr_gives_embeddings_and_heads_the_highest_ratio():
    report = of(
        tail("transformer.wte.weight", 1.0),
        tail("h.0.attn.weight", 2.0),
        tail("h.0.mlp.multihead_in.weight", 3.0),
        tail("h.1.attn.weight", 4.0),
        tail("lm_head.weight", 9.0),
    )
    ratios = list(LLR(report).values())
    assert ratios == [5.0, 1.0, 3.0, 5.0, 5.0]
    of_kinds = replace(LLR, within=lambda name: name.split(".")[2])
    assert list(of_kinds(report).values()) == [5.0, 1.0, 1.0, 5.0, 5.0]
    assert list(replace(LLR, highest=3.0)(report).values()) == [3.0, 1.0, 2.0, 3.0, 3.0]


def test_a_layer_that_could_not_be_measured_has_no_ratio():
    report = of(tail("a", 2.0), tail("b", math.nan, skipped="NaN or infinite entries"), tail("c", 4.0))
    assert replace(TEMPBALANCE, spare_ends=False)(report) == {"a": 0.5, "c": 1.5}


# -- what is measured -------------------------------------------------------------------------------


def test_the_spectrum_of_a_kernel_is_that_of_its_slices_together():
    weight = torch.randn(6, 5, 3, 2)
    gamma = torch.linalg.svdvals(weight.double().permute(2, 3, 0, 1)).flatten().numpy()
    slices = Slices.of(weight.shape)
    assert slices.values == len(gamma) == 30
    ((alpha, _),) = tail_exponents([(weight, slices)]).tolist()
    assert alpha == pytest.approx(hill_alpha(gamma), rel=1e-3)


STRONG_BESIDE_WEAK = {
    # The upper half of both positions is all of the strong one, whose lower half fp32 cannot tell.
    "two decades": (np.r_[np.linspace(1.0, 0.9, 20), np.linspace(1e-3, 5e-4, 20)], np.full(40, 1e-5)),
    "a power law": (np.geomspace(1.0, 1e-5, 40), np.geomspace(1e-6, 1e-7, 40)),
    "of low rank": (np.r_[np.linspace(1.0, 0.9, 30), np.zeros(10)], np.linspace(1e-2, 1e-3, 40)),
    "both alike": (np.geomspace(1.0, 1e-4, 40), np.geomspace(1.0, 1e-4, 40)),
}


@pytest.mark.parametrize("name", STRONG_BESIDE_WEAK)
def test_the_upper_half_of_a_kernel_is_known_also_where_it_is_that_of_one_position(name):
    gammas = STRONG_BESIDE_WEAK[name]
    slices = [with_singular_values(gamma, 60, seed).float() for seed, gamma in enumerate(gammas)]
    weight = torch.stack(slices, -1)
    exact = np.concatenate([torch.linalg.svdvals(part.double()).numpy() for part in slices])
    ((alpha, _),) = tail_exponents([(weight, Slices.of(weight.shape))]).tolist()
    assert alpha == pytest.approx(hill_alpha(exact), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_eigenvalues_of_many_shapes_are_those_of_each_matrix(dtype):
    shapes = [(40, 30), (7, 90), (40, 30), (1, 5), (30, 40)]
    weights = [torch.randn(shape).to(dtype) for shape in shapes]
    weights[2] = weights[2].t().contiguous().t()
    for weight, found in zip(weights, eigenvalues(weights), strict=True):
        expected = torch.linalg.svdvals(weight.double()).square()
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_weights_of_low_rank_and_of_nan_have_no_tail_and_break_no_other():
    low = torch.outer(torch.randn(20), torch.randn(30))
    broken = torch.randn(20, 30)
    broken[3, 3] = math.nan
    good = torch.randn(20, 30)
    table = tail_exponents([(w, Slices.of(w.shape)) for w in (low, broken, good)])
    assert table.isnan()[:, 0].tolist() == [True, True, False]
    assert table[:, 1].tolist() == [0.0, 1.0, 0.0]
    assert float(table[2, 0]) == pytest.approx(
        hill_alpha(torch.linalg.svdvals(good.double()).numpy()), rel=1e-3
    )


# -- in an optimizer --------------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 16, 3),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 16, 3),
        nn.Flatten(),
        nn.Linear(64, 64),
        nn.Linear(64, 5),
    )
    with torch.no_grad():  # heavier tails the deeper the layer
        for power, i in enumerate((1, 3, 5)):
            model[i].weight[:2] *= 3.0**power
    return model


def made(rule, model=None, **options):
    model = model or network()
    optimizer = torch.optim.AdamW(rmsgd.layer_groups(model.named_parameters()), lr=LR)
    return model, optimizer, rmsgd.LayerRates(optimizer, rule=rule, **options)


def alphas_by_svd(model):
    """As the authors' code measures them, in a loop."""
    found = {}
    for name, p in model.named_parameters():
        if p.ndim > 1:
            parts = p.detach().double().flatten(2).permute(2, 0, 1) if p.ndim == 4 else p.detach().double()
            found[name] = hill_alpha(torch.linalg.svdvals(parts).flatten().numpy())
    return found


def test_tempbalance_sets_the_rates_of_layers_and_of_what_follows_them():
    model, _, rates = made("tempbalance")
    assert set(rates.learning_rates().values()) == {LR}
    rates.step()
    alphas = alphas_by_svd(model)
    inner = ("1.weight", "3.weight", "5.weight")
    expected = np.interp(
        [alphas[n] for n in inner],
        sorted([min(alphas[n] for n in inner), max(alphas[n] for n in inner)]),
        [0.5, 1.5],
    )
    found = rates.learning_rates()
    assert [found[n] / LR for n in inner] == pytest.approx(list(expected), rel=1e-3)
    assert min(expected) == 0.5
    assert max(expected) == 1.5
    assert found["0.weight"] == found["6.weight"] == found["0.bias"] == pytest.approx(LR)
    assert found["1.weight"] == found["1.bias"] == found["2.weight"] == found["2.bias"]
    assert [layer.alpha for layer in rates.report().layers] == pytest.approx(list(alphas.values()), rel=1e-3)
    assert rates.report().to_dict()["layers"][0]["values"] == 27
    # It has no memory: the same weights give the same rates.
    rates.step()
    assert rates.learning_rates() == found


def test_llr_sets_the_rates_of_all_matrices():
    _, optimizer, rates = made("llr")
    rates.step()
    ratios = {name: rate / LR for name, rate in rates.learning_rates().items()}
    assert min(ratios.values()) == pytest.approx(1.0)
    assert max(ratios.values()) == pytest.approx(5.0)
    assert {group["lr"] for group in optimizer.param_groups} == {LR}


def test_the_rates_are_saved_and_loaded():
    model, _, rates = made("tempbalance")
    rates.step()
    saved = deepcopy(rates.state_dict())
    assert saved["rule"] == "tempbalance"
    _, _, other = made("tempbalance", model)
    other.load_state_dict(saved)
    assert other.learning_rates() == rates.learning_rates()
    _, _, stranger = made("llr", model)
    with pytest.raises(ValueError, match="is of the rule 'tempbalance', this LayerRates of 'llr'"):
        stranger.load_state_dict(saved)


def test_a_rule_of_ones_own_is_a_function_from_the_report_to_ratios():
    seen = []

    def half_of_the_first(report):
        seen.append(report)
        return {report.layers[0].name: 0.5}

    _, _, rates = made(half_of_the_first)
    rates.step()
    assert isinstance(seen[0], rmsgd.Report)
    assert rates.report() == seen[0]
    found = rates.learning_rates()
    assert found["0.weight"] == found["0.bias"] == 0.5 * LR
    assert {rate for name, rate in found.items() if not name.startswith("0.")} == {LR}
    assert rates.state_dict()["rule"] == "half_of_the_first"


def test_a_rule_of_ones_own_may_ask_for_tails_and_switch_a_layer_off():
    class Off:
        measures = "tails"

        def __call__(self, report):
            return {layer.name: 0.0 if layer.alpha > 3 else 30.0 for layer in report.measured}

    model, optimizer, rates = made(Off())
    rates.step()
    assert {round(rate / LR) for rate in rates.learning_rates().values()} <= {0, 30}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, rate in rates.learning_rates().items():
        assert torch.equal(before[name], dict(model.named_parameters())[name]) == (rate == 0.0)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda report: None, TypeError, "must return a dict of ratios by the names of layers, got None"),
        (
            lambda report: {"nobody": 1.0},
            ValueError,
            r"ratios of nobody: no such layer was measured.*0\.weight",
        ),
        (
            lambda report: {"0.weight": -1.0},
            ValueError,
            r"ratio of 0\.weight must be 0 or more and finite, got -1\.0",
        ),
        (lambda report: {"0.weight": math.nan}, ValueError, r"ratio of 0\.weight must be 0 or more"),
        (lambda report: {"0.weight": "2"}, ValueError, r"ratio of 0\.weight must be 0 or more.*got '2'"),
        (lambda report: 1 / 0, ZeroDivisionError, "division"),
    ],
)
def test_what_is_no_ratio_changes_nothing(answer, error, message):
    rule = {"answer": lambda report: {layer.name: 2.0 for layer in report.layers}}
    _, _, rates = made(lambda report: rule["answer"](report))
    rates.step()
    before = rates.state_dict()
    rule["answer"] = answer
    with pytest.raises(error, match=message):
        rates.step()
    assert rates.state_dict() == before


@pytest.mark.parametrize("rule", ["tempbalance", "llr", lambda report: {}])
def test_options_of_other_rules_are_refused(rule):
    model = network()
    optimizer = torch.optim.AdamW(rmsgd.layer_groups(model.named_parameters()), lr=LR)
    for options in ({"beta": 0.5}, {"zeta": 2.0}, {"initial_rank": "zero"}):
        with pytest.raises(
            ValueError, match=f"{next(iter(options))} is an option of the rules of the stable rank"
        ):
            rmsgd.LayerRates(optimizer, rule=rule, **options)


@pytest.mark.parametrize(
    "rule", ["tempbalance", "llr", lambda report: {x.name: 2.0 for x in report.measured}]
)
def test_a_layer_of_nan_keeps_its_rate_under_every_rule(rule):
    model, _, rates = made(rule)
    rates.step()
    before = rates.learning_rates()["3.weight"]
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = math.inf
    with pytest.warns(UserWarning, match=r"NaN or infinite weights in 3\.weight"):
        rates.step()
    assert rates.learning_rates()["3.weight"] == before
    assert rates.report().layers[2].skipped == "NaN or infinite entries"
