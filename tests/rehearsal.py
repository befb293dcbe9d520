"""Code for a GPU on the pretended one, with the emulated kernels.

As a pytest plugin it lends the pretended GPU to the tests marked gpu: ``pytest -p rehearsal -m gpu
tests/test_gpu.py``. Networks are then small ones of the same kinds, for an emulated thread is no CUDA thread.
``RMSGD_REHEARSAL`` names the folder of the emulated kernels and the order of streams, "FOLDER:ORDER".
"""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from emulated import EMULATOR, EmulatedKernels, compile_cpp
from pretended_cuda import pretended_gpu
from pretended_streams import QUEUES
from torch.utils.cpp_extension import include_paths, library_paths

import rmsgd
from bench import models
from rmsgd import backends

WIDTH = 0.08
LARGE = ("(400, 500)", "(700, 1500)", "(1030, 1100)")
"""What an emulated test of these shapes is called: it would take minutes."""


class QueuedKernels(EmulatedKernels):
    """Stands for ``rmsgd._cuda``; launches wait in their stream's queue."""

    CUDA_VERSION = 13000
    ARCHITECTURES = "75"

    def device_count(self):
        return self.module.device_count()

    def launch(self, name, device, blocks, threads, shared_bytes, stream, arguments, cooperative=False):
        copied = arguments.copy()
        launch = super().launch
        QUEUES.streams[stream].add(
            lambda: launch(name, device, blocks, threads, shared_bytes, 0, copied, cooperative)
        )


def build_guard(folder: Path) -> None:
    """A device guard for a torch that has none, beside the emulated kernels."""
    flags = [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    # torch's headers ask for their own C++, and warn.
    compiled = ["-std=c++20", "-w", "-shared", "-fPIC"]
    compile_cpp(EMULATOR / "guard.cpp", folder / "guard.so", *compiled, *flags, "-Wl,--no-as-needed", "-lc10")


@contextmanager
def _installed(name: str, module: object) -> Iterator[None]:
    """``module`` is what ``import name`` finds."""
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


@contextmanager
def rehearsed(folder: Path, order: str = "launched", seed: int = 0) -> Iterator[None]:
    """Within it there are two GPUs, and the backend "cuda" runs on them.

    Args:
        folder: of the emulated kernels and the guard.
        order: of streams, see ``pretended_streams.ORDERS``.
        seed: of a random order.
    """
    torch.ops.load_library(folder / "guard.so")
    kernels = QueuedKernels(next(folder.glob("_cuda*")))
    with ExitStack() as stack:
        stack.enter_context(_installed("rmsgd._cuda", kernels))
        stack.enter_context(mock.patch.object(rmsgd, "_cuda", kernels, create=True))
        stack.enter_context(pretended_gpu(order, seed))
        backends.forget_loaded()
        stack.callback(backends.forget_loaded)
        yield


_stack = ExitStack()


def pytest_configure(config):
    folder, order = os.environ["RMSGD_REHEARSAL"].rsplit(":", 1)
    _stack.enter_context(mock.patch.object(models, "build", partial(models.build, width=WIDTH)))
    _stack.enter_context(rehearsed(Path(folder), order))


def pytest_collection_modifyitems(config, items):
    """The first of each test's cases, and none on large matrices: what is rehearsed is the order of work."""
    first = {}
    for item in items:
        if not any(shape in item.name for shape in LARGE):
            first.setdefault(item.originalname, item)
    items[:] = first.values()


def pytest_unconfigure(config):
    _stack.close()
