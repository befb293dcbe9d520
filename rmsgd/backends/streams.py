"""The stream of an epoch end on a GPU, which runs beside the caller's stream and which steps wait for."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


class _Thread(threading.local):
    """The state that every thread has for itself."""

    caller: torch.cuda.Stream | None = None


class Streams:
    """The streams of one CUDA device. Kernels are given a stream's address."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._here = _Thread()
        # The event is external: at a replay, a captured wait is for the latest record. There must be one.
        self._done = _external_event()
        self._done.record(self._side)

    def current(self) -> int:
        """The stream that torch uses now."""
        return torch.cuda.current_stream(self._device).cuda_stream

    def caller(self) -> int:
        """The stream of the caller of ``epoch_step``: the current one, except within ``side_stream``."""
        return self.current() if self._here.caller is None else self._here.caller.cuda_stream

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        """A context in which torch's stream is the side stream."""
        self._here.caller = torch.cuda.current_stream(self._device)
        # Weights may be gathered there before they are measured.
        self._side.wait_stream(self._here.caller)
        try:
            with torch.cuda.stream(self._side):
                yield
        finally:
            self._done.record(self._side)
            self._here.caller = None

    @contextmanager
    def caller_stream(self) -> Iterator[None]:
        """A context in which torch's stream is the caller's."""
        with torch.cuda.stream(self._here.caller or torch.cuda.current_stream(self._device)):
            yield

    def caller_waits(self) -> None:
        """Make the caller's stream wait for the side stream, for example for memory that was used there."""
        if self._here.caller is not None:
            self._here.caller.wait_stream(self._side)

    def side_waits(self) -> None:
        """Make the current stream wait for the work that the caller's stream has been given so far."""
        if self._here.caller is not None:
            self._side.wait_stream(self._here.caller)

    def wait_side_stream(self) -> None:
        """Make the current stream wait for the side stream. If it is captured, every replay waits."""
        torch.cuda.current_stream(self._device).wait_event(self._done)

    def record_stream(self, tensor: Tensor) -> None:
        """Keep the memory of a tensor of any shape until the current stream is done with it."""
        tensor.record_stream(torch.cuda.current_stream(self._device))


def check_not_capturing(tensors: Iterable[Tensor], what: str) -> None:
    """Raise RuntimeError if a CUDA graph is being captured on the device of one of these parameters."""
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"{what} cannot be captured in a CUDA graph: capture step() alone, and call {what} "
                    "between replays, which then follow its learning rates. Nothing has changed"
                )


def named_range(name: str) -> AbstractContextManager[None]:
    """A context in which the host's work has this name in NVIDIA's profilers (NVTX)."""
    if torch.version.cuda is None:
        return nullcontext()
    return torch.cuda.nvtx.range(name)


def _external_event() -> torch.cuda.Event:
    try:
        return torch.cuda.Event(external=True)  # type: ignore[no-untyped-call]
    except TypeError:  # torch 2.6 has none, so a step cannot be captured there once rates were moved
        return torch.cuda.Event()  # type: ignore[no-untyped-call]
