"""The CUDA backend on a machine without a GPU: its kernels' sources compiled for the CPU, a fiber per thread.

This tests everything but the hardware: the kernels' code and their barriers, the tables and arguments that
Python packs for them, the order of launches, and ``rmsgd._cuda``, which launches.
``tests/emulator`` holds the emulator.
"""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from rmsgd.backends.cuda import CudaBackend
from rmsgd.backends.cuda_devices import Attributes

ROOT = Path(__file__).parents[1]
EMULATOR = ROOT / "tests" / "emulator"
ORDERS = ("forward", "reverse", "shuffled")
SM_75 = 64 * 1024
"""The most shared memory of a block there, in bytes."""
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def compile_cpp(sources: Path | Sequence[Path], target: Path, *flags: str) -> None:
    """Compile a test's C++ sources; skips the test where there is no compiler."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    sources = [sources] if isinstance(sources, Path) else sources
    include = [f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}"]
    command = [COMPILER, "-std=c++17", "-Wall", "-Wno-unknown-pragmas", *include]
    if len(sources) == 1:
        subprocess.run([*command, *flags, sources[0], "-o", target], check=True)
        return
    objects = [target.with_name(f"{source.stem}.o") for source in sources]
    kept = [flag for flag in flags if flag != "-shared"]
    jobs = [[*command, *kept, "-c", s, "-o", o] for s, o in zip(sources, objects, strict=True)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda job: subprocess.run(job, check=True), jobs))
    subprocess.run([*command, *flags, *objects, "-o", target], check=True)


def build_emulated_module(folder: Path) -> Path:
    """``rmsgd._cuda`` over the emulator, as a file to load."""
    pybind11 = pytest.importorskip("pybind11")
    target = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    flags = ["-O2", "-fPIC", "-shared", '-DRMSGD_CUDA_ARCHITECTURES="75"', *include]
    if sys.platform == "linux":
        flags.append("-Wl,-Bsymbolic")  # the emulator's runtime, not that of a torch built for CUDA
    sources = [EMULATOR / "kernels.cpp", EMULATOR / "runtime.cpp", ROOT / "csrc" / "bind_cuda.cpp"]
    compile_cpp(sources, target, *flags)
    return target


class EmulatedKernels:
    """See ``rmsgd.backends.kernels.Kernels``; threads run in the order that ``order`` names.

    ``resident`` blocks are there at once, each with ``shared`` bytes of shared memory, of which ``lent`` are
    really to be had.
    """

    def __init__(
        self, library: Path, order: str = "forward", resident: int = 6, shared: int = SM_75, lent: int = SM_75
    ) -> None:
        spec = importlib.util.spec_from_file_location("_cuda", library)
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self._library = ctypes.CDLL(str(library))
        self.order = order
        self.resident = resident
        self.shared, self.lent = shared, lent
        self.launched: list[str] = []

    def _choose(self) -> None:
        ctypes.c_int.in_dll(self._library, "emulated_order").value = ORDERS.index(self.order)
        ctypes.c_int.in_dll(self._library, "emulated_resident").value = self.resident
        ctypes.c_int.in_dll(self._library, "emulated_shared").value = self.shared
        ctypes.c_int.in_dll(self._library, "emulated_lent").value = self.lent

    def launch(self, name, device, blocks, threads, shared_bytes, stream, arguments, cooperative=False):
        self._choose()
        self.launched.append(name)
        self.module.launch(name, device, blocks, threads, shared_bytes, stream, arguments, cooperative)

    def resident_blocks(self, name, device, threads, shared_bytes):
        self._choose()
        return self.module.resident_blocks(name, device, threads, shared_bytes)

    def attributes(self, device):
        self._choose()
        return Attributes(*self.module.attributes(device))


class OneStream:
    """See ``rmsgd.backends.streams.Streams``: everything runs where it is launched."""

    def __init__(self, device):
        pass

    def current(self):
        return 0

    def caller(self):
        return 0

    @contextmanager
    def side_stream(self):
        yield

    def caller_stream(self):
        return nullcontext()

    def caller_waits(self):
        pass

    def side_waits(self):
        pass

    def wait_side_stream(self):
        pass

    def record_stream(self, tensor):
        pass


def emulated_backend(
    library: Path, order: str = "forward", resident: int = 6, shared: int = SM_75, lent: int = SM_75
) -> CudaBackend:
    kernels = EmulatedKernels(library, order, resident, shared, lent)
    return CudaBackend("emulated", kernels, "CUDA kernels on the CPU", OneStream)
