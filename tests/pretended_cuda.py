"""``torch.cuda`` on a machine without a GPU, for code that must use streams correctly on a GPU.

A tensor "on cuda" is a ``DeviceTensor`` around one in the CPU's memory. As on a GPU, no operation happens at
once: every operation, copy and kernel launch waits in its stream's queue, and new memory is full of NaN until
then. Queues run when the host has to wait, in an order that ``order`` chooses and that only events restrain.
Memory that is freed is overwritten as soon as the streams that it was recorded on allow it. So work that
lacks a wait, or a tensor that is freed too early, gives wrong numbers here too.

``pretended_gpu()`` switches all of this on.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ClassVar
from unittest import mock

import torch
from pretended_streams import QUEUES, Event, Graph, Stream, device_index, spoil
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

_OF_GRAPHS: list[Tensor] = []
_PINNED: dict[int, Tensor] = {}
"""Host memory, by address, that copies read when their turn comes."""


class Memory:
    """An allocation that torch's allocator makes and frees.

    Freed memory is overwritten as soon as the streams that used it get there. New memory may be the memory
    that its stream freed last, to which earlier work of the stream may still write. Another stream must not
    use it before that.
    """

    allocated = peak = 0
    live: ClassVar[dict[int, "Memory"]] = {}
    """The allocations by address, but for those without elements."""

    def __init__(self, base: Tensor, stream: Stream) -> None:
        self.base, self.stream, self.streams = base, stream, {stream}
        stream.reused.append(base)
        if base.nbytes:
            Memory.live[base.data_ptr()] = weakref.proxy(self)
        Memory.allocated += base.nbytes
        Memory.peak = max(Memory.peak, Memory.allocated)

    def __del__(self) -> None:
        Memory.allocated -= self.base.nbytes
        Memory.live.pop(self.base.data_ptr(), None)
        base, streams = self.base, list(self.streams)
        if base.nbytes == 0 or any(stream in QUEUES.captured for stream in streams):
            _OF_GRAPHS.append(base)  # a graph's memory stays its own
            return
        ended = not all(QUEUES.streams.get(stream.cuda_stream) is stream for stream in streams)
        if ended or not any(stream.queue for stream in streams):
            spoil(base)  # what a rehearsal that has ended left in its queues never runs
            return
        self.stream.free()
        overwriting = Stream(self.stream.device)
        for stream in streams:
            overwriting.wait_stream(stream)
        overwriting.add(lambda: spoil(base))


class DeviceTensor(Tensor):
    """A tensor on the pretended GPU: ``inner`` holds its elements, and ``memory`` is their allocation."""

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
        return dispatch(func, args, kwargs or {})

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


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation of torch where its tensors are."""
    with _disable_current_modes():
        return _dispatch(func, args, kwargs)


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    if name == "aten::is_pinned":
        return args[0].untyped_storage().data_ptr() in _PINNED
    if name == "aten::_pin_memory":
        pinned = args[0].clone()
        _PINNED[pinned.untyped_storage().data_ptr()] = pinned
        return pinned
    on_device = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, DeviceTensor)]
    wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if not on_device and (wanted is None or wanted.type != "cuda"):
        return func(*args, **kwargs)
    if name == "aten::copy_":
        return _copy(*args)
    if name == "aten::_to_copy":
        return _to_copy(func, args[0], kwargs, wanted)

    device = on_device[0].device if wanted is None else torch.device("cuda", device_index(wanted))
    _check_devices(name, args, kwargs)
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    bare = tree_map(lambda a: a.inner if isinstance(a, DeviceTensor) else a, (args, kwargs))

    def compute() -> Any:
        return func(*bare[0], **bare[1])

    results = func._schema.returns
    aliases = [result.alias_info for result in results if result.alias_info is not None]
    if not results or any(alias.is_write for alias in aliases):
        QUEUES.current_stream(device).add(compute)
        return args[0] if results else None
    if aliases:
        memory = on_device[0].memory
        return tree_map(lambda t: DeviceTensor(t, memory, device) if isinstance(t, Tensor) else t, compute())
    if not all("Tensor" in str(result.type) for result in results):  # the host wants to know
        QUEUES.wait_for(QUEUES.current_stream(device))
        return compute()
    if not on_device:  # nothing is read: random numbers, say, are drawn in the order of the calls
        value = compute()
        return _computed(value, device, None if "empty" in name else lambda: value)
    shape = tree_map(lambda a: a.to("meta") if isinstance(a, Tensor) else a, bare)
    if "device" in shape[1]:
        shape[1]["device"] = torch.device("meta")
    return _computed(func(*shape[0], **shape[1]), device, None if "empty" in name else compute)


def _check_devices(name: str, args: Any, kwargs: dict[str, Any]) -> None:
    """Raise torch's error for tensors of several devices; only numbers and indices may come from the host."""
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    if name in ("aten::index", "aten::index_put_"):
        tensors = [t for t in tensors if t.device.type != "cpu"]
    found = {t.device for t in tensors if t.ndim or t.device.type != "cpu"}
    if len(found) > 1:
        raise RuntimeError(f"{name}: Expected all tensors to be on the same device, got {found}")


def _computed(like: Any, device: torch.device, compute: Callable[[], Any] | None) -> Any:
    """New memory for tensors of these shapes, which is filled when its turn comes."""
    results = tree_map(lambda t: _allocate(t, device) if isinstance(t, Tensor) else t, like)
    if compute is not None:
        targets = [t.inner for t in tree_flatten(results)[0] if isinstance(t, DeviceTensor)]

        def fill() -> None:
            for target, value in zip(targets, tree_flatten(compute())[0], strict=True):
                target.copy_(value)

        QUEUES.current_stream(device).add(fill)
    return results


def _allocate(like: Tensor, device: torch.device) -> DeviceTensor:
    """New memory with arbitrary content; a deterministic torch lets its stream fill it."""
    base = torch.empty_strided(like.size(), like.stride(), dtype=like.dtype)
    spoil(base)
    stream = QUEUES.current_stream(device)
    if torch.are_deterministic_algorithms_enabled():
        stream.add(lambda: spoil(base))
    return DeviceTensor(base, Memory(base, stream), device)


def _to_copy(func: Any, source: Tensor, kwargs: dict[str, Any], wanted: torch.device | None) -> Tensor:
    if wanted is not None and wanted.type == "cpu":
        assert isinstance(source, DeviceTensor)
        QUEUES.wait_for(QUEUES.current_stream(source.device))
        return func(source.inner, **kwargs)
    device = source.device if wanted is None else torch.device("cuda", device_index(wanted))
    bare = source.inner if isinstance(source, DeviceTensor) else source
    like = torch.ops.aten._to_copy(bare.to("meta"), dtype=kwargs.get("dtype"))
    return _copy(_allocate(like, device), source, kwargs.get("non_blocking", False))


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Pinned host memory is read when the copy's turn comes, other host memory before the call returns."""
    if not isinstance(target, DeviceTensor):
        assert isinstance(source, DeviceTensor)
        QUEUES.wait_for(QUEUES.current_stream(source.device))
        return target.copy_(source.inner)
    if isinstance(source, DeviceTensor):
        bare = source.inner
    else:
        if not non_blocking:
            QUEUES.host_waits()
        bare = source if source.untyped_storage().data_ptr() in _PINNED else source.clone()
    inner = target.inner
    QUEUES.current_stream(target.device).add(lambda: inner.copy_(bare))
    return target


def _sleep(cycles: int) -> None:
    QUEUES.current_stream().add(lambda: None)


class Ranges:
    """See ``torch.cuda.nvtx``; keeps the names of the ranges that were entered."""

    names: ClassVar[list[str]] = []

    @staticmethod
    @contextmanager
    def range(name: str) -> Iterator[None]:
        Ranges.names.append(name)
        yield


def in_this_thread() -> AbstractContextManager[Any]:
    """A context in which a new thread has the pretended GPUs too, within ``pretended_gpu``."""
    return _Mode()


class _Properties:
    name = "pretended GPU"
    major, minor = 7, 5
    multi_processor_count = 1
    total_memory = 2**33


@contextmanager
def pretended_gpu(order: str = "launched", seed: int = 0) -> Iterator[None]:
    """``torch.cuda`` as if there were two GPUs, within the block."""
    QUEUES.reset(order, seed)
    replaced = {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": QUEUES.capture,
        "stream": QUEUES.use,
        "current_stream": QUEUES.current_stream,
        "synchronize": QUEUES.synchronize,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_current_stream_capturing": QUEUES.is_capturing,
        "_lazy_init": lambda: None,
        "device_count": lambda: 2,
        "current_device": lambda: QUEUES.current_device,
        "_exchange_device": QUEUES.exchange_device,
        "_maybe_exchange_device": QUEUES.exchange_device,
        "get_device_name": lambda device=None: _Properties.name,
        "get_device_properties": lambda device=None: _Properties,
        "get_device_capability": lambda device=None: (_Properties.major, _Properties.minor),
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: Memory.allocated,
        "max_memory_allocated": lambda device=None: Memory.peak,
        "reset_peak_memory_stats": lambda device=None: setattr(Memory, "peak", Memory.allocated),
        "set_sync_debug_mode": QUEUES.set_sync_debug_mode,
        "_sleep": _sleep,
        "nvtx": Ranges,
    }
    with ExitStack() as stack:
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") goes by way of the CPU
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "13.0"))
        stack.enter_context(
            mock.patch.object(torch.__future__, "_overwrite_module_params_on_conversion", True)
        )
        stack.enter_context(_Mode())
        yield
