"""A message that says how to install something is true wherever the package came from."""

import json
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from rmsgd import extras

ROOT = Path(__file__).parents[1]


class Distribution:
    """An installed distribution, as pip records where it came from."""

    def __init__(self, direct_url):
        self._direct_url = direct_url

    def read_text(self, name):
        assert name == "direct_url.json"
        return self._direct_url and json.dumps(self._direct_url)


@pytest.fixture
def installed_from(monkeypatch, tmp_path):
    def install(direct_url):
        monkeypatch.setattr(extras, "_ROOT", tmp_path)  # site-packages
        monkeypatch.setattr(metadata, "distribution", lambda name: Distribution(direct_url))

    return install


def test_in_a_checkout_the_command_names_the_checkout(monkeypatch, tmp_path):
    assert extras.install_command("plot") == f"pip install -e '{ROOT}[plot]'"
    assert extras.reinstall_command() == f"pip install --force-reinstall --no-deps -e {ROOT}"
    folder = tmp_path / "it's a checkout"
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml"):
        (folder / name).touch()
    monkeypatch.setattr(extras, "_ROOT", folder)
    assert extras.install_command("plot") == f"""pip install -e '{tmp_path}/it'"'"'s a checkout[plot]'"""


def test_what_came_from_an_index_comes_from_there_again(installed_from):
    installed_from(None)
    assert extras.install_command("plot") == "pip install 'rmsgd-kernels[plot]'"
    assert extras.reinstall_command().endswith("--no-binary rmsgd-kernels rmsgd-kernels")


@pytest.mark.parametrize(
    ("direct_url", "source"),
    [
        ({"url": "file:///src/rmsgd", "dir_info": {}}, "file:///src/rmsgd"),
        ({"url": "file:///src/rmsgd.whl", "archive_info": {}}, "file:///src/rmsgd.whl"),
        ({"url": "https://host/rmsgd.git", "vcs_info": {"vcs": "git"}}, "git+https://host/rmsgd.git"),
    ],
    ids=["folder", "wheel", "repository"],
)
def test_what_came_from_elsewhere_comes_from_there_again(installed_from, direct_url, source):
    installed_from(direct_url)
    assert extras.install_command("plot") == f"pip install 'rmsgd-kernels[plot] @ {source}'"
    assert extras.reinstall_command() == f"pip install --force-reinstall --no-deps 'rmsgd-kernels @ {source}'"


def test_what_is_not_installed_at_all_is_named_as_an_index_would(monkeypatch, tmp_path):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(extras, "_ROOT", tmp_path)
    monkeypatch.setattr(metadata, "distribution", missing)
    assert extras.install_command("plot") == "pip install 'rmsgd-kernels[plot]'"


def test_messages_name_extras_that_exist_and_no_command_is_spelt_out():
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for path in [*ROOT.glob("rmsgd/**/*.py"), *ROOT.glob("bench/**/*.py")]:
        source = path.read_text(encoding="utf-8")
        named = set(re.findall(r"install_command\(['\"](\w+)['\"]\)", source))
        assert named <= set(known), path
        assert path.name == "extras.py" or not re.search(r"pip install .*\[\w+\]", source), path
