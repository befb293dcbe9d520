"""The implementations of the four operations behind the optimizer, one table each, chosen by device.

``native`` is the compiled core, ``numba`` the reference compiled where no compiler was there at
installation, ``cuda`` the kernels that nvcc compiled at installation, ``cupy`` the same ones
compiled at run time, ``torch`` plain torch operations for any device, ``reference`` float64 NumPy for
tests. The environment variable ``RMSGD_BACKEND`` forces one by name.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch

from rmsgd.backends.base import Backend, BackendUnavailable


@dataclass(frozen=True)
class Entry:
    """One row of the table: a backend's name, the device type it runs on, and how to load it."""

    name: str
    device: str
    module: str

    def load(self) -> Backend:
        """The backend; raises BackendUnavailable with the reason when it cannot run here."""
        found = _load(self.module)
        if isinstance(found, str):
            raise BackendUnavailable(found)
        return found

    def status(self) -> "Status":
        """Whether it can run here; loads it to find out."""
        try:
            return Status(self.name, self.device, True, self.load().description)
        except BackendUnavailable as error:
            return Status(self.name, self.device, False, str(error))


@cache
def _load(module: str) -> Backend | str:
    """The backend, or why it cannot run here: to find that out may have taken a minute of compilation."""
    create: Callable[[], Backend] = import_module(f"rmsgd.backends.{module}").create
    try:
        return create()
    except BackendUnavailable as error:
        return str(error)


ENTRIES = (
    Entry("native", "cpu", "native"),
    Entry("numba", "cpu", "numba_"),
    Entry("cuda", "cuda", "cuda"),
    Entry("cupy", "cuda", "cupy_"),
    Entry("torch", "any", "torch_"),
    Entry("reference", "cpu", "reference"),
)
"""In order of preference. ``reference`` is last: it runs only when asked for."""


@dataclass(frozen=True)
class Status:
    """Whether a backend can run here, and if not, why."""

    name: str
    device: str
    available: bool
    reason: str


def statuses(*devices: str) -> list[Status]:
    """Every backend's status, in order of preference; of these device types' only, if any are named."""
    return [entry.status() for entry in ENTRIES if not devices or entry.device in devices]


def backend_for(device: torch.device) -> Backend:
    """The backend that runs on ``device``: the one RMSGD_BACKEND names, else the first available.

    Raises:
        ValueError: RMSGD_BACKEND names no backend, or one for another device.
        BackendUnavailable: RMSGD_BACKEND names one that cannot run here.
    """
    # A GPU is tried out when its backend is loaded: this one, so that no other gets a context.
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    with torch.cuda.device(device) if on_gpu else nullcontext():
        return _backend_for(device)


def _backend_for(device: torch.device) -> Backend:
    forced = os.environ.get("RMSGD_BACKEND", "")
    if forced:
        for entry in ENTRIES:
            if entry.name == forced:
                if entry.device not in ("any", device.type):
                    raise ValueError(
                        f"RMSGD_BACKEND={forced} runs on {entry.device}, but a parameter is on {device}"
                    )
                return entry.load()
        names = ", ".join(entry.name for entry in ENTRIES)
        raise ValueError(f"RMSGD_BACKEND={forced} is unknown; choose one of {names}")
    for entry in ENTRIES:
        if entry.device in ("any", device.type):
            try:
                return entry.load()
            except BackendUnavailable:
                continue
    raise BackendUnavailable(f"no backend runs on {device}")
