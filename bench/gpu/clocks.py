"""The device time of calls, and the time of the host beside it."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch

from bench.measure import collector_paused

MOST_CALLS = 5
HOST_S = 0.005  # the most seconds that the host should take to queue the calls of one timing


@cache
def cycles_per_second() -> float:
    """The cycles per second of `torch.cuda._sleep`, measured once the GPU's clock has risen from idle."""
    torch.cuda._sleep(200_000_000)
    cycles = 20_000_000
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    torch.cuda._sleep(cycles)
    end.record()
    torch.cuda.synchronize()
    return cycles / begin.elapsed_time(end) * 1000


@dataclass(frozen=True)
class DeviceTime:
    """The time of one call, as the mean of several.

    Attributes:
        device: seconds between its beginning and its end on the current stream.
        host: seconds that the host took to queue it.
        queued: whether all of it was in the queue before the device began, so that `device` is the device's
            time alone. A driver's queue holds about a thousand launches: if a call makes more, or waits for
            the device, `device` includes the host's time.

    """

    device: float
    host: float
    queued: bool


def device_time(call: Callable[[], object], calls: int) -> DeviceTime:
    """Times `calls` calls in a row, behind a sleep of the device that lasts until all are queued."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    torch.cuda._sleep(int((2 * host + 0.001) * cycles_per_second()))
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    queued = not begin.query()
    torch.cuda.synchronize()
    return DeviceTime(begin.elapsed_time(end) / 1000 / calls, host / calls, queued)


def interleaved(cases: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[DeviceTime]]:
    """From a case to its time in each round of cases in turn; a case that is slow to queue is called once."""
    calls = {}
    with collector_paused():
        for name, call in cases.items():
            call()  # what is done once
            host = device_time(call, 1).host
            calls[name] = max(1, min(MOST_CALLS, int(HOST_S / max(host, 1e-9))))
        times: dict[str, list[DeviceTime]] = {name: [] for name in cases}
        for _ in range(rounds):
            for name, call in cases.items():
                times[name].append(device_time(call, calls[name]))
    return times


def device_seconds(times: list[DeviceTime]) -> list[float]:
    """Seconds of device time per round."""
    return [t.device for t in times]


def host_seconds(times: list[DeviceTime]) -> float:
    """Median seconds that the host took."""
    return statistics.median(t.host for t in times)
