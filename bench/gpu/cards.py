"""The GPUs for which times are counted, as CUDA describes them. None of them was available."""

from typing import NamedTuple

from rmsgd.backends.cuda_devices import Attributes, Device, device_of

_REGISTERS = 65536  # the registers of a multiprocessor, on all of these GPUs
_KEPT = 1024  # bytes of shared memory that CUDA takes for each block, from sm_80 on


class Card(NamedTuple):
    """A kind of GPU.

    Attributes:
        name: its common name.
        architecture: 10 times the major version, plus the minor one.
        attributes: its attributes from CUDA.
        lanes: fp32 multiply-adds per cycle and multiprocessor.
        threads: the most threads that are resident on a multiprocessor.

    """

    name: str
    architecture: int
    attributes: Attributes
    lanes: int
    threads: int

    @property
    def device(self) -> Device:
        """The card in the terms of the planner."""
        return device_of(self.attributes)

    def resident(self, threads: int, registers: int, shared: int) -> int:
        """How many blocks with these threads, registers per thread and shared bytes are resident at once."""
        taken = shared + (_KEPT if self.architecture >= 80 else 0)
        each = min(
            self.threads // threads,
            _REGISTERS // (-(-registers // 8) * 8 * threads),
            self.attributes.shared_multiprocessor // max(taken, 1),
        )
        return each * self.attributes.multiprocessors


_KB, _MB = 1024, 2**20

_TU102 = Attributes(68, 64 * _KB, 64 * _KB, 5632 * _KB, 1_545_000, 7_000_000, 352)
_AD102 = Attributes(128, 99 * _KB, 100 * _KB, 72 * _MB, 2_520_000, 10_501_000, 384)
_GA100 = Attributes(108, 163 * _KB, 164 * _KB, 40 * _MB, 1_410_000, 1_593_000, 5120)
_GH100 = Attributes(132, 227 * _KB, 228 * _KB, 50 * _MB, 1_980_000, 2_619_000, 5120)
_GH200 = _GH100._replace(l2_bytes=60 * _MB, memory_clock_khz=3_201_000, memory_bus_bits=6144)

CARDS = (
    Card("RTX 2080 Ti", 75, _TU102, 64, 1024),
    Card("RTX 4090", 89, _AD102, 128, 1536),
    Card("A100", 80, _GA100, 64, 2048),
    Card("H100", 90, _GH100, 128, 2048),
    Card("H200", 90, _GH200, 128, 2048),
)
