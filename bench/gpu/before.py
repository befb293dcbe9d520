"""The first division of an epoch end on a GPU, to compare counted times.

Blocks waited for each other twice per row, every block counted as if it had the device to itself, one block
of 256 threads found all eigenvalues of a matrix, and matrices of more than 1024 rows were left to the host.
A block computed one tile of a Gram matrix, and the fingerprint of the weights was a launch of its own.
"""

import heapq
from collections.abc import Sequence

from rmsgd.backends.cuda_devices import GRID_BARRIER, LAUNCH, ROW, Device

LARGEST = 1024
MOST_BLOCKS = 16
ROWS_PER_BLOCK = 64
IDLE_LAUNCHES = 4
TILE, COLUMNS_PER_SPLIT, SPLIT_TILES = 64, 2048, 128
FFMA_SHARE = 0.66
"""The share of multiply-adds among the instructions of a Gram tile."""
DIVISION_STEP = 80
"""Cycles from one pivot to the next, with a division that is rounded correctly."""
_BLOCK_RATE = 100e9


def last_end(blocks: Sequence[float], multiprocessors: int) -> float:
    """When the last of some blocks ends, each of which goes to the multiprocessor that is free first."""
    ends = [0.0] * multiprocessors
    for block in blocks:
        heapq.heapreplace(ends, ends[0] + block)
    return max(ends)


def gram(shapes: Sequence[tuple[int, int]], lanes: int, device: Device) -> tuple[float, str]:
    """Seconds of the Gram matrices of weights (rows, columns), and the limit."""
    columns = []
    for L, M in shapes:
        side = -(-L // TILE)
        tiles = side * (side + 1) // 2
        splits = max(1, min(-(-M // COLUMNS_PER_SPLIT), SPLIT_TILES // tiles))
        columns += [-(-M // splits)] * tiles * splits
    cycles = [TILE * TILE * count / (lanes * FFMA_SHARE) for count in columns] or [0.0]
    seconds = last_end(cycles, device.multiprocessors) / device.clock
    return max(
        (seconds, "arithmetic"), (sum(2 * TILE * count * 4 for count in columns) / device.l2_rate, "L2")
    )


def _waiting(rows: int, blocks: int, device: Device) -> float:
    return rows * (ROW + (2 * GRID_BARRIER if blocks > 1 else 0)) / device.clock


def _traffic(rows: int) -> float:
    return 8 * rows**3 / 3


def _blocks(rows: int, most: int, device: Device) -> int:
    """The size of a team of up to `most` blocks, or 1 where that looked quicker."""
    team = min(-(-rows // ROWS_PER_BLOCK), most)

    def alone(blocks: int) -> float:
        return _waiting(rows, blocks, device) + _traffic(rows) / (blocks * _BLOCK_RATE)

    return 1 if alone(1) <= alone(team) else team


def reduction(rows: Sequence[int], capacity: int, device: Device) -> tuple[float, str]:
    """Seconds of the reductions and what took most of them; the waves were chosen without shared limits."""
    chosen: tuple[float, list[list[tuple[int, int]]]] | None = None
    for most in range(1, MOST_BLOCKS + 1):
        waves: list[list[tuple[int, int]]] = [[]]
        for n in rows:
            team = _blocks(n, most, device)
            if sum(blocks for _, blocks in waves[-1]) + team > capacity:
                waves.append([])
            waves[-1].append((n, team))
        guessed = sum(
            LAUNCH + max(_waiting(n, b, device) + _traffic(n) / (b * _BLOCK_RATE) for n, b in wave)
            for wave in waves
        )
        if chosen is None or guessed < chosen[0]:
            chosen = guessed, waves
    assert chosen is not None
    return _total([_wave(wave, device) for wave in chosen[1]])


def _total(waves: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """All seconds, and the limit of the longest wave."""
    return sum(seconds for seconds, _ in waves), max(waves)[1]


def _wave(wave: Sequence[tuple[int, int]], device: Device) -> tuple[float, str]:
    """The time of a wave, with two blocks on a multiprocessor and the limits that all share."""
    slowest = max(
        _waiting(n, blocks, device) + _traffic(n) / (blocks / 2 * device.block_rate) for n, blocks in wave
    )
    matrices, moved = sum(4 * n * n for n, _ in wave), sum(_traffic(n) for n, _ in wave)
    missing = 1 - (device.l2_bytes / matrices) ** 1.5 if matrices > device.l2_bytes else 0.0
    shared = missing * moved / device.dram_rate + (1 - missing) * moved / device.l2_rate
    if shared > slowest:
        return shared + LAUNCH, "DRAM" if missing > 0.5 else "L2"
    return slowest + LAUNCH, "waiting"


def sturm_cycles(rows: Sequence[int], needed: float) -> float:
    """The cycles of the largest matrix by one block of 256 threads, with several values per thread."""
    largest = max(rows, default=0)
    chains = max(1.0, needed * largest / 256)
    return largest * (2 + 26 * chains) * DIVISION_STEP
