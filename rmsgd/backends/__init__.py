"""The operations of the optimizer on a device: one backend per implementation, chosen by the device.

``native`` is the compiled core. ``numba`` is the reference compiled by numba, for installations without a
compiler. ``cuda`` has the kernels that nvcc compiled at installation, and ``cupy`` compiles the same kernels
at run time. ``torch`` is plain torch operations for any device, and ``reference`` is float64 NumPy for tests.
Other packages may register more (``rmsgd.backends.plugins``). The environment variable ``RMSGD_BACKEND``
forces one by name.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from importlib import import_module

import torch

from rmsgd.backends import plugins
from rmsgd.backends.base import Backend, BackendUnavailable
from rmsgd.backends.entry import Entry, Status, forget_loaded

__all__ = [
    "ENTRIES",
    "Backend",
    "BackendUnavailable",
    "Entry",
    "Status",
    "backend_for",
    "forget_loaded",
    "statuses",
]


def _create(module: str) -> Backend:
    backend: Backend = import_module(f"rmsgd.backends.{module}").create()
    return backend


def _entry(name: str, device: str, module: str) -> Entry:
    return Entry(name, device, partial(_create, module))


_FAST = (
    _entry("native", "cpu", "native"),
    _entry("numba", "cpu", "numba_"),
    _entry("cuda", "cuda", "cuda"),
    _entry("cupy", "cuda", "cupy_"),
)
_SLOW = (
    _entry("torch", "any", "torch_"),
    _entry("reference", "cpu", "reference"),
)

ENTRIES = (*_FAST, *_SLOW)
"""The backends of this package in order of preference. ``reference`` is last: it runs only when asked for."""

_NAMES = [entry.name for entry in ENTRIES]


def _entries() -> Iterator[Entry]:
    """Every backend in order of preference; those of other packages come before ``torch``."""
    yield from _FAST
    yield from plugins.entries(_NAMES)
    yield from _SLOW


def statuses(*devices: str) -> list[Status]:
    """The status of every backend in order of preference, or only of those for the device types given."""
    return [entry.status() for entry in _entries() if not devices or entry.device in devices]


def backend_for(device: torch.device) -> Backend:
    """The backend that runs on ``device``: the one that RMSGD_BACKEND names, else the first available one.

    Raises:
        ValueError: RMSGD_BACKEND names no backend, or one for another device.
        BackendUnavailable: RMSGD_BACKEND names one that cannot run here.
    """
    # Loading a backend tries its GPU out. Only this one is tried, so that no other GPU gets a context.
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    with torch.cuda.device(device) if on_gpu else nullcontext():
        return _backend_for(device)


def _backend_for(device: torch.device) -> Backend:
    forced = os.environ.get("RMSGD_BACKEND", "")
    if forced:
        return _forced(forced, device)
    for entry in _entries():
        if entry.device in ("any", device.type):
            try:
                return entry.load()
            except BackendUnavailable:
                continue
        if entry.device == plugins.UNKNOWN:  # it may be for this device
            warnings.warn(f"backend {entry.name}: {entry.status().reason}", stacklevel=2)
    raise BackendUnavailable(f"no backend runs on {device}")


def _forced(name: str, device: torch.device) -> Backend:
    for entry in (*ENTRIES, *plugins.entries(_NAMES, name)):
        if entry.name == name:
            if entry.device not in ("any", plugins.UNKNOWN, device.type):
                raise ValueError(
                    f"RMSGD_BACKEND={name} runs on {entry.device}, but a parameter is on {device}"
                )
            return entry.load()
    names = ", ".join([*_NAMES, *plugins.names()])
    raise ValueError(f"RMSGD_BACKEND={name} is unknown; choose one of {names}")
