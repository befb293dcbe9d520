"""How many blocks of a GPU reduce each matrix to tridiagonal form, and which of them are launched together.

The blocks of a team wait for each other, so that all of a launch must be resident at once: a network is
reduced in waves, one cooperative launch after the other, of no more blocks than the device holds. A block
that may take all of a multiprocessor's shared memory has more room for its columns, and two that share it
hide each other's waiting. Large teams are quicker by themselves, and need more waves. Counting decides which
is best for the device at hand.
"""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby
from typing import NamedTuple

from rmsgd.backends.cuda_devices import GRID_BARRIER, LAUNCH, ROW, Device
from rmsgd.backends.kernels import TEAM_SHARED

THREADS = 512
PACK = 4
"""The number of columns that go to a block together (``csrc/spectrum/slabs.h``)."""
MOST_BLOCKS = 32
"""The most blocks that a grid barrier has room for."""
_SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32)
"""The sizes of teams that are considered for a matrix."""
_LARGEST = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32)
"""The largest sizes of teams that are considered for a wave."""
_SHARED_PER_ELEMENT = 3
"""A matrix element is loaded and stored, and as many bytes are loaded of the row's vectors."""

Capacity = Callable[[int], int]
"""From the bytes of shared memory of a block to how many blocks are resident at once."""


class Team(NamedTuple):
    """The blocks that reduce one matrix."""

    blocks: int
    near_rows: bool
    """Whether a block's vectors are in its shared memory."""
    near_slab: bool
    """Whether a block's columns are in its shared memory."""


class Wave(NamedTuple):
    """Neighbouring blocks that are launched together."""

    first: int
    """The number of the first block."""
    blocks: int
    shared: int
    """The bytes of shared memory of each block."""
    seconds: float
    """As counted."""
    limit: str
    """The part that takes most of the time: "waiting", "shared memory", "L2" or "DRAM"."""


class Teams(NamedTuple):
    """The teams and waves that reduce the matrices of a set in one precision."""

    teams: list[Team]
    waves: list[Wave]

    @property
    def seconds(self) -> float:
        """The time of all waves in seconds, as counted and not measured."""
        return sum(wave.seconds for wave in self.waves)


def padded(rows: int) -> int:
    """The columns in memory of a matrix of ``rows`` rows."""
    return -(-rows // PACK) * PACK


def slab_packs(rows: int, blocks: int) -> int:
    """The packs of columns of the widest slab."""
    return -(-padded(rows) // PACK // blocks)


def shared_bytes(rows: int, itemsize: int, team: Team) -> int:
    """Bytes of shared memory that a block of a team takes; the order is ``tridiagonal_block``'s."""
    packs = slab_packs(rows, team.blocks)
    elements = PACK * max(THREADS, packs)
    if team.near_rows:
        elements += 4 * padded(rows)
    if team.near_slab:
        elements += rows * PACK * (packs | 1)
    return TEAM_SHARED + elements * itemsize


def far_bytes(rows: int, itemsize: int, team: Team) -> int:
    """Bytes of a matrix that its reduction reads and writes repeatedly; 0 where it is on chip."""
    return 0 if team.near_slab else rows * padded(rows) * itemsize


def waiting(rows: int, blocks: int, device: Device) -> float:
    """Seconds that the rows of a matrix wait, even with nothing to compute."""
    return rows * (ROW + (GRID_BARRIER if blocks > 1 else 0)) / device.clock


def traffic(rows: int, itemsize: int) -> float:
    """Bytes of its matrix that a reduction reads and writes: twice its rows^3 / 3 element accesses."""
    return 2 * itemsize * rows**3 / 3


def wave_seconds(
    rows: Sequence[int], itemsize: int, teams: Sequence[Team], per_multiprocessor: int, device: Device
) -> tuple[float, str]:
    """Seconds of a wave, and the part that takes most of them.

    A team waits and works in turn. Beside other teams it is bounded by what all share: the second-level
    cache, and memory as far as the matrices of the wave do not fit into that cache. Both are idle only while
    all teams that need them wait.
    """
    slowest, limit = 0.0, "waiting"
    far, moved, longest_wait, sharing = 0, 0.0, 0.0, 0
    for n, team in zip(rows, teams, strict=True):
        waits = waiting(n, team.blocks, device)
        works = _working(n, itemsize, team, per_multiprocessor, device)
        if waits + works > slowest:
            slowest = waits + works
            limit = "waiting" if waits > works else "shared memory" if team.near_slab else "L2"
        if not team.near_slab:
            far += far_bytes(n, itemsize, team)
            moved += traffic(n, itemsize)
            longest_wait, sharing = max(longest_wait, waits), sharing + 1
    if not sharing:
        return slowest + LAUNCH, limit
    # What is left of a matrix shrinks. When a share y of it is left, so is a share y^1.5 of its traffic.
    missing = 1 - (device.l2_bytes / far) ** 1.5 if far > device.l2_bytes else 0.0
    from_dram, from_l2 = missing * moved / device.dram_rate, (1 - missing) * moved / device.l2_rate
    together = from_dram + from_l2 + longest_wait / sharing
    if together > slowest:
        slowest, limit = together, "DRAM" if from_dram > from_l2 else "L2"
    return slowest + LAUNCH, limit


def _working(rows: int, itemsize: int, team: Team, per_multiprocessor: int, device: Device) -> float:
    """Seconds of a matrix's own traffic, by blocks that share a multiprocessor with others."""
    share = team.blocks / per_multiprocessor
    if team.near_slab:
        return _SHARED_PER_ELEMENT / 2 * traffic(rows, itemsize) / (share * device.shared_rate)
    return traffic(rows, itemsize) / (share * device.block_rate)


def choose_teams(rows: Sequence[int], itemsize: int, capacity: Capacity, device: Device) -> Teams:
    """The quickest teams and waves among those that are considered.

    Args:
        rows: the rows of the matrices, in descending order: a wave takes as long as its slowest matrix, so
            similar ones should share it.
        itemsize: bytes of an element.
        capacity: at least 1 for no more shared memory than a block may ask for.
        device: the device for which to count.

    Raises:
        RuntimeError: a block of the device has too little shared memory for one of the matrices.
    """
    runs = [(n, len(list(same))) for n, same in groupby(rows)]
    budgets = sorted({_half(device), device.shared_block})

    @cache
    def option(n: int, blocks: int, budget: int) -> tuple[Team, float]:
        """A team of ``blocks`` blocks, and the seconds that it takes alone."""
        team = _team(n, itemsize, blocks, budget)
        each = _per_multiprocessor(capacity, budget, device)
        return team, waiting(n, blocks, device) + _working(n, itemsize, team, each, device)

    def wave(skipped: int, budget: int, most: int, in_l2: bool) -> list[tuple[int, Team]]:
        """Matrices from number `skipped` on, as many as there is room for, in teams no larger than needed."""
        room, far, aim = max(1, capacity(budget)), 0, 0.0
        members: list[tuple[int, Team]] = []
        for n, count in _after(runs, skipped):
            sizes = [
                size
                for size in _SIZES
                if size <= min(most, room, padded(n) // PACK)
                and shared_bytes(n, itemsize, option(n, size, budget)[0]) <= budget
            ]
            if not sizes:
                break
            if not members:
                size = min(sizes, key=lambda size: option(n, size, budget)[1])
                aim = option(n, size, budget)[1]
            else:
                quick = [size for size in sizes if option(n, size, budget)[1] <= 1.01 * aim]
                if not quick:
                    break
                size = quick[0]
            team = option(n, size, budget)[0]
            fits = min(count, room // size)
            more = far_bytes(n, itemsize, team)
            if in_l2 and more:
                fits = min(fits, max(0 if members else 1, (device.l2_bytes - far) // more))
            members += [(n, team)] * fits
            room, far = room - fits * size, far + fits * more
            if fits < count:
                break
        return members

    @cache
    def best(skipped: int) -> tuple[float, tuple[tuple[int, Team], ...], str]:
        """The quickest way from matrix number `skipped` on: seconds in all, and its first wave."""
        found: tuple[float, tuple[tuple[int, Team], ...], str] | None = None
        tried = set()
        for budget in budgets:
            each = _per_multiprocessor(capacity, budget, device)
            for most in _LARGEST:
                for in_l2 in (False, True):
                    members = tuple(wave(skipped, budget, most, in_l2))
                    if not members or (members, each) in tried:
                        continue
                    tried.add((members, each))
                    lone = [n for n, _ in members], itemsize, [team for _, team in members], each, device
                    seconds, limit = wave_seconds(*lone)
                    after = skipped + len(members)
                    seconds += best(after)[0] if after < len(rows) else 0.0
                    if found is None or seconds < found[0]:
                        found = seconds, members, limit
        if found is None:
            n, most = rows[skipped], max(1, capacity(device.shared_block))
            needed = shared_bytes(n, itemsize, Team(min(most, MOST_BLOCKS), False, False))
            raise RuntimeError(
                f"a matrix of {n} rows takes {needed} bytes of a block's shared memory on a GPU that holds "
                f"{most} blocks, and a block may have {device.shared_block}: probe=False in the group of a "
                "weight leaves it out"
            )
        return found

    teams: list[Team] = []
    waves: list[Wave] = []
    first = 0
    while len(teams) < len(rows):
        seconds, members, limit = best(len(teams))
        blocks = sum(team.blocks for _, team in members)
        shared = max(shared_bytes(n, itemsize, team) for n, team in members)
        teams += [team for _, team in members]
        later = best(len(teams))[0] if len(teams) < len(rows) else 0.0
        waves.append(Wave(first, blocks, shared, seconds - later, limit))
        first += blocks
    return Teams(teams, waves)


def widest_team(rows: int, itemsize: int, device: Device) -> Team:
    """A team that takes at least as much workspace as any that may be chosen."""
    blocks = min(MOST_BLOCKS, padded(rows) // PACK)
    near_rows = _team(rows, itemsize, 1, min(_half(device), device.shared_block)).near_rows
    return Team(blocks, near_rows, False)


def _half(device: Device) -> int:
    """The shared memory of each of two blocks on a multiprocessor; CUDA keeps 1 KB for each."""
    return min(device.shared_block, device.shared_multiprocessor // 2 - 1024)


def _per_multiprocessor(capacity: Capacity, budget: int, device: Device) -> int:
    return max(1, capacity(budget) // device.multiprocessors)


def _team(rows: int, itemsize: int, blocks: int, budget: int) -> Team:
    """A team that keeps as much in shared memory as there is room for, its vectors first."""
    team = Team(blocks, False, False)
    for near in (Team(blocks, True, False), Team(blocks, True, True)):
        if shared_bytes(rows, itemsize, near) <= budget:
            team = near
    return team


def _after(runs: Sequence[tuple[int, int]], skipped: int) -> list[tuple[int, int]]:
    """Runs of equal rows without the first `skipped` matrices."""
    left = []
    for n, count in runs:
        passed = min(count, skipped)
        skipped -= passed
        if count > passed:
            left.append((n, count - passed))
    return left
