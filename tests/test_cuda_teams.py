"""Every launch of the reduction fits the GPU, and takes no longer than simpler plans in a simulation."""

from functools import cache
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from waves import simulate

from bench import models
from bench.gpu.cards import CARDS, Card
from rmsgd.backends import cuda_teams
from rmsgd.backends.cuda_devices import Attributes, device_of
from rmsgd.backends.cuda_teams import Teams, Wave, choose_teams, shared_bytes
from rmsgd.layers import unfoldings

ITEMSIZES = (4, 8)
NETWORKS = ("resnet18", "resnet50", "mobilenetv2", "vit-b16")
SMALL = Card("a card of 48 KB", 75, Attributes(20, 48 * 1024, 48 * 1024, 2**20, 0, 0, 0), 64, 1024)
by_card = pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)


def capacity_of(card, itemsize):
    return lambda shared: card.resident(cuda_teams.THREADS, 128, shared)


@cache
def rows_of(network):
    with torch.device("meta"):
        weights = [p for p in models.build(network).parameters() if p.ndim > 1]
    return sorted((u.L for p in weights for u in unfoldings(p.shape)), reverse=True)


@cache
def planned(network, card, itemsize):
    return choose_teams(rows_of(network), itemsize, capacity_of(card, itemsize), card.device)


def simulated(rows, itemsize, plan, card):
    return simulate(rows, itemsize, plan, card.device)


def assert_teams_can_work(plan, rows, itemsize, capacity, device):
    assert len(plan.teams) == len(rows)
    first = 0
    for wave in plan.waves:
        assert wave.first == first
        assert 1 <= wave.blocks <= max(1, capacity(wave.shared))
        assert wave.shared <= device.shared_block
        first += wave.blocks
    assert first == sum(team.blocks for team in plan.teams)
    owners = [i for i, team in enumerate(plan.teams) for _ in range(team.blocks)]
    waves = [owners[wave.first : wave.first + wave.blocks] for wave in plan.waves]
    assert all(before[-1] < after[0] for before, after in pairwise(waves)), "a team is torn apart"
    for members, wave in zip(waves, plan.waves, strict=True):
        for i in set(members):
            team = plan.teams[i]
            assert 1 <= team.blocks <= min(32, -(-rows[i] // 4)), "a block without columns"
            assert shared_bytes(rows[i], itemsize, team) <= wave.shared


descending = st.lists(st.integers(2, 8192), min_size=1, max_size=60).map(lambda r: sorted(r)[::-1])


@settings(deadline=None, max_examples=25)
@given(descending, st.sampled_from(ITEMSIZES), st.sampled_from([*CARDS, SMALL]))
def test_every_team_is_in_one_wave_and_every_wave_fits(rows, itemsize, card):
    capacity = capacity_of(card, itemsize)
    plan = choose_teams(rows, itemsize, capacity, card.device)
    assert_teams_can_work(plan, rows, itemsize, capacity, card.device)


@by_card
@pytest.mark.parametrize("network", NETWORKS)
def test_the_count_is_near_a_simulation_of_the_waves(network, card):
    plan = planned(network, card, 4)
    assert plan.seconds == pytest.approx(simulated(rows_of(network), 4, plan, card), rel=0.4)


def simple_plan(rows, itemsize, card, most):
    """Teams as large as a limit allows, as many of them in a wave as there is room for."""
    budget = card.device.shared_block
    room = capacity_of(card, itemsize)(budget)
    teams = [cuda_teams._team(n, itemsize, min(most, room, max(1, n // 64)), card.device) for n in rows]
    waves, first, filled = [], 0, 0
    for team in [*teams, None]:
        if team is None or filled + team.blocks > room:
            waves.append(Wave(first, filled, budget, 0.0, ""))
            first, filled = first + filled, 0
        filled += 0 if team is None else team.blocks
    return Teams(teams, waves)


@by_card
@pytest.mark.parametrize("network", NETWORKS)
def test_no_simple_plan_is_much_quicker_in_the_simulation(network, card):
    rows = rows_of(network)
    ours = simulated(rows, 4, planned(network, card, 4), card)
    for most in (1, 4, 8, 16):
        assert ours <= 1.1 * simulated(rows, 4, simple_plan(rows, 4, card, most), card)


def test_on_an_rtx_2080_ti_the_limits_that_all_share_count():
    """13 matrices of 512 rows and more do not fit into its cache at once."""
    card = CARDS[0]
    plan = planned("resnet50", card, 4)
    blocks = list(accumulate(team.blocks for team in plan.teams))
    for wave in plan.waves:
        members = [
            (n, team)
            for n, team, end in zip(rows_of("resnet50"), plan.teams, blocks, strict=True)
            if wave.first < end <= wave.first + wave.blocks
        ]
        far = sum(cuda_teams.far_bytes(n, 4, team) for n, team in members)
        assert far <= 2 * card.device.l2_bytes


@pytest.mark.parametrize("name", ["H100", "H200"])
def test_a_large_matrix_is_on_chip_where_its_team_has_room_for_it(name):
    card = next(card for card in CARDS if card.name == name)
    assert planned("resnet50", card, 4).teams[0].near_slab
    assert planned("vit-b16", card, 4).teams[0].near_slab
    assert not choose_teams([4096], 4, capacity_of(card, 4), card.device).teams[0].near_slab


def test_a_plan_takes_no_longer_than_a_short_wait():
    """The host plans once for a network, also for hundreds of different sizes."""
    card = CARDS[-1]
    calls = []

    def capacity(shared):
        calls.append(shared)
        return capacity_of(card, 4)(shared)

    choose_teams(list(range(600, 20, -10)), 4, capacity, card.device)
    assert len(calls) < 20_000


def test_a_card_with_too_little_shared_memory_for_a_matrix_is_refused_with_the_bytes_it_takes():
    """One block of 48 KB, in fp64: 4 partial sums of every fourth column are 8 bytes for each of the rows."""
    assert choose_teams([6000], 8, lambda shared: 1, SMALL.device).waves[0].shared <= 48 * 1024
    with pytest.raises(RuntimeError, match=r"8192 rows takes 66048 bytes .* a block may have 49152"):
        choose_teams([8192], 8, lambda shared: 1, SMALL.device)


def test_what_a_device_does_not_tell_counts_as_little():
    told = device_of(Attributes(10, 49152, 65536, 2**20, 1_000_000, 5_000_000, 128))
    untold = device_of(Attributes(10, 49152, 65536, 0, 0, 0, 0))
    assert told.dram_rate == pytest.approx(0.8 * 160e9)
    assert untold.l2_bytes > 0
    assert untold.dram_rate > 0
    assert choose_teams([300, 20], 4, lambda shared: 20, untold).seconds > 0
