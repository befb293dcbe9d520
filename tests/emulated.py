"""The CUDA backend on a machine without a GPU: its kernels' sources compiled for the CPU, a fiber per thread.

What is tested so is everything but the hardware: the kernels' code and their barriers, the tables and
arguments that Python packs for them, and what is launched when. ``tests/emulator`` holds the emulator.
"""

import ctypes
import os
import shutil
import subprocess
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from rmsgd.backends.cuda import CudaBackend

ROOT = Path(__file__).parents[1]
ORDERS = ("forward", "reverse", "shuffled")
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def compile_cpp(source: Path, target: Path, *flags: str) -> None:
    """Compile a test's C++ source; skips the test where there is no compiler."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'emulator'}"]
    command = [COMPILER, "-std=c++17", "-Wall", "-Wno-unknown-pragmas", *include, *flags]
    subprocess.run([*command, str(source), "-o", str(target)], check=True)


class EmulatedKernels:
    """See ``rmsgd.backends.kernels.Kernels``; threads run in the order that ``order`` names."""

    def __init__(self, library: Path, order: str = "forward", resident: int = 6) -> None:
        self._emulate = ctypes.CDLL(str(library)).emulate
        self.order = order
        self.resident = resident
        self.launched: list[str] = []

    def launch(self, name, device, blocks, threads, shared_bytes, stream, arguments, cooperative=False):
        assert device == 0
        assert stream == 0
        assert blocks >= 1
        if cooperative:
            assert blocks <= self.resident
        self.launched.append(name)
        status = self._emulate(
            name.encode(),
            ctypes.c_int(blocks),
            ctypes.c_int(threads),
            ctypes.c_int(shared_bytes),
            ctypes.c_void_p(arguments.ctypes.data),
            ctypes.c_long(arguments.nbytes),
            ctypes.c_int(cooperative),
            ctypes.c_int(ORDERS.index(self.order)),
        )
        assert status == 0, {1: "no such kernel", 2: f"{name} takes no argument of {arguments.nbytes} bytes"}

    def resident_blocks(self, name, device, threads, shared_bytes):
        return self.resident

    def shared_memory(self, device):
        return 65536, 65536  # sm_75


class OneStream:
    """See ``rmsgd.backends.streams.Streams``: everything runs where it is launched."""

    def __init__(self, device):
        pass

    def current(self):
        return 0

    def caller(self):
        return 0

    @contextmanager
    def aside(self):
        yield

    def on_caller(self):
        return nullcontext()

    def settle(self):
        pass

    def fork(self):
        pass

    def join(self):
        pass

    def keep(self, tensor):
        pass


def emulated_backend(library: Path, order: str = "forward", resident: int = 6) -> CudaBackend:
    kernels = EmulatedKernels(library, order, resident)
    return CudaBackend("emulated", kernels, "CUDA kernels on the CPU", OneStream)
