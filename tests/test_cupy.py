"""Kernels compiled at run time are launched as those of nvcc are, and compiled no more often than needed."""

import ctypes
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from emulated import EmulatedKernels, OneStream, emulated_backend
from matrices import low_rank

from rmsgd.backends import cupy_
from rmsgd.backends.base import BackendUnavailable
from rmsgd.backends.cuda import _RATES_ARGUMENTS, CudaBackend
from rmsgd.backends.cuda_devices import Attributes
from rmsgd.layers import unfoldings

WITHOUT_ASKING = 48 * 1024


class Driver:
    """CuPy's driver over the emulated kernels. Like CUDA's it refuses too much memory, and other devices."""

    def __init__(self, kernels):
        self.kernels, self._thread = kernels, threading.local()
        self.functions, self.allowed, self.loaded = [], {}, 0
        self.ctxGetCurrent = lambda: self.current[0]
        self.ctxSetCurrent = lambda context: self.current.__setitem__(0, context)
        self.pause = lambda: None  # a call that takes CUDA a while

    @property
    def current(self):
        """The device whose context is the thread's."""
        return self._thread.__dict__.setdefault("current", [None])

    def check(self, function, shared_bytes):
        name, device = self.functions[function]
        assert device == self.current[0]
        assert shared_bytes <= self.allowed.get(function, WITHOUT_ASKING)
        return name

    def funcSetAttribute(self, function, attribute, value):  # noqa: N802
        assert attribute == 8
        self.pause()
        self.allowed[function] = value

    def occupancyMaxActiveBlocksPerMultiprocessor(self, function, threads, shared_bytes):  # noqa: N802
        name = self.check(function, shared_bytes)
        return self.kernels.resident_blocks(name, self.current[0], threads, shared_bytes) // 2

    def launchKernel(self, function, *rest):  # noqa: N802
        assert rest[-1] == 0
        self.launchCooperativeKernel(function, *rest[:-1], cooperative=False)

    def launchCooperativeKernel(self, function, *geometry_and_parameters, cooperative=True):  # noqa: N802
        blocks, _, _, threads, _, _, shared_bytes, stream, parameters = geometry_and_parameters
        name = self.check(function, shared_bytes)
        size = self.kernels.module.argument_bytes(name)
        address = ctypes.c_void_p.from_address(parameters).value
        arguments = np.frombuffer(ctypes.string_at(address, size), np.uint8)
        self.kernels.launch(
            name, self.current[0], blocks, threads, shared_bytes, stream, arguments, cooperative
        )


def pretended_cupy(driver=None, capability="75", known=(75, 90)):
    """The part of CuPy that ``NvrtcKernels`` uses."""

    class Device:
        compute_capability = capability
        attributes = {  # noqa: RUF012
            "MultiProcessorCount": 2,
            "MaxSharedMemoryPerBlockOptin": 1000,
            "MaxSharedMemoryPerMultiprocessor": 2000,
            "L2CacheSize": 3000,
            "ClockRate": 4000,
            "GlobalMemoryBusWidth": 256,
        }

        def __init__(self, number):
            self.number = number

        def use(self):
            driver.current[0] = self.number

    class Module:
        def load(self, code):
            driver.pause()
            driver.loaded += 1
            self.device = driver.current[0]

        def get_function(self, name):
            driver.functions.append((name, self.device))
            return SimpleNamespace(ptr=len(driver.functions) - 1)

    compiler = SimpleNamespace(
        getSupportedArchs=lambda: list(known),
        getVersion=lambda: (13, 0),
        createProgram=lambda *_: 1,
        compileProgram=lambda *_: None,
        destroyProgram=lambda *_: None,
        getCUBIN=lambda _: b"machine code",
        getPTX=lambda _: "PTX",
        NVRTCError=RuntimeError,
    )
    function = SimpleNamespace(Module=Module)
    return SimpleNamespace(
        cuda=SimpleNamespace(driver=driver, nvrtc=compiler, Device=Device, function=function)
    )


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# -- launches ----------------------------------------------------------------------------------------


def test_a_network_is_measured_as_by_kernels_that_nvcc_compiled(library):
    weights = [low_rank(80, 90, 3, 1e-3), low_rank(20, 30, 3, 0.0), torch.randn(8, 4, 3, 3)]
    matrices = [(w, u) for w in weights for u in unfoldings(w.shape)]
    backend = emulated_backend(library)
    kernels = cupy_.NvrtcKernels(pretended_cupy(Driver(EmulatedKernels(library))))
    kernels.attributes = backend._kernels.attributes
    at_run_time = CudaBackend("cupy", kernels, "", OneStream)
    assert torch.equal(at_run_time.measure(matrices), backend.measure(matrices))


def test_shared_memory_is_asked_for_and_never_less_than_before(library):
    driver = Driver(EmulatedKernels(library))
    kernels = cupy_.NvrtcKernels(pretended_cupy(driver))
    for shared_bytes, allowed in ((48_000, {}), (60_000, {0: 60_000}), (50_000, {0: 60_000})):
        arguments = np.zeros(1, _RATES_ARGUMENTS)
        kernels.launch("rmsgd_rates", 0, 1, 256, shared_bytes, 0, arguments)
        assert driver.allowed == allowed


def test_each_device_has_kernels_of_its_own(library):
    driver = Driver(EmulatedKernels(library))
    kernels = cupy_.NvrtcKernels(pretended_cupy(driver))
    for device in (0, 1, 0):
        assert kernels.resident_blocks("rmsgd_rates", device, 256, 60_000) == driver.kernels.resident
    assert driver.functions == [("rmsgd_rates", 0), ("rmsgd_rates", 1)]
    assert driver.current == [None]


def test_attributes_are_those_of_the_device_and_0_what_is_not_told():
    told = cupy_.NvrtcKernels(pretended_cupy()).attributes(0)
    assert told == Attributes(2, 1000, 2000, 3000, 4000, 0, 256)


def test_threads_load_the_kernels_once_and_take_no_memory_from_each_other(library):
    driver = Driver(EmulatedKernels(library))
    kernels = cupy_.NvrtcKernels(pretended_cupy(driver))

    def use(shared_bytes):
        kernels.resident_blocks("rmsgd_rates", 0, 256, shared_bytes)

    others = [threading.Thread(target=use, args=(60_000,)) for _ in range(2)]

    def pause():
        """The first thread is held up until the others have gone as far as they can."""
        if threading.current_thread() in others:
            return
        for thread in others:
            if thread.ident is None:
                thread.start()
            thread.join(0.1)

    driver.pause = pause
    use(50_000)
    for thread in others:
        thread.join()
    assert driver.loaded == 1
    assert driver.allowed == {0: 60_000}


# -- compiling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "code"),
    [("90", b"machine code"), ("75", b"machine code"), ("89", b"PTX"), ("120", b"PTX")],
)
def test_a_gpu_newer_than_the_compiler_gets_ptx_of_the_next_older_kind(capability, code, capsys):
    kernels = cupy_.NvrtcKernels(pretended_cupy(capability=capability))
    assert kernels._code(0) == code
    kind = {"89": "compute_75", "120": "compute_90"}.get(capability, f"sm_{capability}")
    assert f"compiling the CUDA kernels for {kind}," in capsys.readouterr().err


def test_a_gpu_older_than_the_compiler_knows_is_named():
    with pytest.raises(RuntimeError, match="does not know sm_70: it begins at sm_75"):
        cupy_.NvrtcKernels(pretended_cupy(capability="70"))._code(0)


def test_what_the_compiler_says_is_the_error():
    def refuse(*_):
        raise cupy.cuda.nvrtc.NVRTCError("compilation failed")

    cupy = pretended_cupy()
    cupy.cuda.nvrtc.compileProgram = refuse
    cupy.cuda.nvrtc.getProgramLog = lambda _: "rmsgd.cu(1): error: no\n"
    with pytest.raises(RuntimeError, match=r"compilation failed: rmsgd.cu\(1\): error: no$"):
        cupy_.NvrtcKernels(cupy).compile("sm_75")


@pytest.mark.parametrize("changed", ["source", "version", "compiler", "architecture"])
def test_kernels_are_compiled_anew_when_what_they_come_from_has_changed(
    changed, tmp_path, monkeypatch, capsys
):
    source = tmp_path / "csrc" / "sgd" / "step_cuda.cu"
    source.parent.mkdir(parents=True)
    source.write_text("before")
    monkeypatch.setattr(cupy_, "source_folder", lambda: tmp_path / "csrc")
    cupy = pretended_cupy()
    for times in (1, 1, 2):
        if times == 2:
            match changed:
                case "source":
                    source.write_text("after")
                case "version":
                    monkeypatch.setattr(cupy_, "__version__", "after")
                case "compiler":
                    cupy.cuda.nvrtc.getVersion = lambda: (13, 1)
                case "architecture":
                    cupy.cuda.Device.compute_capability = "90"
        cupy_.NvrtcKernels(cupy)._code(0)
        assert len(list((tmp_path / "cache" / "rmsgd").iterdir())) == times
    assert capsys.readouterr().err.count("compiling") == 2


@pytest.mark.parametrize("error", [RuntimeError, ImportError, FileNotFoundError])
def test_a_gpu_whose_kernels_cannot_be_built_is_left_to_torch_with_the_reason(error, monkeypatch):
    def fail(kernels):
        raise error("no driver")

    cupy = pretended_cupy()
    cupy.__version__ = "13.4"
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(cupy_, "check_torch", lambda: None)
    monkeypatch.setattr(cupy_, "try_out", fail)
    with pytest.raises(BackendUnavailable, match=r"CuPy 13.4 cannot build the kernels \(no driver\)"):
        cupy_.create()
    monkeypatch.setattr(cupy_, "try_out", lambda kernels: None)
    assert cupy_.create().description == "compiled at run time by NVRTC 13.0, through CuPy"
