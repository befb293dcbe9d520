"""Where something is missing RMSGD still works, and doctor says what is missing and what to do."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from glob import glob
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from clock import PATIENCE

import rmsgd
from rmsgd import backends, doctor
from rmsgd.backends import cupy_
from rmsgd.backends.base import BackendUnavailable
from rmsgd.extras import install_command

pytest.importorskip("rmsgd._cpu", reason="the compiled core was not built")

ROOT = Path(__file__).parents[1]

TRAIN = """
import json, sys
for name in {missing}:
    sys.modules[name] = None  # its import fails
import torch, rmsgd
from rmsgd import cli, doctor

if {threads}:
    torch.set_num_threads({threads})
generator = torch.Generator().manual_seed(1)
shapes = [(30, 40), (16, 8, 3, 3), (30,)]
parameters = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
optimizer = rmsgd.RMSGD(parameters, lr=0.03)
for epoch in range(2):
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    optimizer.epoch_step()
print(json.dumps([doctor.examine(), list(optimizer.learning_rates().values())]))
"""


def train(missing=(), threads=0, prefix=(), **environment):
    """The output of doctor there, and the learning rates after two epochs."""
    done = subprocess.run(
        [*prefix, sys.executable, "-c", TRAIN.format(missing=list(missing), threads=threads)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "RMSGD_BACKEND": "", **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, rates = json.loads(done.stdout)
    for backend in found["backends"]:
        assert "\n" not in backend["reason"]
    return found, rates


def status(found, name):
    [backend] = [b for b in found["backends"] if b["name"] == name]
    return backend


@pytest.fixture(scope="module")
def sound():
    return train()


def test_a_sound_machine_uses_the_compiled_core_and_needs_no_advice(sound):
    found, _ = sound
    assert found["used"]["cpu"] == "native"
    assert found["advice"] == []


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be bound to a core here")
def test_one_core_gives_the_same_rates(sound):
    one = min(os.sched_getaffinity(0))
    found, rates = train(threads=1, prefix=["taskset", "-c", str(one)])
    assert found["used"]["cpu"] == "native"
    assert rates == sound[1]


def test_more_threads_than_cores_give_the_same_rates(sound):
    assert train(threads=24)[1] == sound[1]


def test_a_cpu_with_the_baseline_only_gives_the_same_rates_to_rounding(sound):
    found, rates = train(RMSGD_ISA="baseline")
    assert found["versions"]["instruction set"] == "baseline"
    assert rates == pytest.approx(sound[1], rel=1e-5)


def test_an_instruction_set_that_is_not_there_leaves_the_core_out_and_doctor_says_so(sound):
    found, rates = train(RMSGD_ISA="avx1024", missing=["numba"])
    assert not status(found, "native")["available"]
    assert "choose baseline, avx2 or avx512" in status(found, "native")["reason"]
    assert found["used"]["cpu"] == "torch"
    assert rates == pytest.approx(sound[1], rel=1e-5)


def test_without_a_compiler_and_numba_torch_runs_and_doctor_says_what_to_install(sound):
    found, rates = train(missing=["rmsgd._cpu", "numba", "cupy"])
    assert found["used"]["cpu"] == "torch"
    assert install_command("numba") in status(found, "numba")["reason"]
    assert "C++17 compiler" in found["advice"][0]
    assert not status(found, "cupy")["available"]
    assert rates == pytest.approx(sound[1], rel=1e-5)


@pytest.mark.slow
def test_numba_needs_no_home_to_write_to(sound):
    pytest.importorskip("numba")
    nowhere = {"HOME": "/proc", "XDG_CACHE_HOME": "/proc", "NUMBA_CACHE_DIR": "", "TMPDIR": "/proc"}
    found, rates = train(missing=["rmsgd._cpu"], **nowhere)
    assert found["used"]["cpu"] == "numba"
    assert rates == pytest.approx(sound[1], rel=1e-5)


def test_another_openmp_runtime_in_the_process_does_no_harm(sound):
    runtimes = glob("/usr/lib/llvm-*/lib/libomp.so*") + glob("/usr/lib/*/libomp.so*")
    if not runtimes:
        pytest.skip("no other OpenMP runtime here (Debian: apt install libomp-dev)")
    assert train(threads=3, LD_PRELOAD=runtimes[0]) == (sound[0], sound[1])


# -- GPUs that cannot be used ----------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """A torch with CUDA that finds a GPU; no CuPy."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setenv("RMSGD_BACKEND", "")
    backends.forget_loaded()
    yield
    backends.forget_loaded()


class Outdated:
    """``rmsgd._cuda`` on a machine whose driver is older than the CUDA that compiled it."""

    CUDA_VERSION = 13000
    ARCHITECTURES = "75,90"

    @staticmethod
    def device_count():
        raise RuntimeError("looking for GPUs: CUDA driver version is insufficient for CUDA runtime version")


@pytest.mark.usefixtures("gpu")
def test_a_driver_older_than_the_kernels_leaves_them_out_and_doctor_says_to_update_it(monkeypatch):
    monkeypatch.setattr(rmsgd, "_cuda", Outdated, raising=False)
    with pytest.warns(UserWarning, match="driver version is insufficient"):
        found = doctor.examine()
    reason = status(found, "cuda")["reason"]
    assert "driver version is insufficient" in reason
    assert "update the driver" in reason
    assert found["used"]["cuda"] == "torch"


@pytest.mark.usefixtures("gpu")
def test_a_gpu_without_nvcc_and_cupy_runs_torch_and_doctor_says_what_to_install(monkeypatch):
    monkeypatch.delattr(rmsgd, "_cuda", raising=False)
    monkeypatch.setitem(sys.modules, "rmsgd._cuda", None)
    found = doctor.examine()
    assert "nvcc" in status(found, "cuda")["reason"]
    assert install_command("cuda13") in status(found, "cupy")["reason"]
    assert found["used"]["cuda"] == "torch"
    assert install_command("cuda13") in found["advice"][-1]


@pytest.mark.usefixtures("gpu")
def test_a_backend_that_cannot_run_is_tried_once(monkeypatch):
    tried = []

    def create():
        tried.append(True)
        raise BackendUnavailable("NVRTC could not compile the kernels")

    monkeypatch.setattr(cupy_, "create", create)
    for _ in range(2):
        assert status(doctor.examine(), "cupy")["reason"] == "NVRTC could not compile the kernels"
    monkeypatch.setenv("RMSGD_BACKEND", "cupy")
    with pytest.raises(BackendUnavailable, match="NVRTC could not compile"):
        backends.backend_for(torch.device("cuda"))
    assert tried == [True]


@pytest.mark.usefixtures("gpu")
def test_a_driver_that_torch_cannot_use_is_for_nvidia_smi_to_explain(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = doctor.examine()
    assert "check nvidia-smi" in status(found, "cuda")["reason"]
    assert "check nvidia-smi" in status(found, "cupy")["reason"]
    assert "cuda" not in found["used"]


def test_kernels_compiled_at_run_time_are_kept_where_the_cache_can_be_written(tmp_path, monkeypatch):
    compiler = SimpleNamespace(getSupportedArchs=lambda: [75, 90], getVersion=lambda: (13, 0))
    device = SimpleNamespace(compute_capability="90")
    cupy = SimpleNamespace(cuda=SimpleNamespace(driver=None, nvrtc=compiler, Device=lambda number: device))
    kernels, compiled = cupy_.NvrtcKernels(cupy), []
    monkeypatch.setattr(kernels, "compile", lambda arch: compiled.append(arch) or b"code")
    (tmp_path / "file").touch()
    for cache, compilations in ((tmp_path / "file", 2), (tmp_path / "folder", 1)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        compiled.clear()
        assert [kernels._code(0), kernels._code(0)] == [b"code", b"code"]
        assert compiled == ["sm_90"] * compilations
