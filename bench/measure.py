"""Timing that can be trusted on a noisy machine, and results that can be read later.

Cases that are to be compared are timed in turn, round by round, so that other work on the machine slows all
of them alike. A comparison is the median over rounds of the paired ratio, with a distribution-free confidence
interval. Absolute seconds are for the reader's orientation only.
"""

import gc
import io
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats

from bench import atomic

Seconds = npt.NDArray[np.float64]
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A median (or mean) and its interval; `low` and `high` are None where the samples give no interval."""

    median: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return self.text()

    def text(self, form: str = ".3f") -> str:
        """The text `median [low, high]`, or `median [-]`, with every number in this format."""
        bounds = "-" if self.low is None else f"{self.low:{form}}, {self.high:{form}}"
        return f"{self.median:{form}} [{bounds}]"


def seconds_per_call(case: Callable[[], object], calls: int, synchronise: Callable[[], object]) -> float:
    """Mean of `calls` calls in a row, with the device idle before and after (`synchronise`)."""
    synchronise()
    start = time.perf_counter()
    for _ in range(calls):
        case()
    synchronise()
    return (time.perf_counter() - start) / calls


class Interleaved:
    """Times several cases in turn, as many rounds as the caller needs.

    Every round calls every case, in an order that is drawn anew (always the same draws), so that no
    case always follows the same neighbour. A case that is quicker than `min_seconds` is called
    several times per round and the mean is kept.

    Args:
        cases: from a name to a function without arguments, whose result is ignored.
        min_seconds: shortest time a case may run in one round, in seconds.
        warmup: calls of every case before anything is timed; at least one with `min_seconds`.
        synchronise: called before the clock is read, for devices that work asynchronously
            (`torch.cuda.synchronize`).

    Raises:
        ValueError: there is no case, there are too few calls to warm up, or `min_seconds` is negative.

    """

    def __init__(
        self,
        cases: Mapping[str, Callable[[], object]],
        *,
        min_seconds: float = 0.0,
        warmup: int = 1,
        synchronise: Callable[[], object] | None = None,
    ) -> None:
        if not cases:
            raise ValueError("cases is empty: there is nothing to time")
        least = 1 if min_seconds > 0 else 0
        if warmup < least:
            raise ValueError(f"warmup must be at least {least}, got {warmup}")
        if not min_seconds >= 0:
            raise ValueError(f"min_seconds must not be negative, got {min_seconds}")
        self._cases = dict(cases)
        self._synchronise = synchronise or (lambda: None)
        self._order = np.random.default_rng(0)
        self._seconds: dict[str, list[float]] = {name: [] for name in cases}
        self._calls = dict.fromkeys(cases, 1)
        with collector_paused():
            for name in cases:
                # The last warm-up call says how many calls make a round long enough.
                single = math.inf
                for _ in range(warmup):
                    single = self._time(name)
                self._calls[name] = max(1, math.ceil(min_seconds / max(single, 1e-9)))

    def _time(self, name: str) -> float:
        return seconds_per_call(self._cases[name], self._calls[name], self._synchronise)

    def run(self, rounds: int) -> dict[str, Seconds]:
        """Times `rounds` more rounds.

        Returns:
            Case name to seconds per call, shape (rounds so far,), float64. Entry i of every case
            comes from the same round.

        """
        names = list(self._cases)
        with collector_paused():
            for _ in range(rounds):
                for index in self._order.permutation(len(names)):
                    self._seconds[names[index]].append(self._time(names[index]))
        return {name: np.array(seconds) for name, seconds in self._seconds.items()}


def interleave(
    cases: Mapping[str, Callable[[], object]],
    rounds: int,
    min_seconds: float = 0.0,
    *,
    warmup: int = 1,
    synchronise: Callable[[], object] | None = None,
) -> dict[str, Seconds]:
    """Times `cases` over `rounds` interleaved rounds: `Interleaved` in one call."""
    return Interleaved(cases, min_seconds=min_seconds, warmup=warmup, synchronise=synchronise).run(rounds)


class HostClock:
    """Books time under phases by the host's clock, waiting for the device at every boundary.

    Args:
        device: the device that has to be idle before the clock is read.
        phases: names that `seconds` holds from the start, at 0.

    Attributes:
        seconds: phase to seconds booked so far.

    """

    def __init__(self, device: torch.device, phases: Iterable[str] = ()) -> None:
        self._device = device
        self.seconds = dict.fromkeys(phases, 0.0)
        self._last = self._now()

    def stop(self, phase: str) -> None:
        """Books the time since the last boundary under `phase`."""
        now = self._now()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def _now(self) -> float:
        synchronise(self._device)
        return time.perf_counter()


class EventClock:
    """Books time under phases by CUDA events on the current stream, which stop neither host nor device.

    `seconds` waits for the device. It counts the time that passed on the stream between two boundaries,
    including the time in which the stream waited for the host.
    """

    def __init__(self, device: torch.device, phases: Iterable[str] = ()) -> None:
        self._device = device
        self._phases = list(phases)
        self._marks = [("", self._event())]

    def stop(self, phase: str) -> None:
        """Books the time since the last boundary under `phase`."""
        self._marks.append((phase, self._event()))

    @property
    def seconds(self) -> dict[str, float]:
        """Phase to seconds booked so far."""
        synchronise(self._device)
        booked = dict.fromkeys(self._phases, 0.0)
        for (_, before), (phase, after) in pairwise(self._marks):
            booked[phase] = booked.get(phase, 0.0) + before.elapsed_time(after) / 1000
        return booked

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def synchronise(device: torch.device) -> None:
    """Waits until `device` has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keeps Python's garbage collector from running inside a timed region."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def median(samples: npt.ArrayLike) -> Interval:
    """Median of `samples`, shape (n,), with its distribution-free interval of `CONFIDENCE`.

    Each sample lies below the true median with probability 1/2, whatever it is drawn from, so the number of
    samples below it is binomial. The interval reaches from the (k+1)-th smallest sample to the (k+1)-th
    largest, with the largest k for which the probability to miss the median is at most 1 - CONFIDENCE. Fewer
    than six samples give no interval, since even from the smallest to the largest the probability is higher.

    Raises:
        ValueError: `samples` is empty, is not one-dimensional, or holds a NaN.

    """
    values = np.sort(np.asarray(samples, dtype=np.float64))
    if values.ndim != 1 or values.size == 0 or np.isnan(values).any():
        raise ValueError(f"expected a non-empty vector without NaN, got shape {values.shape}")
    outside = 2 * stats.binom.cdf(np.arange(values.size), values.size, 0.5)
    k = int(np.count_nonzero(outside <= 1 - CONFIDENCE)) - 1
    centre = float(np.median(values))
    return (
        Interval(centre, None, None) if k < 0 else Interval(centre, float(values[k]), float(values[-1 - k]))
    )


def ratio(a: npt.ArrayLike, b: npt.ArrayLike) -> Interval:
    """How many times as long `a` took as `b`: median over rounds of a[i] / b[i], with its interval.

    Args:
        a: seconds per round, shape (rounds,).
        b: seconds of the reference in the same rounds, shape (rounds,).

    Raises:
        ValueError: the two are not from the same number of rounds, or there is no round.

    """
    above, below = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if above.shape != below.shape:
        raise ValueError(
            f"a and b must come from the same rounds, got shapes {above.shape} and {below.shape}"
        )
    return median(above / below)


def medians(seconds: Mapping[str, npt.ArrayLike]) -> dict[str, float]:
    """The median seconds of every case."""
    return {case: median(times).median for case, times in seconds.items()}


def ratios(seconds: Mapping[str, npt.ArrayLike], reference: str) -> dict[str, dict[str, float | None]]:
    """How many times as long every other case takes as the reference: `ratio`, ready for JSON."""
    return {
        case: ratio(times, seconds[reference])._asdict()
        for case, times in seconds.items()
        if case != reference
    }


def machine() -> dict[str, Any]:
    """The machine of a measurement: hardware, threads and versions, without names of hosts or users."""
    description: dict[str, Any] = {
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "cores": _usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "revision": _revision(),
    }
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        description["gpu"] = device.name
        description["gpu_memory_gib"] = round(device.total_memory / 2**30, 1)
        description["gpu_capability"] = f"{device.major}.{device.minor}"
        description["cuda"] = torch.version.cuda
    return description


def count(number: int, what: str) -> str:
    """`1 epoch`, `2 epochs`."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def write_json(path: str | Path, payload: Any) -> None:
    """Writes `payload` as indented JSON, whole or not at all, and makes its folders.

    NumPy and torch values become plain numbers and lists. NaN and infinities, which JSON lacks, become null.
    Dataclasses and named tuples must have been converted by the caller.
    """
    path = Path(path)
    text = json.dumps(plain(payload), indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, text.encode())


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes `rows` under a line of their column names, whole or not at all."""
    from rmsgd.inspection.report import csv_table  # the gate times revisions that have it elsewhere

    text = io.StringIO(newline="")
    csv_table.write_csv(text, rows)
    atomic.write(path, text.getvalue().encode())


def plain(value: Any) -> Any:
    """`value` in JSON's types: NumPy and torch values as numbers and lists, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return platform.processor() or "unknown"


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _revision() -> str | None:
    """The commit of the checkout, with a mark when files differ from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
