"""Exact counts of the work of a step and an epoch end, which use no clock and so have no noise."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import rmsgd
from bench.epoch_end import STAGES
from bench.models import build
from bench.weights import make_trained_like
from rmsgd import backends
from rmsgd.backends.base import STAGE

NETWORK = "mobilenetv2"
HOST_WAITS = ("Synchronize", "cudaMemcpy")


class _Operations(TorchDispatchMode):
    """Counts the torch operations that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def count() -> dict[str, int]:
    """From name to count, for a step and an epoch end of MobileNetV2 with weights as training leaves them."""
    found = _of_device(torch.device("cpu"))
    if torch.cuda.is_available():
        found |= _of_device(torch.device("cuda"))
    return found


def _of_device(device: torch.device) -> dict[str, int]:
    torch.manual_seed(0)
    network = build(NETWORK)
    make_trained_like(network)
    network.to(device)
    optimizer = rmsgd.RMSGD(network.named_parameters(), lr=1e-6)
    for p in network.parameters():
        p.grad = torch.full_like(p, 1e-6)
    optimizer.step()
    optimizer.epoch_step()
    found = {f"{what}, {device}": n for what, n in _spectra(optimizer, device).items()}
    for name, call in (("step", optimizer.step), ("epoch end", optimizer.epoch_step)):
        found |= {f"{what} per {name}, {device}": n for what, n in _activity(call, device).items()}
    return found


def _spectra(optimizer: rmsgd.RMSGD, device: torch.device) -> dict[str, int]:
    """How many spectra an epoch end asks its backend for, and how many the guard had computed again."""
    backend: Any = backends.backend_for(device)
    measure, tables = backend.measure, []

    def listen(matrices: Any) -> Any:
        tables.append(measure(matrices))
        return tables[-1]

    backend.measure = listen
    try:
        optimizer.epoch_step()
    finally:
        del backend.measure
    stages = Counter(int(stage) for table in tables for stage in table[:, STAGE].tolist())
    later = list(enumerate(STAGES))[1:]
    return {"spectra per epoch end": stages.total()} | {
        f"spectra redone by {name}": stages[stage] for stage, name in later
    }


def _activity(call: Callable[[], object], device: torch.device) -> dict[str, int]:
    """Torch operations and allocations of one call; on a GPU also kernel launches and waits of the host."""
    with _Operations() as operations:
        call()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities, profile_memory=True) as recorded:
        call()
    events = recorded.events() or []
    memory = "cpu_memory_usage" if device.type == "cpu" else "device_memory_usage"
    found = {
        "torch operations": operations.count,
        "allocations": sum(e.name == "[memory]" and getattr(e, memory) > 0 for e in events),
    }
    if device.type == "cuda":
        found["kernel launches"] = sum("LaunchKernel" in e.name for e in events)
        found["host waits"] = sum(any(word in e.name for word in HOST_WAITS) for e in events)
    return found
