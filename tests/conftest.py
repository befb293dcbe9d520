"""Fixtures that several tests share."""

import gc
import importlib
import os

import pytest
import torch
from emulated import build_emulated_module
from hypothesis import HealthCheck, settings
from trainers import import_torchvision

from bench.locks import locked
from rmsgd import backends


def usable_backends() -> list[str]:
    """Names of the CPU backends that can run here, or those of them that RMSGD_TEST_BACKENDS lists."""
    names = [s.name for s in backends.statuses("cpu", "any") if s.available]
    wanted = os.environ.get("RMSGD_TEST_BACKENDS")
    return [name for name in names if name in wanted.split(",")] if wanted else names


@pytest.fixture(params=usable_backends())
def backend(request, monkeypatch):
    """Each CPU backend in turn, forced through the environment."""
    monkeypatch.setenv("RMSGD_BACKEND", request.param)
    if request.param != "native":  # they are for machines without the compiled core
        monkeypatch.setattr("rmsgd.optim.layouts._cpu", None)
    return request.param


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """One thread for torch, since several would wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The emulated CUDA kernels, as a file to load, which is built once for all processes of a test run."""
    temporary = tmp_path_factory.getbasetemp()
    folder = (temporary.parent if "PYTEST_XDIST_WORKER" in os.environ else temporary) / "emulator"
    folder.mkdir(exist_ok=True)
    with locked(folder, wait=True):
        return next(folder.glob("_cuda*"), None) or build_emulated_module(folder)


@pytest.fixture(scope="session")
def gpu_folder(library):
    """The folder of the emulated kernels, and everything else that the pretended GPU needs."""
    folder = library.parent
    with locked(folder, wait=True):
        if not (folder / "guard.so").exists():
            importlib.import_module("rehearsal").build_guard(folder)
    return folder


@pytest.fixture
def timm():
    """timm, with "rmsgd" among its optimizers."""
    timm = pytest.importorskip("timm")
    pytest.importorskip("timm.scheduler")
    importlib.import_module("rmsgd.integrations.timm").register()
    return timm


# The time of an example says something about the machine only.
settings.register_profile("rmsgd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("rmsgd")


def pytest_configure(config):
    import_torchvision()  # also in the process that distributes tests, which imports what raised a warning


def pytest_collection_finish():
    """Leave what is imported by now out of later collections, each of which would walk through all of it."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Skip the tests marked gpu where there is no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


os.environ.setdefault("MPLBACKEND", "Agg")
