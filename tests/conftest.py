"""What several tests share."""

import os

import pytest
import torch

from rmsgd import backends


def usable_backends() -> list[str]:
    """Names of the CPU backends that can run here."""
    return [s.name for s in backends.statuses() if s.available and s.device in ("cpu", "any")]


@pytest.fixture(params=usable_backends())
def backend(request, monkeypatch):
    """Each CPU backend in turn, forced through the environment."""
    monkeypatch.setenv("RMSGD_BACKEND", request.param)
    return request.param


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """Tests marked gpu are skipped where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


os.environ.setdefault("MPLBACKEND", "Agg")
