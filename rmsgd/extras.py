"""How to install an extra: the command that fits the way in which this package was installed."""

import json
import shlex
from importlib import metadata
from pathlib import Path

DISTRIBUTION = "rmsgd-kernels"

_ROOT = Path(__file__).resolve().parent.parent


def install_command(extra: str) -> str:
    """The command that installs one of the package's extras, such as "plot" or "numba".

    In a checkout the command names the checkout. An installation from a folder, a file or a repository is
    repeated from there, and an installation from an index by name.
    """
    return f"pip install {_requirement(extra)}"


def reinstall_command() -> str:
    """The command that builds the package anew and leaves everything else as it is."""
    requirement = _requirement()
    source = f"--no-binary {DISTRIBUTION} " if requirement == DISTRIBUTION else ""
    return f"pip install --force-reinstall --no-deps {source}{requirement}"


def _requirement(extra: str | None = None) -> str:
    """What to give to ``pip install``."""
    brackets = f"[{extra}]" if extra else ""
    if (_ROOT / "setup.py").exists() and (_ROOT / "pyproject.toml").exists():
        return f"-e {shlex.quote(f'{_ROOT}{brackets}')}"
    url = _direct_url()
    return shlex.quote(f"{DISTRIBUTION}{brackets}" + (f" @ {url}" if url else ""))


def _direct_url() -> str | None:
    """Where pip got the package from, if not from an index (PEP 610)."""
    try:
        text = metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    if text is None:
        return None
    found = json.loads(text)
    vcs = found.get("vcs_info", {}).get("vcs")
    return f"{vcs}+{found['url']}" if vcs else str(found["url"])
