"""Every launch of the tridiagonal reduction fits the GPU, and no other team size would be quicker."""

from functools import cache
from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import models
from rmsgd.backends.cuda_spectra import LARGEST
from rmsgd.backends.cuda_teams import choose_teams
from rmsgd.layers import unfoldings

# Blocks resident at once, by bytes of an element.
DEVICES = {"H100": {4: 264, 8: 132}, "RTX 2080 Ti": {4: 136, 8: 68}}
ITEMSIZES = (4, 8)


@cache
def rows_of(network):
    with torch.device("meta"):
        weights = [p for p in models.build(network).parameters() if p.ndim > 1]
    return sorted((u.L for p in weights for u in unfoldings(p.shape) if u.L <= LARGEST), reverse=True)


def waves_of_matrices(teams):
    """For every wave, the matrices whose blocks it has; fails where a team's blocks are torn apart."""
    owners = [i for i, blocks in enumerate(teams.blocks) for _ in range(blocks)]
    waves = [owners[wave.first : wave.first + wave.blocks] for wave in teams.waves]
    assert list(chain.from_iterable(waves)) == owners
    assert all(before[-1] < after[0] for before, after in pairwise(waves))
    return [sorted(set(wave)) for wave in waves]


def assert_teams_can_work(teams, rows, capacity):
    assert len(teams.blocks) == len(rows)
    assert all(1 <= blocks <= 16 for blocks in teams.blocks)
    assert all(1 <= wave.blocks <= capacity for wave in teams.waves)
    waves_of_matrices(teams)


def estimate(teams, rows, itemsize):
    """Seconds, from the figures of the reduction's description."""

    def matrix(i):
        waiting = rows[i] * (0.9e-6 if teams.blocks[i] == 1 else 0.9e-6 + 2 * 1.2e-6)
        return waiting + 2 * itemsize * rows[i] ** 3 / 3 / (teams.blocks[i] * 100e9)

    return sum(5e-6 + max(map(matrix, wave)) for wave in waves_of_matrices(teams))


descending = st.lists(st.integers(2, LARGEST), min_size=1, max_size=60).map(lambda r: sorted(r)[::-1])


@given(descending, st.sampled_from(ITEMSIZES), st.integers(1, 300))
def test_every_team_is_in_one_wave_and_every_wave_fits(rows, itemsize, capacity):
    teams = choose_teams(rows, itemsize, capacity)
    assert_teams_can_work(teams, rows, capacity)
    assert teams.seconds == pytest.approx(estimate(teams, rows, itemsize))


@given(descending, st.sampled_from(ITEMSIZES))
def test_where_there_is_room_for_all_one_wave_takes_as_long_as_the_slowest_matrix_alone(rows, itemsize):
    teams = choose_teams(rows, itemsize, 16 * len(rows))
    assert len(teams.waves) == 1
    assert teams.seconds == max(choose_teams([n], itemsize, 16).seconds for n in rows)


@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("network", ["resnet18", "resnet50", "resnet101", "mobilenetv2", "vit-b16"])
def test_no_other_limit_of_the_team_size_is_quicker_for_a_network(network, device, itemsize, monkeypatch):
    rows, capacity = rows_of(network), DEVICES[device][itemsize]
    teams = choose_teams(rows, itemsize, capacity)
    assert_teams_can_work(teams, rows, capacity)
    for most in range(1, 17):
        monkeypatch.setattr("rmsgd.backends.cuda_teams._MOST_BLOCKS", most)
        other = choose_teams(rows, itemsize, capacity)
        assert max(other.blocks) <= most
        assert estimate(teams, rows, itemsize) <= estimate(other, rows, itemsize)


@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize("network", ["resnet50", "resnet101", "resnet50-imagenet"])
def test_a_matrix_of_1024_rows_never_keeps_the_others_waiting_in_few_blocks(network, itemsize):
    rows = rows_of(network)
    assert rows[0] == 1024
    assert choose_teams(rows, itemsize, DEVICES["H100"][itemsize]).blocks[0] >= 8


@pytest.mark.parametrize(("itemsize", "alone", "shared"), [(4, 320, 360), (8, 224, 260)])
def test_small_matrices_are_left_to_one_block(itemsize, alone, shared):
    assert choose_teams([alone], itemsize, 264).blocks == [1]
    assert choose_teams([shared], itemsize, 264).blocks[0] > 1


def test_each_precision_has_the_waves_that_its_own_capacity_asks_for():
    rows = rows_of("resnet101")
    single, double = (choose_teams(rows, itemsize, DEVICES["H100"][itemsize]) for itemsize in ITEMSIZES)
    assert len(single.waves) == 1
    assert len(double.waves) > 1
