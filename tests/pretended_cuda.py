"""``torch.cuda`` on a machine without a GPU, for code that has to be right about streams when it meets one.

A tensor "on cuda" is a ``DeviceTensor`` around one in the CPU's memory. As on a GPU, nothing that is asked
of it happens at once: every operation, copy and kernel launch waits in its stream's queue, new memory is full
of NaN until then, and queues run when the host has to wait, in an order that ``order`` chooses and that
only events restrain. Memory that is freed is overwritten as soon as the streams that it was recorded on allow
it. So work that lacks a wait, or a tensor that is gone too early, gives wrong numbers here too.

``pretended_gpu()`` switches all of this on.
"""

import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

ORDERS = ("launched", "others first", "others last", "random")
"""Whose queue runs first when one stream is waited for. A further one, "at once", lets nothing wait."""


class Mark:
    """A place in a stream, which an event was recorded at."""

    def __init__(self) -> None:
        self.reached: float | None = None

    def reach(self) -> None:
        self.reached = time.perf_counter()


class Work(NamedTuple):
    """An entry of a queue."""

    after: "Mark | Event | None"
    run: Callable[[], object]
    reused: list[Tensor]
    """Memory handed out anew to which this work might still have written."""


class Stream:
    """See ``torch.cuda.Stream``."""

    def __init__(self, device: Any = None, **_: Any) -> None:
        self.device = torch.device("cuda", GPU.index(device))
        self.cuda_stream = GPU.made
        self.queue: deque[Work] = deque()
        self.last_work: list[Tensor] = []
        self.reused: list[Tensor] = []
        """Where to note memory that may be what the stream freed last."""
        GPU.streams[GPU.made] = self
        GPU.made += 1

    def add(self, run: Callable[[], object]) -> None:
        """Queue work that touches memory."""
        self.last_work = []
        self._add(Work(None, run, self.last_work))

    def wait(self, mark: "Mark | Event") -> None:
        """What is queued later runs when the mark is reached."""
        self._add(Work(mark, _nothing, []))

    def mark(self, mark: Mark) -> None:
        self._add(Work(None, mark.reach, []))

    def _add(self, work: Work) -> None:
        if self in GPU.captured:
            GPU.captured[self].append(work)
            return
        self.queue.append(work)
        GPU.busy[self] = None
        if GPU.order == "at once":
            GPU.wait_for(self)

    def free(self) -> None:
        """Memory was freed: what comes next may be the same, and its last user's work still be queued."""
        self.reused = self.last_work

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        if self in GPU.captured and event.external:
            self.wait(event)  # for what was recorded last when the graph is replayed
        elif event.mark is not None:
            self.wait(event.mark)

    def wait_stream(self, stream: "Stream") -> None:
        self.wait_event(stream.record_event())

    def query(self) -> bool:
        return not self.queue

    def synchronize(self) -> None:
        GPU.wait_for(self)


class Event:
    """See ``torch.cuda.Event``."""

    def __init__(self, enable_timing: bool = False, external: bool = False, **_: Any) -> None:
        self.external = external
        self.mark: Mark | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.mark = Mark()
        (stream or GPU.current_stream()).mark(self.mark)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or GPU.current_stream()).wait_event(self)

    def query(self) -> bool:
        return self.mark is None or self.mark.reached is not None

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end.mark.reached - self.mark.reached)


class Graph:
    """See ``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        self.work: list[Work] = []

    def replay(self) -> None:
        stream = GPU.current_stream()
        for work in self.work:
            if work.after is None:
                stream.add(work.run)
            else:
                stream.wait(work.after.mark if isinstance(work.after, Event) else work.after)


class Memory:
    """An allocation, as torch's allocator makes and frees it.

    What is freed is overwritten as soon as the streams that used it get there. What is new may be what its
    stream freed last, and work that the stream was given before may still write there: on another stream
    it must not be used before.
    """

    allocated = peak = 0

    def __init__(self, base: Tensor, stream: Stream) -> None:
        self.base, self.stream, self.streams = base, stream, {stream}
        stream.reused.append(base)
        Memory.allocated += base.nbytes
        Memory.peak = max(Memory.peak, Memory.allocated)

    def __del__(self) -> None:
        Memory.allocated -= self.base.nbytes
        base, streams = self.base, list(self.streams)
        if base.nbytes == 0 or any(stream in GPU.captured for stream in streams):
            GPU.kept.append(base)  # a graph's memory stays its own
            return
        if not any(stream.queue for stream in streams):
            spoil(base)
            return
        self.stream.free()
        overwriting = Stream(self.stream.device)
        for stream in streams:
            overwriting.wait_stream(stream)
        overwriting.add(lambda: spoil(base))


def spoil(tensor: Tensor) -> None:
    """NaN, or numbers that nothing should take for sizes or addresses."""
    if tensor.nbytes:
        bytes_ = torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())
        bytes_.fill_(0xFF if tensor.dtype != torch.bool else 1)


class DeviceTensor(Tensor):
    """A tensor on the pretended GPU: ``inner`` is where its elements are, ``memory`` whose they are."""

    inner: Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, inner: Tensor, memory: Memory, device: torch.device) -> "DeviceTensor":
        result = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        result.inner, result.memory = inner, memory
        return result

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return GPU.dispatch(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def record_stream(self, stream: Stream) -> None:
        self.memory.streams.add(stream)

    def __deepcopy__(self, memo):
        with torch.no_grad():
            copy = self.detach().clone().requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        return copy


def _nothing() -> None:
    pass


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return GPU.dispatch(func, args, kwargs or {})


class PretendedGPU:
    """Two devices, their streams, and what ``torch.cuda`` would know of them."""

    def __init__(self) -> None:
        self.reset()

    def reset(self, order: str = "launched", seed: int = 0) -> None:
        self.order = order
        self.random = random.Random(seed)
        self.streams: dict[int, Stream] = {}
        """By the number that stands for the stream's address."""
        self.made = 0
        self.busy: dict[Stream, None] = {}
        """Streams whose queues are not empty, in the order in which they became so."""
        self.current: dict[int, Stream] = {}
        self.captured: dict[Stream, list[Any]] = {}
        self.kept: list[Tensor] = []
        self.sync_debug_mode: Any = "default"
        self.pinned: set[int] = set()

    @staticmethod
    def index(device: Any) -> int:
        return (
            (torch.device("cuda" if device is None else device).index or 0)
            if not isinstance(device, int)
            else device
        )

    def current_stream(self, device: Any = None) -> Stream:
        index = self.index(device)
        if index not in self.current:
            self.current[index] = Stream(index)
        return self.current[index]

    # -- running ---------------------------------------------------------------------------------

    def _ready(self, stream: Stream) -> bool:
        after = stream.queue[0].after
        return after is None or after.reached is not None

    def _run_one(self, stream: Stream) -> None:
        work = stream.queue.popleft()
        if not stream.queue:
            del self.busy[stream]
        work.run()
        for base in work.reused:
            spoil(base)

    def wait_for(self, *wanted: Stream) -> None:
        """Run queues until those of the streams wanted are empty."""
        if self.sync_debug_mode in ("error", 2):
            raise RuntimeError("called a synchronizing CUDA operation")
        with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
            while any(stream.queue for stream in wanted):
                stream = self._choose(wanted)
                if stream is None:
                    raise RuntimeError("streams wait for each other")
                self._run_one(stream)

    def _choose(self, wanted: tuple[Stream, ...]) -> Stream | None:
        """The stream whose next work runs; None if all are held up."""
        ready = (stream for stream in self.busy if self._ready(stream))
        if self.order in ("at once", "launched"):
            return next(ready, None)
        streams = list(ready)
        if self.order == "random":
            return self.random.choice(streams) if streams else None
        if self.order == "others first":
            streams.reverse()
        first = [s for s in streams if (s in wanted) == (self.order == "others last")]
        return (first or streams or [None])[0]

    def synchronize(self, device: Any = None) -> None:
        self.wait_for(*self.busy)
        self.kept.clear()

    # -- operations ------------------------------------------------------------------------------

    def allocate(self, like: Tensor, device: torch.device) -> DeviceTensor:
        """New memory for a tensor of this kind (of any device), full of what was there before."""
        base = torch.empty_strided(like.size(), like.stride(), dtype=like.dtype)
        spoil(base)
        stream = self.current_stream(device)
        return DeviceTensor(base, Memory(base, stream), device)

    def dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        with torch.utils._python_dispatch._disable_current_modes():
            return self._dispatch(func, args, kwargs)

    def _dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        flat = tree_flatten((args, kwargs))[0]
        on_device = [a for a in flat if isinstance(a, DeviceTensor)]
        wanted = kwargs.get("device")
        to_device = wanted is not None and torch.device(wanted).type == "cuda"
        name = func._schema.name
        if name == "aten::_pin_memory":
            result = args[0].clone()
            self.pinned.add(result.untyped_storage().data_ptr())
            return result
        if name == "aten::is_pinned":
            return args[0].untyped_storage().data_ptr() in self.pinned
        if not on_device and not to_device:
            return func(*args, **kwargs)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        device = torch.device("cuda", self.index(wanted)) if to_device else on_device[0].device
        if name in ("aten::_to_copy", "aten::copy_"):
            return self._copy(func, args, kwargs, device, wanted)
        bare_args, bare_kwargs = tree_map(
            lambda a: a.inner if isinstance(a, DeviceTensor) else a, (args, kwargs)
        )
        returns = func._schema.returns
        writes = [r.alias_info is not None and r.alias_info.is_write for r in returns]
        if any(writes) or not returns:
            self.current_stream(device).add(lambda: func(*bare_args, **bare_kwargs))
            written = next((a for a in on_device), None)
            return written if len(returns) == 1 else None if not returns else args[0]
        if any(r.alias_info is not None for r in returns):  # a view
            memory = on_device[0].memory
            return tree_map(
                lambda t: DeviceTensor(t, memory, device) if isinstance(t, Tensor) else t,
                func(*bare_args, **bare_kwargs),
            )
        if any(str(r.type) != "Tensor" and "Tensor" not in str(r.type) for r in returns):
            self.wait_for(self.current_stream(device))  # the host wants to know
            return func(*bare_args, **bare_kwargs)
        if not on_device:  # a factory
            value = func(*bare_args, **bare_kwargs)
            result = self.allocate(value, device)
            if "empty" not in name:
                target = result.inner
                self.current_stream(device).add(lambda: target.copy_(value))
            return result
        shapes = func(
            *tree_map(lambda a: a.to("meta") if isinstance(a, Tensor) else a, bare_args),
            **{
                k: torch.device("meta")
                if k == "device"
                else tree_map(lambda a: a.to("meta") if isinstance(a, Tensor) else a, v)
                for k, v in bare_kwargs.items()
            },
        )
        result = tree_map(lambda t: self.allocate(t, device) if isinstance(t, Tensor) else t, shapes)
        if "empty" not in name:
            targets = [t.inner for t in tree_flatten(result)[0] if isinstance(t, DeviceTensor)]

            def compute() -> None:
                values = tree_flatten(func(*bare_args, **bare_kwargs))[0]
                for target, value in zip(targets, values, strict=True):
                    target.copy_(value)

            self.current_stream(device).add(compute)
        return result

    def _copy(self, func: Any, args: Any, kwargs: dict[str, Any], device: torch.device, wanted: Any) -> Any:
        """Copies to, from and on the device. Only those from pinned memory do not hold up the host."""
        into = func._schema.name == "aten::copy_"
        source = args[1] if into else args[0]
        host_target = (
            isinstance(args[0], Tensor) and not isinstance(args[0], DeviceTensor)
            if into
            else (wanted is not None and torch.device(wanted).type == "cpu")
        )
        bare = source.inner if isinstance(source, DeviceTensor) else source
        if host_target:
            self.wait_for(self.current_stream(source.device))
            return args[0].copy_(bare) if into else func(bare, **kwargs)
        if into:
            result = args[0]
        else:
            like = torch.ops.aten._to_copy(bare.to("meta"), dtype=kwargs.get("dtype"))
            result = self.allocate(like, device)
        target = result.inner
        stream = self.current_stream(device)
        if not isinstance(source, DeviceTensor):
            pinned = bare.untyped_storage().data_ptr() in self.pinned
            waits = not (args[2] if into and len(args) > 2 else kwargs.get("non_blocking", False))
            if not pinned:
                bare = bare.clone()  # pageable memory is read before the call returns
            if waits and self.sync_debug_mode in ("error", 2):
                raise RuntimeError("called a synchronizing CUDA operation")
        stream.add(lambda: target.copy_(bare))
        return result


GPU = PretendedGPU()


@contextmanager
def _use_stream(stream: Stream | None) -> Iterator[None]:
    if stream is None:
        yield
        return
    index = stream.device.index
    before = GPU.current_stream(index)
    GPU.current[index] = stream
    try:
        yield
    finally:
        GPU.current[index] = before


@contextmanager
def _capture(graph: Graph, **_: Any) -> Iterator[None]:
    stream = Stream()
    GPU.captured[stream] = graph.work
    try:
        with _use_stream(stream):
            yield
    finally:
        del GPU.captured[stream]


def _sleep(cycles: int) -> None:
    GPU.current_stream().add(_nothing)


def _set_sync_debug_mode(mode: Any) -> None:
    GPU.sync_debug_mode = mode


class _Properties:
    name = "pretended GPU"
    major, minor = 7, 5
    multi_processor_count = 1
    total_memory = 2**33


@contextmanager
def pretended_gpu(order: str = "launched", seed: int = 0) -> Iterator[PretendedGPU]:
    """``torch.cuda`` as if there were two GPUs, within the block."""
    GPU.reset(order, seed)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") goes by way of the CPU
    replaced = {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": _capture,
        "stream": _use_stream,
        "current_stream": GPU.current_stream,
        "synchronize": GPU.synchronize,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": _nothing,
        "device_count": lambda: 2,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: _Properties.name,
        "get_device_properties": lambda device=None: _Properties,
        "get_device_capability": lambda device=None: (_Properties.major, _Properties.minor),
        "empty_cache": _nothing,
        "memory_allocated": lambda device=None: Memory.allocated,
        "max_memory_allocated": lambda device=None: Memory.peak,
        "reset_peak_memory_stats": lambda device=None: setattr(Memory, "peak", Memory.allocated),
        "set_sync_debug_mode": _set_sync_debug_mode,
        "_sleep": _sleep,
    }
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "13.0"))
        stack.enter_context(
            mock.patch.object(torch.__future__, "_overwrite_module_params_on_conversion", True)
        )
        stack.enter_context(_Mode())
        yield GPU
