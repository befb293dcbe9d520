"""How many blocks of a GPU reduce each matrix to tridiagonal form, and which of them are launched together.

The blocks of a team wait for each other, so that all of a launch must be resident at once: a network is
reduced in waves, one cooperative launch after the other, of no more blocks than the device holds. A block has
a multiprocessor to itself and keeps as many rows of its columns as it can in registers, the others in shared
memory if there is room for them. Large teams are quicker by themselves, and need more waves. Counting decides
which is best for the device at hand.
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
KEPT = {4: 19, 8: 0}
"""The rows of a pack that a thread has registers for, by the bytes of an element (``tridiagonal.h``)."""
MOST_BLOCKS = 32
"""The most blocks that a grid barrier has room for."""
_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 18, 20, 22, 24, 28, 32)
"""The sizes of teams that are considered for a matrix."""
_LARGEST = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32)
"""The largest sizes of teams that are considered for a wave."""
_SHARED_PER_ELEMENT = 3
"""A matrix element is loaded and stored, and as many bytes are loaded of the row's vectors."""
_KEPT_PER_CYCLE = 18
"""Elements in registers that a multiprocessor passes per cycle.

Four take 12 multiply-adds and as many other instructions. On 64 lanes, and by four instructions issued per
cycle, that is 21.
"""

Capacity = Callable[[int], int]
"""From the bytes of shared memory of a block to how many blocks are resident at once."""


class Team(NamedTuple):
    """The blocks that reduce one matrix."""

    blocks: int
    near_rows: bool
    """Whether a block's vectors are in its shared memory."""
    near_slab: bool
    """Whether those rows of a block's columns that are not in registers are in its shared memory."""


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
    """The part that takes most of the time: "waiting", "arithmetic", "shared memory", "L2" or "DRAM"."""


class Teams(NamedTuple):
    """The teams and waves that reduce the matrices of a set in one precision."""

    teams: list[Team]
    waves: list[Wave]

    @property
    def seconds(self) -> float:
        """The time of all waves in seconds, as counted and not measured."""
        return sum(wave.seconds for wave in self.waves)


class KeptRows(NamedTuple):
    """Which rows of its columns a block keeps in registers: the last ones."""

    first: int
    """The rows before this one are in memory."""
    each: int
    """Rows of a thread."""
    depth: int
    """Threads of a pack of columns."""


def padded(rows: int) -> int:
    """The columns in memory of a matrix of ``rows`` rows."""
    return -(-rows // PACK) * PACK


def slab_packs(rows: int, blocks: int) -> int:
    """The packs of columns of the widest slab."""
    return -(-padded(rows) // PACK // blocks)


def kept_rows(rows: int, itemsize: int, blocks: int) -> KeptRows:
    """As ``tridiagonal.h`` has it."""
    depth = THREADS // slab_packs(rows, blocks)
    if not KEPT[itemsize] or not depth:
        return KeptRows(rows, 0, 1)
    each = min(KEPT[itemsize], -(-rows // depth))
    depth = min(depth, rows // each)
    return KeptRows(rows - each * depth, each, depth)


def shared_bytes(rows: int, itemsize: int, team: Team) -> int:
    """Bytes of shared memory that a block of a team takes; the order is ``tridiagonal_block``'s."""
    packs, kept = slab_packs(rows, team.blocks), kept_rows(rows, itemsize, team.blocks)
    elements = 0
    if kept.first:
        elements += PACK * max(THREADS, packs)
    if kept.each:
        elements += PACK * packs * (kept.depth + 1 | 1)
    if team.near_rows:
        elements += 4 * padded(rows)
    if team.near_slab:
        elements += kept.first * PACK * (packs | 1)
    return TEAM_SHARED + elements * itemsize


def far_bytes(rows: int, itemsize: int, team: Team) -> int:
    """Bytes of a matrix that its reduction reads and writes repeatedly; 0 where it is on chip."""
    return 0 if team.near_slab else kept_rows(rows, itemsize, team.blocks).first * padded(rows) * itemsize


def waiting(rows: int, blocks: int, device: Device) -> float:
    """Seconds that the rows of a matrix wait, even with nothing to compute."""
    return rows * (ROW + (GRID_BARRIER if blocks > 1 else 0)) / device.clock


def traffic(rows: int, itemsize: int, blocks: int) -> float:
    """Bytes of its rows in memory that a reduction reads and writes.

    Of the rows before ``first``, row i meets its columns from j on in every step j < i, twice.
    """
    first = kept_rows(rows, itemsize, blocks).first
    kept = rows - first
    return 2 * itemsize * (first**3 / 3 + kept * first**2 / 2)


def passed(rows: int, itemsize: int, blocks: int) -> float:
    """Elements in registers that a reduction passes, by whole steps of the threads of a pack."""
    first, _, depth = kept_rows(rows, itemsize, blocks)
    kept = rows - first
    return kept * (rows**2 - kept**2) / 2 + kept**3 / 3 + depth * kept**2 / 4


def wave_seconds(
    rows: Sequence[int], itemsize: int, teams: Sequence[Team], device: Device
) -> tuple[float, str]:
    """Seconds of a wave, and the part that takes most of them.

    A team waits and works in turn. Beside other teams it is bounded by what all share: the second-level
    cache, and memory as far as the matrices of the wave do not fit into that cache. Both are idle while all
    teams that need them do something else, and equal teams do so at the same time.
    """
    slowest, limit = 0.0, "waiting"
    far, moved, longest_alone = 0, 0.0, 0.0
    for n, team in zip(rows, teams, strict=True):
        parts = {"waiting": waiting(n, team.blocks, device), **_working(n, itemsize, team, device)}
        seconds = sum(parts.values())
        if seconds > slowest:
            slowest, limit = seconds, max(parts, key=lambda part: parts[part])
        if more := far_bytes(n, itemsize, team):
            far += more
            moved += traffic(n, itemsize, team.blocks)
            longest_alone = max(longest_alone, seconds - parts["L2"])
    if not far:
        return slowest + LAUNCH, limit
    # What is left in memory shrinks. When a share y of it is left, so is a share of its traffic: y^1.5 where
    # no row is in registers, y^2 where most are.
    missing = 1 - (device.l2_bytes / far) ** 2 if far > device.l2_bytes else 0.0
    from_dram, from_l2 = missing * moved / device.dram_rate, (1 - missing) * moved / device.l2_rate
    together = from_dram + from_l2 + longest_alone
    if together > slowest:
        slowest, limit = together, "DRAM" if from_dram > from_l2 else "L2"
    return slowest + LAUNCH, limit


def _working(rows: int, itemsize: int, team: Team, device: Device) -> dict[str, float]:
    """Seconds of a matrix's own work, by the part that bounds it: each block has a multiprocessor."""
    # The widest slab's share.
    share = slab_packs(rows, team.blocks) / slab_packs(rows, 1)
    moved = share * traffic(rows, itemsize, team.blocks)
    near = _SHARED_PER_ELEMENT / 2 * moved / device.shared_rate
    return {
        "arithmetic": share * passed(rows, itemsize, team.blocks) / (_KEPT_PER_CYCLE * device.clock),
        **({"shared memory": near} if team.near_slab else {"L2": moved / device.block_rate}),
    }


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
    held = max(1, capacity(device.shared_block))

    @cache
    def option(n: int, blocks: int) -> tuple[Team, float]:
        """A team of ``blocks`` blocks, and the seconds that it takes alone."""
        team = _team(n, itemsize, blocks, device)
        return team, waiting(n, blocks, device) + sum(_working(n, itemsize, team, device).values())

    @cache
    def sizes_of(n: int, most: int) -> list[int]:
        """The sizes of teams of up to ``most`` blocks whose blocks have room for their vectors and sums."""
        return [
            size
            for size in _SIZES
            if size <= min(most, padded(n) // PACK)
            and shared_bytes(n, itemsize, option(n, size)[0]) <= device.shared_block
        ]

    def wave(skipped: int, most: int, in_l2: bool) -> list[tuple[int, Team]]:
        """Matrices from number `skipped` on, as many as there is room for, in teams no larger than needed."""
        room, far, aim = held, 0, 0.0
        members: list[tuple[int, Team]] = []
        for n, count in _after(runs, skipped):
            sizes = sizes_of(n, min(most, room))
            if not sizes:
                break
            if not members:
                size = min(sizes, key=lambda size: option(n, size)[1])
                aim = option(n, size)[1]
            else:
                quick = [size for size in sizes if option(n, size)[1] <= 1.01 * aim]
                if not quick:
                    break
                size = quick[0]
            team = option(n, size)[0]
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
        for most in _LARGEST:
            for in_l2 in (False, True):
                members = tuple(wave(skipped, most, in_l2))
                if not members or members in tried:
                    continue
                tried.add(members)
                seconds, limit = wave_seconds(
                    [n for n, _ in members], itemsize, [team for _, team in members], device
                )
                after = skipped + len(members)
                seconds += best(after)[0] if after < len(rows) else 0.0
                if found is None or seconds < found[0]:
                    found = seconds, members, limit
        if found is None:
            n = rows[skipped]
            needed = shared_bytes(n, itemsize, Team(min(held, MOST_BLOCKS), False, False))
            raise RuntimeError(
                f"a matrix of {n} rows takes {needed} bytes of a block's shared memory on a GPU that holds "
                f"{held} blocks, and a block may have {device.shared_block}: probe=False in the group of a "
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
    return Team(blocks, _team(rows, itemsize, 1, device).near_rows, False)


def _team(rows: int, itemsize: int, blocks: int, device: Device) -> Team:
    """A team that keeps as much in shared memory as there is room for, its vectors first."""
    team = Team(blocks, False, False)
    for near in (Team(blocks, True, False), Team(blocks, True, True)):
        if shared_bytes(rows, itemsize, near) <= device.shared_block:
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
