"""The command line prints what it found, keeps stdout clean, and reports failures by its exit code."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch
from clock import PATIENCE
from safetensors.torch import save_file
from torch import nn

from rmsgd import cli, doctor
from rmsgd.backends import Status
from rmsgd.extras import install_command
from rmsgd.inspection.probing import Probing


def network(epoch=1):
    torch.manual_seed(epoch)
    state = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Linear(32, 20)).state_dict()
    state["2.weight"] += epoch * 0.1 * torch.randn(20, 1) @ torch.randn(1, 32)
    return {**state, "index": torch.zeros(4, 4, dtype=torch.int64)}


@pytest.fixture
def checkpoint(tmp_path):
    save_file(network(), tmp_path / "model.safetensors")
    return str(tmp_path / "model.safetensors")


@pytest.fixture
def epochs(tmp_path):
    for epoch in (1, 2, 10):
        torch.save(network(epoch), tmp_path / f"epoch_{epoch}.pt")
    return sorted(str(path) for path in tmp_path.glob("epoch_*.pt"))


def run(capsys, *arguments):
    code = cli.main(["probe", *map(str, arguments)])
    return code, *capsys.readouterr()


def bad_usage(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(["probe", *map(str, arguments)])
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# -- one checkpoint ------------------------------------------------------------------------------


def test_a_probe_prints_a_table_with_what_was_skipped_and_q(capsys, checkpoint):
    code, out, err = run(capsys, checkpoint)
    assert code == 0
    assert err == ""
    for text in ("0.weight", "16 x 3 x 3 x 3", " in, ", " out", "20 x 32", "int64", "Q = ", "1 skipped"):
        assert text in out


def test_one_layer_is_one_layer(capsys, checkpoint):
    assert "over 1 layer\n" in run(capsys, checkpoint, "--filter", "2.weight")[1]


def test_with_json_only_json_is_on_stdout(capsys, checkpoint):
    code, out, _ = run(capsys, checkpoint, "--json")
    content = json.loads(out)
    assert code == 0
    assert list(content) == ["quality", "layers"]
    assert [layer["name"] for layer in content["layers"]] == ["0.weight", "2.weight", "index"]


def test_csv_goes_to_stdout_or_to_a_file(capsys, checkpoint, tmp_path):
    _, out, _ = run(capsys, checkpoint, "--csv")
    run(capsys, checkpoint, "--csv", tmp_path / "out.csv")
    assert out == (tmp_path / "out.csv").read_text()
    assert out.startswith("name,shape,")


def test_a_figure_and_a_page_are_written(capsys, checkpoint, tmp_path):
    code, *_ = run(capsys, checkpoint, "--plot", tmp_path / "out.png", "--html", tmp_path / "out.html")
    assert code == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out.html").read_text()
    assert "noise threshold" in page
    assert page.count("<tbody ") == 2
    assert page.count("<svg") == 3  # two modes and a matrix


@pytest.mark.parametrize("size", [1e300, 1e308, 5e-324, 1e-310])
def test_weights_at_the_ends_of_float64_have_a_page_too(capsys, tmp_path, size):
    torch.save({"w": torch.full((4, 4), size, dtype=torch.float64).triu()}, tmp_path / "w.pt")
    code, *_ = run(capsys, tmp_path / "w.pt", "--html", tmp_path / "out.html", "--plot", tmp_path / "out.png")
    assert code == 0
    assert "<svg" not in (tmp_path / "out.html").read_text()


def test_a_page_is_complete_in_itself(capsys, checkpoint, tmp_path):
    run(capsys, checkpoint, "--html", tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    assert not re.search(r"(src|href)=|@import|url\(|https?://", page)


def test_names_from_a_file_steer_neither_terminal_nor_page(capsys, tmp_path):
    torch.save({"<b>\x1b[31m[red]x": torch.randn(4, 6)}, tmp_path / "odd.pt")
    _, out, _ = run(capsys, tmp_path / "odd.pt", "--html", tmp_path / "out.html")
    assert "<b>\\x1b[31m[red]x" in out
    assert "<b>\x1b" not in (tmp_path / "out.html").read_text()


@pytest.mark.filterwarnings("error")
def test_names_from_a_file_are_no_formulas_in_a_figure_and_steer_it_not(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    for file in ("$a_{$1.pt", "$a_{$2.pt"):
        torch.save(
            {name: torch.randn(4, 6) for name in ("$x_{$", "\x1b[31m\ty", r"\alpha$_")}, tmp_path / file
        )
    files = sorted(tmp_path.glob("*.pt"))
    for paths in (files[:1], files):
        code, *_ = run(capsys, *paths, "--plot", tmp_path / "out.png")
        assert code == 0


@pytest.mark.filterwarnings("error")
def test_a_series_of_layers_without_a_tail_or_with_huge_weights_is_drawn(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    for weight in (torch.randn(2, 2), torch.randn(5, 5, dtype=torch.float64) * 1e300):
        torch.save({"w": weight}, tmp_path / "w.pt")
        code, *_ = run(capsys, tmp_path / "w.pt", tmp_path / "w.pt", "--plot", tmp_path / "out.png")
        assert code == 0


def test_an_empty_path_is_not_the_current_folder(capsys, checkpoint, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "")
    assert (code, err) == (2, "rmsgd: the path is empty\n")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_csv_is_in_visible_letters_on_a_terminal_only(capsys, tmp_path, monkeypatch, is_terminal):
    torch.save({"\x1b[31mw": torch.randn(4, 6)}, tmp_path / "odd.pt")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, raising=False)
    _, out, _ = run(capsys, tmp_path / "odd.pt", "--csv")
    assert ("\x1b" in out) is not is_terminal
    assert "[31mw,4x6," in out
    assert len(out.splitlines()) == 2


def test_a_filter_may_be_repeated(capsys, checkpoint):
    _, out, _ = run(capsys, checkpoint, "--json", "--filter", "0.w", "--filter", "2.*")
    assert [layer["name"] for layer in json.loads(out)["layers"]] == ["0.weight", "2.weight"]


# -- several -------------------------------------------------------------------------------------


def test_several_paths_are_a_series_in_order_of_training(capsys, epochs, tmp_path):
    code, out, _ = run(capsys, *epochs, "--json", "--plot", tmp_path / "out.png")
    sources = [os.path.basename(entry["source"]) for entry in json.loads(out)["series"]]
    assert code == 0
    assert sources == ["epoch_1.pt", "epoch_2.pt", "epoch_10.pt"]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_series_prints_its_checkpoints_and_each_layers_course(capsys, epochs):
    _, out, _ = run(capsys, *epochs)
    assert "epoch_10.pt" in out
    assert re.search(r"2\.weight .* -> .*[▁▂▃▄▅▆▇█]{3}", out)


def test_a_series_as_csv_has_a_column_for_the_checkpoint(capsys, epochs):
    _, out, _ = run(capsys, *epochs, "--csv")
    assert out.startswith("source,name,")
    assert len(out.splitlines()) == 1 + 3 * 3


def test_two_checkpoints_are_compared(capsys, epochs):
    code, out, _ = run(capsys, "--compare", *epochs[:2], "--json")
    changes = json.loads(out)
    assert code == 0
    assert changes["sources"] == epochs[:2]
    sizes = [abs(layer["change"]["quality"]) for layer in changes["layers"]]
    assert sizes == sorted(sizes, reverse=True)
    assert "->" in run(capsys, "--compare", *epochs[:2])[1]
    assert "quality_change" in run(capsys, "--compare", *epochs[:2], "--csv")[1]


# -- failures ------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_one_line_and_exit_code_2(capsys, tmp_path):
    (tmp_path / "notes.pt").write_text("notes")
    code, out, err = run(capsys, tmp_path / "notes.pt")
    assert code == 2
    assert out == ""
    assert err.splitlines() == [f"rmsgd: {tmp_path}/notes.pt: a text file, not a torch file"]


def test_with_json_a_failure_is_json_too(capsys, tmp_path):
    code, out, _ = run(capsys, tmp_path / "nothing.pt", "--json")
    assert code == 2
    assert json.loads(out)["layers"] == []
    assert "no such file" in json.loads(out)["errors"][0]


def test_one_bad_checkpoint_leaves_the_rest_of_the_series(capsys, epochs, tmp_path):
    (tmp_path / "epoch_3.pt").write_bytes(Path(epochs[0]).read_bytes()[:1000])
    code, out, err = run(capsys, *epochs, tmp_path / "epoch_3.pt", "--json")
    assert code == 2
    assert [len(entry["layers"]) for entry in json.loads(out)["series"]] == [3, 3, 0, 3]
    assert "epoch_3.pt" in err


def test_skipped_layers_are_no_failure_and_nothing_measured_is_exit_code_1(capsys, tmp_path, checkpoint):
    torch.save({"packed": torch.ones(4, 4, dtype=torch.uint8)}, tmp_path / "packed.pt")
    packed = tmp_path / "packed.pt"
    code, out, err = run(capsys, packed)
    assert code == 1
    assert "quantised or packed" in out
    assert "Q = - over 0 layers, 1 skipped" in out
    assert err == ""
    assert run(capsys, packed, "--csv")[0] == 1
    assert run(capsys, packed, packed, "--json")[0] == 1
    code, out, _ = run(capsys, packed, checkpoint, "--json")  # a series in which something was measured
    assert code == 0
    assert json.loads(out)["series"][0]["quality"] is None
    assert run(capsys, packed, "--plot", tmp_path / "out.png")[0] == 2  # what was asked for was not written


def test_bad_usage_is_found_before_anything_is_measured(capsys, checkpoint, tmp_path, monkeypatch):
    assert "two paths" in bad_usage(capsys, "--compare", checkpoint)
    assert "existing folder" in bad_usage(capsys, checkpoint, "--plot", tmp_path / "no" / "out.png")
    assert "not available" in bad_usage(capsys, checkpoint, "--device", "abacus")
    monkeypatch.setenv("RMSGD_BACKEND", "abacus")
    assert "RMSGD_BACKEND=abacus is unknown" in bad_usage(capsys, checkpoint)


@pytest.mark.parametrize("name", ["other.pt", "OTHER.PT", "other.safetensors.index.json", "blob"])
def test_a_name_of_a_checkpoint_is_not_written_to(capsys, checkpoint, tmp_path, name):
    (tmp_path / "other.pt").symlink_to(tmp_path / "blob")
    (tmp_path / "blob").symlink_to(tmp_path / "another.pt")
    assert "overwrite a checkpoint" in bad_usage(capsys, checkpoint, "--csv", tmp_path / name)


@pytest.mark.parametrize("name", ["model", "../here/model", "symlink", "hardlink"])
@pytest.mark.parametrize("probed", ["model", "", "model.safetensors.index.json"])
def test_what_is_read_is_not_written_to_by_any_name(capsys, tmp_path, name, probed):
    here = tmp_path / "here"
    here.mkdir()
    save_file({"w": torch.randn(4, 6)}, here / "model")
    (here / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model"}}')
    (here / "symlink").symlink_to(here / "model")
    (here / "hardlink").hardlink_to(here / "model")
    assert "overwrite a checkpoint" in bad_usage(capsys, here / probed, "--csv", f"{here}/{name}")


def test_a_report_in_the_folder_of_the_checkpoint_is_written_again(capsys, checkpoint, tmp_path):
    for _ in range(2):
        assert run(capsys, tmp_path, "--csv", tmp_path / "report.csv")[0] == 0


@pytest.mark.parametrize(("option", "module"), [("--plot", "matplotlib"), ("--html", "jinja2")])
def test_a_missing_extra_is_named(capsys, checkpoint, tmp_path, monkeypatch, option, module):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    message = bad_usage(capsys, checkpoint, option, tmp_path / "out")
    assert module in message
    assert install_command("plot") in message


def test_csv_needs_no_extra(capsys, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert run(capsys, checkpoint, "--csv", tmp_path / "out.csv")[0] == 0


@pytest.mark.parametrize("name", ["out.nonsense", "out", "out.pgf"])
def test_a_suffix_that_no_figure_has_is_bad_usage(capsys, checkpoint, tmp_path, name):
    assert ".png" in bad_usage(capsys, checkpoint, "--plot", tmp_path / name)


@pytest.mark.parametrize("more", [("--csv",), ("--html", "page.html"), ("--plot", "out.png")])
def test_a_layer_is_bad_usage_where_no_figure_of_a_series_shows_it(capsys, checkpoint, more):
    assert "--layer" in bad_usage(capsys, checkpoint, "--layer", "0.weight", *more)
    assert "--layer" in bad_usage(capsys, checkpoint, checkpoint, "--layer", "0.weight")


def test_two_options_do_not_write_to_the_same_file(capsys, checkpoint, tmp_path):
    (tmp_path / "link.png").symlink_to(tmp_path / "out.png")
    targets = ("--plot", tmp_path / "out.png", "--html", tmp_path / "link.png")
    assert "what --plot writes" in bad_usage(capsys, checkpoint, *targets)


def test_a_file_without_the_permission_to_write_is_bad_usage(capsys, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.os, "access", lambda path, mode: False)
    for option, name in (("--csv", "out.csv"), ("--plot", "out.png"), ("--html", "out.html")):
        assert "cannot be written" in bad_usage(capsys, checkpoint, option, tmp_path / name)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_fills_up_is_a_failure_after_the_table_that_names_the_file(capsys, checkpoint, tmp_path):
    (tmp_path / "out.png").symlink_to("/dev/full")
    for option, target in (("--csv", "/dev/full"), ("--html", "/dev/full"), ("--plot", tmp_path / "out.png")):
        code, out, err = run(capsys, checkpoint, option, target)
        assert code == 2
        assert "Q = " in out
        assert str(target) in err
        assert err.count("\n") == 1


def test_ctrl_c_while_a_file_is_written_is_one_line(capsys, checkpoint, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "write_page", interrupted)
    code, out, err = run(capsys, checkpoint, "--html", tmp_path / "out.html")
    assert code == 130
    assert "Q = " in out
    assert "interrupted" in err
    assert err.count("\n") == 1


def test_ctrl_c_prints_what_is_done_so_far(capsys, checkpoint, monkeypatch):
    measure = Probing._measure

    def measure_once(self, batch):
        if self.layers:
            raise KeyboardInterrupt
        measure(self, batch)

    monkeypatch.setattr("rmsgd.inspection.measuring.BATCH_BYTES", 1)
    monkeypatch.setattr(Probing, "_measure", measure_once)
    code, out, err = run(capsys, checkpoint, "--json", "--filter", "weight")
    assert code == 130
    assert [layer["name"] for layer in json.loads(out)["layers"]] == ["0.weight"]
    assert "interrupted" in err


# `python -m rmsgd`, which leaves a file when it has measured a layer, and waits then.
WAITS_AFTER_A_LAYER = f"""
import pathlib, runpy, sys, time
from rmsgd.inspection import measuring
from rmsgd.inspection.probing import Probing
measure, marker = Probing._measure, pathlib.Path(sys.argv.pop(1))
measuring.BATCH_BYTES = 1
def measure_and_wait(self, batch):
    measure(self, batch)
    marker.touch()
    time.sleep({PATIENCE})
Probing._measure = measure_and_wait
runpy.run_module("rmsgd", run_name="__main__")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to send")
def test_ctrl_c_stops_the_command(checkpoint, tmp_path):
    marker = tmp_path / "measured"
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", WAITS_AFTER_A_LAYER, str(marker)),
            *("probe", checkpoint, "--json", "--filter", "weight"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background of a shell ignores the signal, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not marker.exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert [layer["name"] for layer in json.loads(out)["layers"]] == ["0.weight"]
    assert "Traceback" not in err


# -- stdout --------------------------------------------------------------------------------------


def command(*arguments, stdout, **environment):
    """Exit status, what was written to a pipe, and standard error of the command in a process of its own."""
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-m", "rmsgd", *arguments],
        env={**buffered, **environment},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("arguments", [["probe"], ["probe", "--json"], ["doctor", "--json"]])
def test_a_reader_that_has_left_is_no_failure(checkpoint, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        code, _, err = command(*arguments, *[checkpoint] * ("probe" in arguments), stdout=writer)
    finally:
        os.close(writer)
    assert code == 0
    assert "Error" not in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_full_disk_is_one_line_and_exit_code_2(checkpoint, form):
    with open("/dev/full", "w") as full:
        code, _, err = command("probe", checkpoint, *form, stdout=full)
    assert code == 2
    assert err == "rmsgd: [Errno 28] No space left on device\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_the_exit_code_tells_of_a_failure_where_stderr_cannot(tmp_path):
    line = shlex.join([sys.executable, "-m", "rmsgd", "probe", str(tmp_path / "nothing.pt")])
    assert subprocess.run(f"{line} 2>/dev/full", shell=True).returncode == 2


@pytest.mark.parametrize("form", [[], ["--json"], ["--csv"]])
def test_a_closed_stdout_is_no_failure(checkpoint, form):
    line = shlex.join([sys.executable, "-m", "rmsgd", "probe", checkpoint, *form])
    done = subprocess.run(f"{line} >&-", shell=True, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_stdout_cannot_encode_is_escaped(tmp_path):
    paths = [str(tmp_path / f"epoch_{epoch}.pt") for epoch in (1, 2)]
    for path in paths:
        torch.save({"größe": torch.randn(4, 6)}, path)
    code, out, _ = command("probe", *paths, stdout=subprocess.PIPE, PYTHONIOENCODING="ascii")
    assert code == 0
    assert "gr\\xf6\\xdfe" in out


# -- doctor --------------------------------------------------------------------------------------


def test_doctor_lists_every_backend_with_a_reason(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"native", "numba", "torch"} <= {backend["name"] for backend in found["backends"]}
    for backend in found["backends"]:
        assert list(backend) == ["name", "device", "available", "reason"]
        assert backend["reason"]
    assert {"rmsgd", "torch", "numba", "cupy", "instruction set"} <= set(found["versions"])
    assert found["used"]["cpu"] in {backend["name"] for backend in found["backends"]}


def test_doctor_has_a_table_for_people(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for text in ("native", "torch", "available", "instruction set", "cpu uses "):
        assert text in out


def test_doctor_warns_of_the_authors_package_beside_ours(monkeypatch):
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "1.0.2" if name == "rmsgd" else version(name))
    [warning] = doctor.examine()["warnings"]
    assert "rmsgd 1.0.2" in warning
    assert "pip uninstall rmsgd" in warning


def test_doctor_warns_of_sources_that_hide_what_is_installed(monkeypatch, tmp_path):
    (tmp_path / "rmsgd").mkdir()
    (tmp_path / "rmsgd" / "doctor.py").touch()
    (tmp_path / "rmsgd_kernels-0.dist-info").mkdir()
    (tmp_path / "rmsgd_kernels-0.dist-info" / "METADATA").write_text("Name: rmsgd-kernels\nVersion: 0")
    monkeypatch.syspath_prepend(tmp_path)
    [warning] = doctor.examine()["warnings"]
    assert f"hides the one that is installed in {tmp_path / 'rmsgd'}" in warning
    assert "pip install -e" in warning


def test_doctor_says_what_to_do_where_only_a_slow_backend_runs(monkeypatch):
    monkeypatch.setenv("RMSGD_BACKEND", "torch")
    [advice] = doctor.examine()["advice"]
    assert "C++17 compiler" in advice
    assert install_command("numba") in advice


def test_doctor_tells_of_a_backend_that_cannot_run(monkeypatch, capsys):
    status = Status("native", "cpu", False, "rmsgd._cpu is not there")
    monkeypatch.setattr(doctor, "statuses", lambda: [status])
    cli.main(["doctor"])
    out = capsys.readouterr().out
    assert "not available" in out
    assert "rmsgd._cpu is not there" in out


def test_doctor_reports_an_unknown_backend_instead_of_failing(monkeypatch, capsys):
    monkeypatch.setenv("RMSGD_BACKEND", "abacus")
    assert cli.main(["doctor"]) == 0
    assert "RMSGD_BACKEND=abacus is unknown" in capsys.readouterr().out
