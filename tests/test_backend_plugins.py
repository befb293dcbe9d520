"""Another package brings a backend by an entry point, and does no harm when it is broken."""

import json
import warnings

import pytest
import torch
from torch import nn

import rmsgd
from rmsgd import backends, cli
from rmsgd.backends import plugins
from rmsgd.backends.base import BackendUnavailable

SOUND = """
from rmsgd.backends import Entry
from rmsgd.backends.torch_ import TorchBackend

class Theirs(TorchBackend):
    name = "{name}"
    description = "made by another package"

entry = Entry("{name}", "{device}", Theirs)
"""

BROKEN = {
    "its module is not there": ("", "ModuleNotFoundError: No module named 'rmsgd_nowhere'"),
    "its module fails": ("raise OSError('libmlu.so: no such file\\nat all')", "OSError: libmlu.so: no such"),
    "its module has no such name": ("", "AttributeError"),
    "it is something else": ("entry = dict()", "a dict instead of an rmsgd.backends.Entry"),
    "it cannot be made": (
        "from rmsgd.backends import Entry\nentry = Entry('theirs', 'cpu', lambda: 1 / 0)",
        "cannot make it: ZeroDivisionError",
    ),
    "it lacks operations": (
        "from rmsgd.backends import Entry\nentry = Entry('theirs', 'cpu', object)",
        "makes one without name, description, on_host, stepper",
    ),
    "it says what is missing": (
        "from rmsgd.backends import BackendUnavailable, Entry\n"
        "def create(): raise BackendUnavailable('no MLU\\nin here')\n"
        "entry = Entry('theirs', 'cpu', create)",
        "no MLU in here",
    ),
}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a package of this source that registers a backend by that name."""
    monkeypatch.setenv("RMSGD_BACKEND", "")

    def forget():
        plugins._points.cache_clear()
        plugins._entry.cache_clear()
        backends.forget_loaded()

    def install(source, name="theirs", module="rmsgd_theirs"):
        info = tmp_path / "rmsgd_theirs-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rmsgd-theirs\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[rmsgd.backends]\n{name} = {module}:entry\n")
        (tmp_path / "rmsgd_theirs.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(__import__("sys").modules, "rmsgd_theirs", raising=False)
        forget()

    yield install
    forget()


def install_broken(install, kind):
    source, reason = BROKEN[kind]
    install(source, module="rmsgd_nowhere" if kind == "its module is not there" else "rmsgd_theirs")
    return reason


def one_step(device="cpu"):
    p = nn.Parameter(torch.ones(4, 3, device=device))
    p.grad = torch.ones_like(p)
    optimizer = rmsgd.RMSGD([p], lr=0.5)
    optimizer.step()
    return p


def test_a_backend_for_another_device_goes_before_plain_torch_operations(install):
    install(SOUND.format(name="theirs", device="meta"))
    assert backends.backend_for(torch.device("meta")).description == "made by another package"
    one_step("meta")


def test_a_backend_beside_one_of_ours_runs_when_it_is_asked_for(install, monkeypatch):
    install(SOUND.format(name="theirs", device="cpu"))
    assert backends.backend_for(torch.device("cpu")).name != "theirs"
    monkeypatch.setenv("RMSGD_BACKEND", "theirs")
    assert backends.backend_for(torch.device("cpu")).name == "theirs"
    assert torch.equal(one_step().detach(), torch.full((4, 3), 0.5))
    with pytest.raises(ValueError, match="RMSGD_BACKEND=theirs runs on cpu, but a parameter is on meta"):
        backends.backend_for(torch.device("meta"))
    monkeypatch.setenv("RMSGD_BACKEND", "thiers")
    with pytest.raises(ValueError, match=r"choose one of native, .*, reference, theirs"):
        backends.backend_for(torch.device("cpu"))


def test_doctor_shows_a_backend_that_a_package_registers(install, capsys):
    install(SOUND.format(name="theirs", device="cpu"))
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["backends"]
    expected = {"name": "theirs", "device": "cpu", "available": True, "reason": "made by another package"}
    assert expected in found
    assert [b["name"] for b in found].index("theirs") < [b["name"] for b in found].index("torch")


def test_a_package_does_not_take_the_name_of_one_of_ours(install, monkeypatch):
    install(SOUND.format(name="torch", device="cpu"), name="torch")
    rows = [s for s in backends.statuses() if s.name == "torch"]
    assert [s.available for s in rows] == [False, True]
    assert rows[0].reason == "rmsgd-theirs must give its backend another name"
    monkeypatch.setenv("RMSGD_BACKEND", "torch")
    assert backends.backend_for(torch.device("cpu")).description != "made by another package"


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_package_is_one_line_in_doctor(install, capsys, kind):
    reason = install_broken(install, kind)
    assert cli.main(["doctor", "--json"]) == 0
    [row] = [b for b in json.loads(capsys.readouterr().out)["backends"] if b["name"] == "theirs"]
    assert not row["available"]
    assert reason in row["reason"]
    assert "\n" not in row["reason"]


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_package_leaves_the_optimizer_alone(install, monkeypatch, kind):
    reason = install_broken(install, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(one_step().detach(), torch.full((4, 3), 0.5))
    monkeypatch.setenv("RMSGD_BACKEND", "theirs")
    with pytest.raises(BackendUnavailable) as caught:
        one_step()
    assert reason in str(caught.value)


def test_where_plain_torch_operations_run_a_package_that_may_have_been_meant_for_it_is_named(install):
    install_broken(install, "its module fails")
    with pytest.warns(UserWarning, match="backend theirs: rmsgd-theirs cannot be imported: OSError: libmlu"):
        one_step("meta")
