"""Code for a GPU runs on the pretended one, with the emulated kernels.

As a pytest plugin this lends the pretended GPU to the tests marked gpu: ``pytest -p rehearsal -m gpu
tests/test_gpu.py``. Networks are then small ones of the same kinds, since emulated threads are slow.
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
"""The names of tests whose shapes would take minutes on the emulator."""


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
    # torch's headers need their own C++ standard, and give warnings. Older wheels of torch have the old ABI.
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    compiled = ["-std=c++20", "-w", "-shared", "-fPIC", abi]
    compile_cpp(EMULATOR / "guard.cpp", folder / "guard.so", *compiled, *flags, "-Wl,--no-as-needed", "-lc10")


@contextmanager
def _installed(name: str, module: object) -> Iterator[None]:
    """A context in which ``import name`` finds ``module``."""
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
    """A context with two GPUs on which the backend "cuda" runs.

    Args:
        folder: the folder of the emulated kernels and the guard.
        order: the order of streams, see ``pretended_streams.ORDERS``.
        seed: the seed of a random order.
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
    """Keep the first case of each test, and none on large matrices: only the order of work matters here."""
    first = {}
    for item in items:
        if not any(shape in item.name for shape in LARGE):
            first.setdefault(item.originalname, item)
    items[:] = first.values()


def pytest_unconfigure(config):
    _stack.close()
