"""How many blocks of a GPU reduce each matrix to tridiagonal form, and which of them are launched together.

The blocks of a team meet, so that all of a launch must be resident at once: a network is reduced in waves,
one launch after the other, of no more blocks than the device holds. Large teams are quicker by themselves
and need more waves; which is better is decided by an estimate of the time.
"""

from collections.abc import Sequence
from typing import NamedTuple

_MOST_BLOCKS = 16
_ROWS_PER_BLOCK = 64
"""Of larger teams a block would have less than 64 columns, whose rows are short pieces of memory."""

# The estimate's figures are counted from the hardware's, not measured: csrc/spectrum/tridiagonal.h.
_ROW = 0.9e-6
"""Seconds for what a row waits for within a block."""
_MEETINGS_PER_ROW = 2
_MEETING = 1.2e-6
"""Seconds for blocks to meet through global memory."""
_BANDWIDTH = 100e9
"""Bytes per second that a block moves from and to the second-level cache."""
_LAUNCH = 5e-6
"""Seconds of a wave in which no matrix has anything to do, as nearly always in fp64."""


class Wave(NamedTuple):
    """Neighbouring blocks that are launched together: the first one's number, and how many."""

    first: int
    blocks: int


class Teams(NamedTuple):
    """Who reduces the matrices of a set in one precision."""

    blocks: list[int]
    """The size of every matrix's team."""
    waves: list[Wave]
    seconds: float
    """As estimated."""


def choose_teams(rows: Sequence[int], itemsize: int, capacity: int) -> Teams:
    """The quickest teams among those of up to 1, 2, ... 16 blocks.

    Args:
        rows: of the matrices, in descending order: a wave takes as long as its slowest matrix, so that
            similar ones should share it.
        itemsize: bytes of an element.
        capacity: blocks that can be resident at once, at least 1.
    """
    most = range(1, min(_MOST_BLOCKS, capacity) + 1)
    return min((_teams_of(rows, itemsize, capacity, m) for m in most), key=lambda teams: teams.seconds)


def _seconds(rows: int, itemsize: int, blocks: int) -> float:
    """For one matrix: what its rows wait for, and the traffic of rows^3 / 3 elements read and written."""
    row = _ROW if blocks == 1 else _ROW + _MEETINGS_PER_ROW * _MEETING
    return rows * row + 2 * itemsize * rows**3 / 3 / (blocks * _BANDWIDTH)


def _teams_of(rows: Sequence[int], itemsize: int, capacity: int, most: int) -> Teams:
    """Teams of up to `most` blocks, or of one where that is quicker."""
    blocks, waves, seconds = [], [Wave(0, 0)], [0.0]
    for n in rows:
        team = min(-(-n // _ROWS_PER_BLOCK), most)
        if _seconds(n, itemsize, 1) <= _seconds(n, itemsize, team):
            team = 1
        first, filled = waves[-1]
        if filled + team > capacity:
            waves.append(Wave(first + filled, 0))
            seconds.append(0.0)
        waves[-1] = Wave(waves[-1].first, waves[-1].blocks + team)
        seconds[-1] = max(seconds[-1], _seconds(n, itemsize, team))
        blocks.append(team)
    return Teams(blocks, waves, sum(seconds) + len(waves) * _LAUNCH)
