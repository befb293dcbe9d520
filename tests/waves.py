"""What a plan of teams and waves takes on a GPU, by a simulation of its events.

Teams wait and work in turn, and whoever works shares what there is with the others that do.
"""

import numpy as np

from rmsgd.backends import cuda_devices

ROWS_AT_ONCE = 16
"""How many rows a team reduces between two events."""


KEPT = 18
"""How many elements in registers a multiprocessor passes per cycle."""


def simulate(rows, itemsize, plan, device):
    """Seconds of all waves, one after the other."""
    seconds, first = 0.0, 0
    for blocks in (wave.blocks for wave in plan.waves):
        end = first
        while blocks > 0:
            blocks -= plan.teams[end].blocks
            end += 1
        assert blocks == 0
        seconds += cuda_devices.LAUNCH
        seconds += _wave(rows[first:end], itemsize, plan.teams[first:end], device)
        first = end
    assert first == len(rows)
    return seconds


def _rows_in_memory(n, itemsize, blocks):
    """Of a matrix of n rows: 512 threads a block, 19 packs of 4 floats a thread, no doubles."""
    if itemsize == 8:
        return n
    threads = 512 // np.ceil(np.ceil(n / 4) / blocks)
    return np.maximum(0, n - 19 * threads)


def _wave(rows, itemsize, teams, device):
    n = np.array(rows, float)
    blocks = np.array([team.blocks for team in teams], float)
    near = np.array([team.near_slab for team in teams])
    cycles = cuda_devices.ROW + np.where(blocks > 1, cuda_devices.GRID_BARRIER, 0)
    row_waits = cycles / device.clock
    memory = _rows_in_memory(n, itemsize, blocks)
    # On chip an element is loaded and stored, and so is as much again loaded of its row's vectors.
    own_rate = blocks * np.where(near, device.shared_rate / 1.5, device.block_rate)

    def alone(passed):
        """Seconds in which a team neither needs nor disturbs others: it waits, or works in registers."""
        left = np.minimum(ROWS_AT_ONCE, n - passed)
        size = n - passed - left / 2
        in_registers = np.minimum(n - memory, size) * size
        return left * (row_waits + in_registers / (blocks * KEPT * device.clock))

    passed = np.zeros_like(n)
    waits = alone(passed)  # seconds left of that; then
    moves = np.zeros_like(n)  # bytes left to move
    now = 0.0
    while (passed < n).any():
        alive = passed < n
        working = alive & (waits <= 0)
        rate = np.where(working, own_rate, 0.0)
        far = working & ~near & (moves > 0)
        demand = rate[far].sum()
        limit = device.l2_rate
        left_far = itemsize * np.maximum(memory - passed, 0) * (n - passed)
        if left_far[alive & ~near].sum() > device.l2_bytes:
            limit = min(limit, device.dram_rate)
        if demand > limit:
            rate[far] *= limit / demand
        with np.errstate(divide="ignore", invalid="ignore"):
            until = np.where(working, moves / rate, np.where(alive, waits, np.inf))
        step = max(until.min(), 0.0)
        now += step
        waits = np.where(alive & ~working, waits - step, waits)
        moves = np.where(working, moves - rate * step, moves)
        done = alive & (until <= step * (1 + 1e-9) + 1e-15)
        begun, ended = done & ~working, done & working
        left = np.minimum(ROWS_AT_ONCE, n - passed)
        size = n - passed - left / 2
        in_memory = np.maximum(memory - passed - left / 2, 0)
        moves = np.where(begun, 2 * itemsize * left * in_memory * size, moves)
        waits = np.where(begun, 0.0, waits)
        passed = np.where(ended, passed + left, passed)
        waits = np.where(ended, alone(passed), waits)
    return now
