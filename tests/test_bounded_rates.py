"""The default rule: Algorithm 1, with the rate that is applied kept between bounds."""

import warnings

import pytest
import torch
from matrices import low_rank, planted
from torch import nn
from torch.nn import Parameter

import rmsgd
from rmsgd.rules import RULES

LOWEST, HIGHEST = RULES["bounded"].lowest, RULES["bounded"].highest


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 4))


def epochs(optimizer, model, ranks=(2,)):
    """Epoch ends at which the low-rank part of every weight has these ranks, the same for every optimizer."""
    optimizer.step()  # it has no gradient, and takes s(0)
    for epoch, rank in enumerate(ranks):
        torch.manual_seed(epoch)
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim > 1:
                    p.copy_(low_rank(len(p), p[0].numel(), rank, 0.01).view(p.shape))
        optimizer.epoch_step()


def memory(optimizer):
    """The eta of every parameter, by name, as a checkpoint carries it."""
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    return dict(zip(names, (s["rate"] for s in optimizer.state_dict()["state"].values()), strict=True))


def head_of_ten_rows(make):
    """Loss on its training set of a small classifier, whose head's stable rank moves in steps of a tenth."""
    torch.manual_seed(0)
    x = torch.randn(2048, 64)
    y = (x @ torch.randn(64, 10) + torch.randn(2048, 10)).argmax(1)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 10))
    optimizer = make(model.named_parameters())
    for _ in range(8):
        for i in range(0, 2048, 64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[i : i + 64]), y[i : i + 64]).backward()
            optimizer.step()
        if isinstance(optimizer, rmsgd.RMSGD):
            optimizer.epoch_step()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(x), y)), optimizer


def test_a_network_with_a_narrow_head_is_learned_as_by_sgd_and_the_rates_move():
    loss, optimizer = head_of_ten_rows(lambda params: rmsgd.RMSGD(params, lr=0.03))
    expected, _ = head_of_ten_rows(lambda params: torch.optim.SGD(params, lr=0.03, momentum=0.9))
    assert loss < expected + 0.05
    assert any(rate != pytest.approx(0.03, rel=0.05) for rate in optimizer.learning_rates().values())


def test_the_rule_is_algorithm_1_around_the_first_rate_worked_out_by_hand(backend):
    # A matrix of 6 rows at lr0 = .5 has n = 6 * .5 = 3, so that its gains count for 9 / 10. eta goes
    # lr0 + beta (eta - lr0) + zeta .9 (s(t+1) - s(t)), the rate applied is that between .25 and 1.
    weight = Parameter(torch.randn(6, 40))
    optimizer = rmsgd.RMSGD([("w", weight)], lr=0.5, beta=0.5, zeta=10.0)
    optimizer.step()
    eta, s = 0.5, measured(weight)
    applied = set()
    for rank in 5 * [6] + 5 * [1]:
        torch.manual_seed(rank)
        with torch.no_grad():
            weight.copy_(low_rank(6, 40, rank, 1e-3))
        optimizer.epoch_step()
        now = measured(weight)
        eta, s = 0.5 + 0.5 * (eta - 0.5) + 9.0 * (now - s), now
        assert memory(optimizer)["w"] == pytest.approx(eta, rel=1e-5)
        rate = optimizer.learning_rates()["w"]
        assert rate == pytest.approx(min(max(eta, 0.25), 1.0), rel=1e-5)
        applied.add((eta < 0.25) - (eta > 1.0))
    assert applied == {-1, 0, 1}


def measured(weight):
    (layer,) = rmsgd.probe({"w": weight.detach()}).layers
    return layer.stable_rank


def test_without_gains_a_rate_returns_to_the_first_one():
    model = network()
    optimizer = rmsgd.RMSGD(model.named_parameters(), lr=0.03, beta=0.5)
    epochs(optimizer, model)
    before = optimizer.learning_rates()
    for _ in range(40):
        optimizer.epoch_step()
    assert max(before.values()) > 0.03
    assert optimizer.learning_rates() == pytest.approx(dict.fromkeys(before, 0.03), rel=1e-9)


def test_gammas_shrink_the_bounds_as_they_shrink_the_rates():
    model = network()
    optimizer = rmsgd.RMSGD(model.named_parameters(), lr=0.03, step_size=1, gamma=0.5)
    for _ in range(5):  # four of which decay
        optimizer.epoch_step()
    expected = dict.fromkeys(optimizer.learning_rates(), 0.03 / 16)
    assert optimizer.learning_rates() == pytest.approx(expected)
    resumed = rmsgd.RMSGD(model.named_parameters())
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.learning_rates() == optimizer.learning_rates()


@pytest.mark.parametrize(("rows", "weight"), [(3, 0.0080), (10, 0.0826), (64, 0.7866), (512, 0.9958)])
def test_a_coarse_stable_rank_counts_for_little(rows, weight):
    (found,) = RULES["bounded"].mode_weights((rows, 1000), 0.03)
    assert found == pytest.approx(weight, abs=5e-5)
    assert RULES["paper"].mode_weights((rows, 1000), 0.03) == [1.0]
    # One more kept direction moves a rate by less than half of lr0, whatever the number of rows.
    assert found / rows <= 0.5 * 0.03


def test_a_run_out_of_bounds_resumes_at_the_rates_applied_and_remembers_its_own():
    model = network()
    optimizer = rmsgd.RMSGD(model.named_parameters(), lr=0.03, zeta=1000.0)
    epochs(optimizer, model, (1, 2, 1))
    assert memory(optimizer)["3.weight"] > HIGHEST * 0.03
    resumed = rmsgd.RMSGD(model.named_parameters())
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.learning_rates() == optimizer.learning_rates()
    assert memory(resumed) == memory(optimizer)


@pytest.mark.parametrize("way", ["probe", "requires_grad"])
def test_a_layer_that_is_no_longer_measured_keeps_the_rate_that_was_applied(way):
    model = nn.Sequential(nn.Linear(6, 5, bias=False))
    optimizer = rmsgd.RMSGD(model.named_parameters(), lr=0.03, zeta=1000.0)
    epochs(optimizer, model)
    assert memory(optimizer)["0.weight"] > HIGHEST * 0.03
    if way == "probe":
        optimizer.param_groups[0]["probe"] = False
    else:
        model[0].weight.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nothing is left to measure
        optimizer.epoch_step()
    assert optimizer.learning_rates() == {"0.weight": HIGHEST * 0.03}


def test_a_follower_stays_within_the_bounds_of_its_own_group(backend):
    weights = [Parameter(0.01 * torch.randn(6, 8)), Parameter(torch.zeros(6)), Parameter(torch.zeros(6))]
    names = ["block.weight", "block.bias", "block.scale"]
    groups = [
        {"params": [(name, p)], "lr": lr, "rule": rule}
        for name, p, lr, rule in zip(
            names, weights, (0.03, 0.1, 0.1), ("paper", "paper", "bounded"), strict=True
        )
    ]
    optimizer = rmsgd.RMSGD(groups)
    with torch.no_grad():
        weights[0][0] += 1.0
    optimizer.epoch_step()
    leader, letter, bounded = optimizer.learning_rates().values()
    assert leader > HIGHEST * 0.03
    assert letter == pytest.approx(leader / 0.03 * 0.1)
    assert bounded == HIGHEST * 0.1


def test_min_lr_is_the_floor_even_above_the_bounds():
    model = network()
    optimizer = rmsgd.RMSGD(model.named_parameters(), lr=0.03, min_lr=0.2, beta=0.5)
    optimizer.epoch_step()
    assert optimizer.learning_rates()["0.weight"] == 0.2


def test_past_gradients_become_a_velocity_by_the_rate_that_is_applied():
    p = Parameter(0.01 * torch.randn(6, 8))
    optimizer = rmsgd.RMSGD([p], lr=0.03, rule="release")
    p.grad = torch.randn(6, 8)
    optimizer.step()
    past = optimizer.state[p]["momentum_buffer"].clone()
    state_dict = optimizer.state_dict()
    state_dict["state"][0]["rate"] = 0.5
    state_dict["param_groups"][0]["rule"] = "bounded"
    other = rmsgd.RMSGD([p])
    other.load_state_dict(state_dict)
    torch.testing.assert_close(other.state[p]["velocity"], -HIGHEST * 0.03 * past)


# -- the letter of Algorithm 1 -------------------------------------------------------------------


def test_a_rule_of_the_sources_begins_at_rank_zero_and_the_default_measures():
    groups = [{"params": [Parameter(torch.zeros(3, 4))], "rule": rule} for rule in RULES]
    optimizer = rmsgd.RMSGD(groups)
    found = {group["rule"]: group["initial_rank"] for group in optimizer.param_groups}
    assert found == {"bounded": "measure", "paper": "zero", "release": "zero", "published": "zero"}
    asked = rmsgd.RMSGD(
        [{"params": [p], "rule": "paper"} for p in groups[0]["params"]], initial_rank="measure"
    )
    assert asked.param_groups[0]["initial_rank"] == "measure"


def test_random_weights_begin_at_rank_zero_by_measurement():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.Linear(32, 10), nn.Linear(512, 1000))
    optimizer = rmsgd.RMSGD(model.named_parameters())
    optimizer.step()
    assert {state["stable_rank"] for state in optimizer.state_dict()["state"].values()} == {0.0}


def test_pretrained_weights_keep_their_rates():
    model = planted(network())
    optimizer = rmsgd.RMSGD(model.named_parameters(), lr=0.03)
    optimizer.step()
    optimizer.epoch_step()
    assert optimizer.learning_rates() == dict.fromkeys(optimizer.learning_rates(), 0.03)
    assert memory(optimizer) == optimizer.learning_rates()


def test_a_checkpoint_of_the_letter_keeps_its_rule_in_a_default_optimizer():
    model = planted(network())
    letter = rmsgd.RMSGD(model.named_parameters(), lr=0.03, rule="paper", zeta=0.1)
    letter.epoch_step()
    resumed = rmsgd.RMSGD(model.named_parameters())
    resumed.load_state_dict(letter.state_dict())
    assert (resumed.param_groups[0]["rule"], resumed.param_groups[0]["initial_rank"]) == ("paper", "zero")
    assert resumed.learning_rates() == letter.learning_rates()
    assert max(letter.learning_rates().values()) > HIGHEST * 0.03


# -- the warning ---------------------------------------------------------------------------------


def test_a_layer_whose_rate_grew_tenfold_is_named_once():
    torch.manual_seed(0)
    parameters = {"head": Parameter(0.01 * low_rank(4, 60, 2, 0.1)), "wide": Parameter(torch.randn(40, 60))}
    optimizer = rmsgd.RMSGD(parameters.items(), lr=0.03, rule="paper")
    with pytest.warns(
        UserWarning, match=r"ten times their first: head \(0\.\d+\)\. .*use the default rule"
    ) as caught:
        optimizer.epoch_step()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.epoch_step()
        optimizer.learning_rates()


@pytest.mark.parametrize(("times", "named"), [(9.9, False), (10.1, True)])
def test_a_rate_is_named_from_ten_times_its_first_on(times, named):
    weight = Parameter(torch.randn(8, 12))
    optimizer = rmsgd.RMSGD([("head", weight)], lr=0.03, rule="paper")
    optimizer.state[weight]["rate"] = times * 0.03
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.learning_rates()
    assert bool(caught) == named


def test_no_layer_is_named_where_the_rate_applied_is_bounded():
    model = network()
    optimizer = rmsgd.RMSGD(model.named_parameters(), lr=0.01, zeta=1000.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        epochs(optimizer, model)
    assert memory(optimizer)["3.weight"] > 0.1
