"""Streams, events and graphs of a pretended GPU, as queues that the host runs when it has to wait.

``Queues.order`` chooses which queue runs first. Only events restrain it, as on a GPU.
"""

import itertools
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

ORDERS = ("launched", "others first", "others last", "random")
"""The orders in which queues run when the host waits for a stream. One more, "at once", queues nothing."""


class Mark:
    """A place in a stream at which an event was recorded."""

    def __init__(self) -> None:
        self.reached: float | None = None

    def reach(self) -> None:
        self.reached = time.perf_counter()


class Work(NamedTuple):
    """An entry of a queue."""

    after: "Mark | Event | None"
    run: Callable[[], object]
    reused: list[Tensor]
    """Memory that was handed out again and to which this work might still have written."""


class Stream:
    """See ``torch.cuda.Stream``."""

    def __init__(self, device: Any = None, **_: Any) -> None:
        self.device = torch.device("cuda", device_index(device))
        self.cuda_stream = next(QUEUES.numbers)
        self.queue: deque[Work] = deque()
        self.last_work: list[Tensor] = []
        self.reused: list[Tensor] = []
        """A place to note memory that may be what the stream freed last."""
        QUEUES.streams[self.cuda_stream] = self

    def add(self, run: Callable[[], object]) -> None:
        """Queue work that touches memory."""
        self.last_work = []
        self._add(Work(None, run, self.last_work))

    def wait(self, mark: "Mark | Event") -> None:
        """Let later work run only when the mark is reached."""
        self._add(Work(mark, _nothing, []))

    def mark(self, mark: Mark) -> None:
        self._add(Work(None, mark.reach, []))

    def _add(self, work: Work) -> None:
        if self in QUEUES.captured:
            QUEUES.captured[self].append(work)
            return
        self.queue.append(work)
        QUEUES.busy[self] = None
        if QUEUES.order == "at once":
            QUEUES.wait_for(self)

    def free(self) -> None:
        """Note that memory was freed. The next allocation may be the same while old work on it is queued."""
        self.reused = self.last_work

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        if self in QUEUES.captured and event.external:
            self.wait(event)  # the wait is for the latest record when the graph is replayed
        elif event.mark is not None:
            self.wait(event.mark)

    def wait_stream(self, stream: "Stream") -> None:
        self.wait_event(stream.record_event())

    def query(self) -> bool:
        return not self.queue

    def synchronize(self) -> None:
        QUEUES.wait_for(self)


class Event:
    """See ``torch.cuda.Event``."""

    def __init__(self, enable_timing: bool = False, external: bool = False, **_: Any) -> None:
        self.external = external
        self.mark: Mark | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.mark = Mark()
        (stream or QUEUES.current_stream()).mark(self.mark)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or QUEUES.current_stream()).wait_event(self)

    def query(self) -> bool:
        return self.mark is None or self.mark.reached is not None

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end.mark.reached - self.mark.reached)


class Graph:
    """See ``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        self.work: list[Work] = []

    def replay(self) -> None:
        stream = QUEUES.current_stream()
        for work in self.work:
            if work.after is None:
                stream.add(work.run)
            else:
                stream.wait(work.after.mark if isinstance(work.after, Event) else work.after)


def spoil(tensor: Tensor) -> None:
    """Fill a tensor with NaN, or with numbers that are no sizes or addresses."""
    if tensor.nbytes:
        bytes_ = torch.tensor([], dtype=torch.uint8, device="cpu").set_(tensor.untyped_storage())
        bytes_.fill_(0xFF if tensor.dtype != torch.bool else 1)


def device_index(device: Any) -> int:
    """The index of a device in any of torch's forms, 0 unless it gives another."""
    if isinstance(device, int):
        return device
    return torch.device("cuda" if device is None else device).index or 0


class _Thread(threading.local):
    """The device and the streams that are current in a thread; without one, a device's default stream is."""

    def __init__(self) -> None:
        self.device = 0
        self.streams: dict[int, Stream] = {}


class Queues:
    """All streams, and the choice of the one that runs next."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reset()

    def reset(self, order: str = "launched", seed: int = 0) -> None:
        self.order = order
        self.sync_debug_mode: Any = "default"
        self.streams: dict[int, Stream] = {}
        """The streams by the number that stands for their address."""
        self.numbers = itertools.count()
        self.busy: dict[Stream, None] = {}
        """Streams whose queues are not empty, in the order in which they got work."""
        self.captured: dict[Stream, list[Work]] = {}
        self._here = _Thread()
        self._defaults: dict[int, Stream] = {}
        self._random = random.Random(seed)

    @property
    def current_device(self) -> int:
        """The device of the current thread."""
        return self._here.device

    def exchange_device(self, index: int) -> int:
        """Make it the current device unless it is -1, and return the device that was current."""
        before = self._here.device
        self._here.device = before if index < 0 else index
        return before

    def current_stream(self, device: Any = None) -> Stream:
        """See ``torch.cuda.current_stream``."""
        index = device_index(device)
        if index in self._here.streams:
            return self._here.streams[index]
        with self._lock:
            if index not in self._defaults:
                self._defaults[index] = Stream(index)
        return self._defaults[index]

    @contextmanager
    def use(self, stream: Stream | None) -> Iterator[None]:
        """See ``torch.cuda.stream``."""
        if stream is None:
            yield
            return
        before = self.current_stream(stream.device)
        self._here.streams[stream.device.index] = stream
        try:
            yield
        finally:
            self._here.streams[stream.device.index] = before

    @contextmanager
    def capture(self, graph: Graph, **_: Any) -> Iterator[None]:
        """See ``torch.cuda.graph``."""
        stream = Stream()
        self.captured[stream] = graph.work
        try:
            with self.use(stream):
                yield
        finally:
            del self.captured[stream]

    def is_capturing(self) -> bool:
        """See ``torch.cuda.is_current_stream_capturing``."""
        return self.current_stream(self.current_device) in self.captured

    def synchronize(self, device: Any = None) -> None:
        """See ``torch.cuda.synchronize``; it waits for all devices."""
        self.wait_for(*self.busy)

    def set_sync_debug_mode(self, mode: Any) -> None:
        """See ``torch.cuda.set_sync_debug_mode``."""
        self.sync_debug_mode = mode

    def host_waits(self) -> None:
        """Raise RuntimeError where the host must not wait for a device."""
        if self.sync_debug_mode in ("error", 2):
            raise RuntimeError("called a synchronizing CUDA operation")

    def wait_for(self, *wanted: Stream) -> None:
        """Run queues until those of the streams wanted are empty."""
        self.host_waits()
        with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
            while any(stream.queue for stream in wanted):
                stream = self._choose(wanted)
                if stream is None:
                    raise RuntimeError("streams wait for each other")
                self._run_one(stream)

    def _choose(self, wanted: tuple[Stream, ...]) -> Stream | None:
        """The stream whose next work runs; None if all are held up."""
        ready = (stream for stream in self.busy if _is_ready(stream.queue[0]))
        if self.order in ("at once", "launched"):
            return next(ready, None)
        streams = list(ready)
        if self.order == "random":
            return self._random.choice(streams) if streams else None
        streams.reverse()
        first = [s for s in streams if (s in wanted) == (self.order == "others last")]
        return (first or streams or [None])[0]

    def _run_one(self, stream: Stream) -> None:
        work = stream.queue.popleft()
        if not stream.queue:
            del self.busy[stream]
        work.run()
        for base in work.reused:
            spoil(base)


def _is_ready(work: Work) -> bool:
    return work.after is None or work.after.reached is not None


def _nothing() -> None:
    pass


QUEUES = Queues()
