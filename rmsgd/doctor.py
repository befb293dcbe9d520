"""``rmsgd doctor``: which backend runs here, and what to do where only a slow one does."""

import platform
from dataclasses import asdict
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rmsgd._version import __version__
from rmsgd.backends import backend_for, statuses
from rmsgd.backends.base import BackendUnavailable
from rmsgd.extras import DISTRIBUTION, install_command, reinstall_command

_CUPY = ("cupy-cuda13x", "cupy-cuda12x", "cupy")


def examine() -> dict[str, Any]:
    """Find out what runs here, in a form that is ready for JSON.

    Returns:
    A dict of "backends", a list of {"name", "device", "available", "reason"} in order of preference; "used",
    from device to the name of the backend that runs on it, or to the reason why none does; "versions", from
    name to version, or to None where it is not installed; "warnings" and "advice", lists of lines.
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    used = {device: _used(device) for device in devices}
    return {
        "backends": [asdict(status) for status in statuses()],
        "used": used,
        "versions": _versions(),
        "warnings": _warnings(),
        "advice": [line for device in devices if (line := _advice(device, used[device]))],
    }


def as_table(found: dict[str, Any]) -> RenderableType:
    """What ``examine`` found, for the terminal."""
    table = Table("backend", "device", "", "", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for backend in found["backends"]:
        there = Text("available", "green") if backend["available"] else Text("not available", "yellow")
        table.add_row(backend["name"], backend["device"], there, Text(backend["reason"]))
    versions = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, version in found["versions"].items():
        versions.add_row(name, version or Text("not installed" if name != "gpu" else "none", "dim"))
    lines = [Text(f"{device} uses {name}", "bold") for device, name in found["used"].items()]
    lines += [Text(f"warning: {line}", "yellow") for line in found["warnings"]]
    lines += [Text(f"advice: {line}") for line in found["advice"]]
    return Group(table, "", versions, "", *lines)


def _used(device: str) -> str:
    try:
        return backend_for(torch.device(device)).name
    except (ValueError, BackendUnavailable) as error:
        return f"none: {error}"


def _versions() -> dict[str, str | None]:
    return {
        "rmsgd": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "instruction set": _instruction_set(),
        "numba": _installed("numba"),
        "cupy": next((version for name in _CUPY if (version := _installed(name))), None),
    }


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _instruction_set() -> str | None:
    """The instruction set of the compiled core's kernels; None where the core cannot run."""
    try:
        core: Any = import_module("rmsgd._cpu")
        return str(core.isa())
    except (ImportError, RuntimeError):
        return None


def _warnings() -> list[str]:
    return [*_authors_package(), *_hidden_installation()]


def _hidden_installation() -> list[str]:
    """A warning where a folder of sources is imported in place of the package that was installed.

    Python looks into the current folder first, so a checkout hides what ``pip install .`` has built from it.
    """
    here = Path(__file__).resolve().parent
    for distribution in metadata.distributions(name=DISTRIBUTION):
        installed = Path(str(distribution.locate_file(f"{here.name}/{Path(__file__).name}"))).resolve()
        if installed.exists() and installed.parent != here:
            return [
                f"rmsgd is imported from {here}, which hides the one that is installed in "
                f"{installed.parent}: run Python in another folder, or pip install -e {here.parent}"
            ]
    return []


def _authors_package() -> list[str]:
    theirs = _installed("rmsgd")
    if theirs is None:
        return []
    return [
        f"the distribution rmsgd {theirs} (the authors' own) is installed beside rmsgd-kernels, and both are "
        f"imported as rmsgd: pip uninstall rmsgd, then {reinstall_command()}"
    ]


def _advice(device: str, used: str) -> str | None:
    """How to get a fast backend for a device that has only a slow one; None where it has one."""
    if used.startswith("none") or used not in ("numba", "torch", "reference"):
        return None
    if device == "cuda":
        major = (torch.version.cuda or "").split(".")[0]
        extra = f"cuda{major}" if major in ("12", "13") else "cuda12"
        return f"cuda runs on plain torch operations: {install_command(extra)} for CUDA kernels"
    slower = "" if used == "numba" else f" (or, slower: {install_command('numba')})"
    return (
        f"cpu runs on {used}: unset RMSGD_BACKEND if it is set, else install a C++17 compiler (Debian: apt "
        f"install g++; macOS: xcode-select --install) and reinstall: {reinstall_command()}{slower}"
    )
