"""A GPU as the planner of an epoch end sees it: its attributes, and the rates that follow from them.

Rates and latencies are counted from the hardware's figures, in clock cycles. None of them was measured with
these kernels.
"""

from typing import NamedTuple

# The waits within a row of the reduction to tridiagonal form, in cycles.
ROW = 1600
"""Four barriers of a block, the loads behind them, a division and two square roots."""
GRID_BARRIER = 2200
"""A release, a word that another block polls, and the first load of the data that it announces."""

# Bytes per cycle and multiprocessor.
_SHARED = 128
_L2_OF_BLOCK = 40
"""The rate of 512 threads with three loads of 16 bytes each in flight, at a latency of some 600 cycles."""
_L2 = 20
"""The rate of all multiprocessors together, which share the second-level cache."""
_DRAM_SHARE = 0.8
"""The share that is reached of the bandwidth that a memory's clock and width give."""

LAUNCH = 5e-6
"""Seconds of a cooperative launch whose blocks find nothing to do, or of a gap between two launches."""


class Attributes(NamedTuple):
    """The attributes of a device from CUDA; 0 for one that CUDA does not tell."""

    multiprocessors: int
    shared_block: int
    """Bytes of shared memory that a block may ask for."""
    shared_multiprocessor: int
    l2_bytes: int
    clock_khz: int
    memory_clock_khz: int
    memory_bus_bits: int


class Device(NamedTuple):
    """A GPU in the terms of the planner: see ``device_of``."""

    multiprocessors: int
    shared_block: int
    shared_multiprocessor: int
    l2_bytes: int
    clock: float
    """Cycles per second."""
    l2_rate: float
    """Bytes per second between all multiprocessors and the second-level cache."""
    dram_rate: float
    """Bytes per second between that cache and memory."""

    @property
    def shared_rate(self) -> float:
        """Bytes per second of one multiprocessor's shared memory."""
        return _SHARED * self.clock

    @property
    def block_rate(self) -> float:
        """Bytes per second that the blocks of one multiprocessor move from and to the second-level cache."""
        return _L2_OF_BLOCK * self.clock


def device_of(attributes: Attributes) -> Device:
    """The planner's view of a device; what CUDA does not tell counts as in a small one."""
    clock = 1e3 * (attributes.clock_khz or 1_500_000)
    bus = attributes.memory_bus_bits / 8
    dram = 2e3 * attributes.memory_clock_khz * bus * _DRAM_SHARE or 200e9
    multiprocessors = max(1, attributes.multiprocessors)
    return Device(
        multiprocessors,
        attributes.shared_block,
        attributes.shared_multiprocessor,
        attributes.l2_bytes or 2**20,
        clock,
        _L2 * clock * multiprocessors,
        dram,
    )
