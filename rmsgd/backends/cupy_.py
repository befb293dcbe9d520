"""The CUDA kernels compiled at run time by NVRTC, through CuPy, for installations without nvcc."""

import ctypes
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from numpy.typing import NDArray

from rmsgd._version import __version__
from rmsgd.backends.base import BackendUnavailable
from rmsgd.backends.cuda import CudaBackend, check_torch, try_out
from rmsgd.backends.cuda_devices import Attributes
from rmsgd.extras import install_command

SOURCES = ("sgd/step_cuda.cu", "spectrum/spectrum_cuda.cu", "evbmf/rates_cuda.cu")
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_WITHOUT_ASKING = 48 * 1024
_ATTRIBUTES = (
    "MultiProcessorCount",
    "MaxSharedMemoryPerBlockOptin",
    "MaxSharedMemoryPerMultiprocessor",
    "L2CacheSize",
    "ClockRate",
    "MemoryClockRate",
    "GlobalMemoryBusWidth",
)
"""What CuPy calls the fields of ``Attributes``."""


def source_folder() -> Path:
    """The folder of the kernels' sources, which are shipped with the package or lie in the checkout.

    Raises:
        FileNotFoundError: there are no sources.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "_csrc", package.parent / "csrc"):
        if (folder / SOURCES[0]).is_file():
            return folder
    raise FileNotFoundError(f"the kernels' sources are not in {package / '_csrc'}: reinstall rmsgd-kernels")


def program() -> str:
    """The source of all kernels as one translation unit."""
    return "".join(f'#include "{source}"\n' for source in SOURCES)


def options(folder: Path, architecture: str) -> list[str]:
    """The options of NVRTC, for the same arithmetic as nvcc's, with subnormal numbers."""
    return ["-std=c++17", f"-I{folder}", f"--gpu-architecture={architecture}"]


def _digest(folder: Path, *parts: str) -> str:
    digest = hashlib.sha256("\0".join([__version__, *parts]).encode())
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".h", ".cu"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:32]


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "rmsgd"


class NvrtcKernels:
    """See ``kernels.Kernels``. Each architecture is compiled once and kept in the user's cache folder."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._driver = cupy.cuda.driver
        self._functions: dict[tuple[int, str], int] = {}
        self._modules: dict[int, Any] = {}
        self._allowed: dict[int, int] = {}
        self._lock = Lock()  # it guards these three

    def compile(self, architecture: str) -> bytes:
        """Machine code for an architecture such as "sm_75", or PTX for "compute_75".

        Raises:
            RuntimeError: NVRTC refused the source; the message ends with what it said.
        """
        nvrtc = self._cupy.cuda.nvrtc
        handle = nvrtc.createProgram(program(), "rmsgd.cu", (), ())
        try:
            try:
                nvrtc.compileProgram(handle, options(source_folder(), architecture))
            except nvrtc.NVRTCError as error:
                log = nvrtc.getProgramLog(handle).strip()
                raise RuntimeError(f"NVRTC could not compile the kernels: {error}: {log[-2000:]}") from None
            if architecture.startswith("sm_"):
                code: bytes = nvrtc.getCUBIN(handle)
                return code
            ptx: str | bytes = nvrtc.getPTX(handle)
            return ptx.encode() if isinstance(ptx, str) else ptx
        finally:
            nvrtc.destroyProgram(handle)

    def _code(self, device: int) -> bytes:
        nvrtc = self._cupy.cuda.nvrtc
        known = sorted(nvrtc.getSupportedArchs())
        wanted = int(self._cupy.cuda.Device(device).compute_capability)
        older = [arch for arch in known if arch <= wanted]
        if not older:
            raise RuntimeError(f"this NVRTC does not know sm_{wanted}: it begins at sm_{known[0]}")
        architecture = f"sm_{wanted}" if wanted in known else f"compute_{older[-1]}"
        version = ".".join(map(str, nvrtc.getVersion()))
        path = _cache_folder() / f"{_digest(source_folder(), version, architecture)}.{architecture}"
        with suppress(OSError):  # the file does not exist yet, or its folder cannot be read
            return path.read_bytes()
        print(f"rmsgd: compiling the CUDA kernels for {architecture}, once: about a minute", file=sys.stderr)
        code = self.compile(architecture)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.{os.getpid()}")
            partial.write_bytes(code)
            os.replace(partial, path)
        except OSError:
            pass  # if the folder cannot be written, the next process compiles again
        return code

    @contextmanager
    def _function(self, name: str, device: int) -> Iterator[int]:
        """The kernel's address, with its device current. Afterwards the thread's context is restored.

        Restoring the device instead would create a context there if the thread had none.
        """
        before = self._driver.ctxGetCurrent()
        try:
            self._cupy.cuda.Device(device).use()
            with self._lock:
                if device not in self._modules:
                    module = self._cupy.cuda.function.Module()
                    module.load(self._code(device))
                    self._modules[device] = module
                if (device, name) not in self._functions:
                    # The object must live as long as its address is used: it holds the module.
                    self._functions[device, name] = self._modules[device].get_function(name).ptr
            yield self._functions[device, name]
        finally:
            self._driver.ctxSetCurrent(before)

    def _allow_shared(self, function: int, shared_bytes: int) -> None:
        # The value is never reduced, since another thread may be between this and its launch.
        with self._lock:
            if shared_bytes > self._allowed.get(function, _WITHOUT_ASKING):
                self._driver.funcSetAttribute(function, _MAX_DYNAMIC_SHARED, shared_bytes)
                self._allowed[function] = shared_bytes

    def launch(
        self,
        name: str,
        device: int,
        blocks: int,
        threads: int,
        shared_bytes: int,
        stream: int,
        arguments: NDArray[Any],
        cooperative: bool = False,
    ) -> None:
        """See ``kernels.Kernels``."""
        parameters = (ctypes.c_void_p * 1)(arguments.ctypes.data)
        with self._function(name, device) as function:
            self._allow_shared(function, shared_bytes)
            geometry = (function, blocks, 1, 1, threads, 1, 1, shared_bytes, stream)
            if cooperative:
                self._driver.launchCooperativeKernel(*geometry, ctypes.addressof(parameters))
            else:
                self._driver.launchKernel(*geometry, ctypes.addressof(parameters), 0)

    def resident_blocks(self, name: str, device: int, threads: int, shared_bytes: int) -> int:
        """See ``kernels.Kernels``."""
        with self._function(name, device) as function:
            self._allow_shared(function, shared_bytes)
            each: int = self._driver.occupancyMaxActiveBlocksPerMultiprocessor(
                function, threads, shared_bytes
            )
        multiprocessors: int = self._cupy.cuda.Device(device).attributes["MultiProcessorCount"]
        return each * multiprocessors

    def attributes(self, device: int) -> Attributes:
        """See ``kernels.Kernels``."""
        known = self._cupy.cuda.Device(device).attributes
        return Attributes(*(known.get(name, 0) for name in _ATTRIBUTES))


def create() -> CudaBackend:
    """The backend; raises BackendUnavailable where CuPy is missing or cannot use the GPU."""
    check_torch()
    major = (torch.version.cuda or "").split(".")[0]
    try:
        import cupy
    except ImportError as error:
        raise BackendUnavailable(f"CuPy is not there ({error}): {install_command(f'cuda{major}')}") from None
    try:
        kernels = NvrtcKernels(cupy)
        try_out(kernels)
        version = ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
    except (RuntimeError, OSError, ImportError) as error:
        raise BackendUnavailable(
            f"CuPy {cupy.__version__} cannot build the kernels ({error}): install the CuPy of this driver's "
            "CUDA version, or nvcc and reinstall"
        ) from None
    return CudaBackend("cupy", kernels, f"compiled at run time by NVRTC {version}, through CuPy")
