"""`python -m bench` answers with one line where something is wrong, before anything is measured."""

import sys
from pathlib import Path

import pytest
from commands import run_bench
from rich.console import Console

from bench import (
    epoch_timing,
    models,
    noise_search,
    output,
    peers,
    plots,
    probe_speed,
    spectrum,
    speed_epoch_end,
    speed_step,
    split,
    training,
)
from bench.gate import command as gate

# From a command to the function that does its work, as an object and a name.
WORK = {
    "train": (training, "train"),
    "epoch-time": (epoch_timing, "run"),
    "noise-search": (noise_search, "compare"),
    "speed": (speed_step.peers, "make"),
    "split": (split, "compare"),
    "spectrum": (spectrum, "compare"),
    "probe-speed": (probe_speed, "compare"),
}
WITH_README = [command for command in WORK if command not in ("train", "spectrum")]
WITH_ROUNDS = [command for command in WORK if command not in ("train", "noise-search")]


@pytest.fixture(autouse=True)
def _no_package_is_fetched(monkeypatch):
    monkeypatch.setattr(peers, "load_rmsgd_1_0_2", lambda: None)


@pytest.fixture
def work(monkeypatch):
    """Lets the work of a command raise an error instead, and counts its calls."""

    def replace(command, error):
        calls = []

        def fail(*_, **__):
            calls.append(command)
            raise error

        monkeypatch.setattr(*WORK[command], fail)
        return calls

    return replace


def answer(capsys, command, *arguments):
    """Exit status, and the one line on stderr that names the command."""
    status, _, err = run_bench(capsys, command, *arguments)
    (line,) = [line for line in err.splitlines() if line.startswith(f"python -m bench {command}: ")]
    return status, line


@pytest.mark.parametrize("command", WORK)
def test_a_folder_that_cannot_be_written_is_said_before_anything_is_measured(command, work, tmp_path, capsys):
    calls = work(command, AssertionError("measured"))
    (tmp_path / "file").touch()
    status, line = answer(capsys, command, "--out", str(tmp_path / "file" / "folder"))
    assert status == 2
    assert "Not a directory" in line
    assert "file" in line
    assert not calls


@pytest.mark.parametrize("command", WITH_README)
def test_a_page_without_the_mark_is_said_before_anything_is_measured(command, work, tmp_path, capsys):
    calls = work(command, AssertionError("measured"))
    page = tmp_path / "page.md"
    page.write_text("no table here\n")
    status, line = answer(capsys, command, "--out", str(tmp_path), "--readme", str(page))
    assert status == 2
    assert "has no line '<!-- measured: " in line
    status, line = answer(capsys, command, "--out", str(tmp_path), "--readme", str(tmp_path / "none.md"))
    assert status == 2
    assert "No such file or directory" in line
    assert not calls


def test_the_gate_says_where_it_cannot_write_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(gate, "Worker")
    status, line = answer(capsys, "gate", "--update", "--baseline", str(tmp_path))
    assert status == 2
    assert "Is a folder, not a file" in line
    (tmp_path / "file").touch()
    status, line = answer(capsys, "gate", "--self-test", "1", "--out", str(tmp_path / "file"))
    assert status == 2
    assert "File exists" in line


@pytest.mark.parametrize("command", WORK)
def test_an_interrupted_command_is_status_130_in_one_line(command, work, tmp_path, capsys):
    work(command, KeyboardInterrupt())
    status, line = answer(capsys, command, "--out", str(tmp_path))
    assert status == 130
    assert "interrupted" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", WORK)
@pytest.mark.parametrize("bug", [ValueError("a bug"), TypeError("a bug"), ModuleNotFoundError("a bug")])
def test_a_fault_of_the_program_keeps_its_traceback(command, bug, work, tmp_path, capsys):
    work(command, bug)
    with pytest.raises(type(bug), match="a bug"):
        run_bench(capsys, command, "--out", str(tmp_path))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    ],
)
def test_want_of_memory_is_status_1_in_one_line(error, work, tmp_path, capsys):
    work("train", error)
    status, line = answer(capsys, "train", "--out", str(tmp_path))
    assert status == 1
    assert "out of memory" in line


@pytest.mark.parametrize("command", WITH_ROUNDS)
@pytest.mark.parametrize("count", ["0", "-3", "many"])
def test_rounds_that_make_no_sense_are_bad_arguments(command, count, capsys):
    status, line = answer(capsys, command, "--rounds", count)
    assert status == 2
    assert f"--rounds: expected a whole number above 0, got '{count}'" in line


@pytest.mark.parametrize("command", ["speed", "split", "noise-search", "probe-speed"])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet19", "unknown model 'resnet19'. Did you mean 'resnet18'?"),
        ("linear-", "'linear-': expected linear-N"),
        ("linear-few", "'linear-few': expected linear-N"),
    ],
)
def test_an_unknown_model_is_a_bad_argument(command, model, message, capsys):
    status, line = answer(capsys, command, "--models", f"resnet18,{model}")
    assert status == 2
    assert message in line


@pytest.mark.parametrize("command", ["train", "epoch-time"])
@pytest.mark.parametrize("width", ["1e9", "0", "-1", "nan", "inf", "wide"])
def test_a_width_that_no_machine_holds_is_a_bad_argument(command, width, capsys):
    status, line = answer(capsys, command, "--width", width)
    assert status == 2
    assert "--width: expected" in line


@pytest.mark.parametrize("command", ["speed", "noise-search"])
def test_want_of_the_authors_package_is_said_before_anything_is_measured(
    command, work, tmp_path, capsys, monkeypatch
):
    def absent():
        raise peers.PeerUnavailableError("rmsgd 1.0.2, the authors' package, could not be fetched: offline")

    calls = work(command, AssertionError("measured"))
    monkeypatch.setattr(peers, "load_rmsgd_1_0_2", absent)
    status, line = answer(capsys, command, "--out", str(tmp_path))
    assert status == 2
    assert "could not be fetched: offline" in line
    assert not calls


def test_want_of_numba_names_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    flags = ["--quick", "--section", "step", "--models", "resnet14-digits", "--out", str(tmp_path)]
    status, line = answer(capsys, "speed", *flags)
    assert status == 2
    assert "the plain loop needs numba: pip install" in line


def test_want_of_scikit_learn_names_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    status, line = answer(capsys, "train", "--out", str(tmp_path))
    assert status == 2
    assert "the digits need scikit-learn: pip install" in line


def test_without_matplotlib_the_figures_are_left_out_and_the_rest_is_written(tmp_path, capsys, monkeypatch):
    def missing(*_, **__):
        raise ModuleNotFoundError("figures need matplotlib")

    monkeypatch.setattr(plots, "proportions", missing)
    flags = ["--models", "linear-8", "--rounds", "1", "--quick", "--section", "epoch-end"]
    for command, more in (("speed", flags), ("spectrum", ["--sizes", "8", "--rounds", "1"])):
        status, out, _ = run_bench(capsys, command, *more, "--out", str(tmp_path / command))
        assert status == 0
        assert "no figures: figures need matplotlib" in out
        assert [path.suffix for path in (tmp_path / command).iterdir()] == [".json"]


def test_a_setting_that_an_optimizer_refuses_is_named():
    parameters = list(models.build("resnet14-digits").named_parameters())
    with pytest.raises(ValueError, match=r"sgd refuses its settings: .*'speed'"):
        peers.make("sgd", parameters, speed=3)


def test_a_step_of_one_linear_layer_is_timed_too():
    assert callable(speed_step.case("rmsgd", "linear-8"))
    assert len(speed_epoch_end.spectra(speed_epoch_end.network("linear-8"))) == 1


def test_the_name_of_a_file_is_printed_as_it_is_whatever_it_looks_like(capsys):
    path = Path("runs [bold] of May") / ("long " * 40) / "result.json"
    output.say([path], Console())
    assert capsys.readouterr().out == f"wrote {path}\n"
