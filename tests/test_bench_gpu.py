"""`python -m bench gpu`: its sections share the time, fail alone, and keep what they had measured."""

import io
import json
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import rehearsal
import torch
from clock import PATIENCE, Clock
from emulated import ROOT
from rich.console import Console

from bench import models, peers
from bench.__main__ import main
from bench.gpu import (
    budget,
    checks,
    clocks,
    command,
    counting,
    measurements,
    processes,
    stress,
    tables,
    targets,
)
from bench.gpu.budget import Need, share
from bench.gpu.cards import CARDS
from rmsgd.backends import ENTRIES
from rmsgd.backends.cuda import CudaBackend

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def printed(*what):
    console = Console(file=io.StringIO(), width=200)
    console.print(*what)
    return console.file.getvalue()


# -- the command line --------------------------------------------------------------------------------


@needs_no_gpu
def test_without_a_gpu_it_says_so_and_exits_with_2(capsys):
    assert main(["gpu"]) == command.NO_GPU == 2
    assert "torch finds no CUDA device here" in capsys.readouterr().err


def test_an_unknown_section_is_answered_with_those_there_are(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["gpu", "--only", "step,steps"])
    assert caught.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "no section 'steps'; choose from build, smoke, tests, step, epoch-end" in said


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command with the test's own sections, as if there were a GPU; returns status and result."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command.measure, "machine", dict)

    def run(sections, *arguments):
        monkeypatch.setattr(command, "SECTIONS", sections)
        status = command.main(["--out", str(tmp_path), *arguments])
        return status, json.loads((tmp_path / "gpu.json").read_text())

    return run


def section(result, typical=10, longest=20):
    def run(session, limit_s):
        if isinstance(result, BaseException):
            raise result
        return dict(result)

    return command.Section(run, Need(typical, longest))


def test_when_everything_ran_the_status_is_0_even_if_targets_are_missed(run, capsys):
    status, result = run({"step": section({"rows": [STEP_ROW | {"device_ratio_to": ratios(2.0)}]})})
    assert status == 0
    assert [t["met"] for t in result["targets"] if t["measured"]] == [True, False, True]
    assert "NO" in capsys.readouterr().out


@pytest.mark.parametrize("bad", [{"error": "tests failed"}, ValueError("no [such] thing")], ids=str)
def test_a_section_that_fails_costs_itself_only(run, capsys, bad):
    status, result = run({"tests": section(bad), "step": section({"rows": [STEP_ROW]})})
    assert status == 1
    assert result["step"]["rows"]
    assert result["tests"]["error"] in ("tests failed", "ValueError: no [such] thing")
    assert f"tests: {result['tests']['error']}" in capsys.readouterr().out


def test_sections_that_are_not_asked_for_are_left_out(run):
    status, result = run(
        {name: section({}) for name in ("build", "step", "epoch-end")}, "--only", "epoch-end,build"
    )
    assert status == 0
    assert {"build", "epoch-end"} <= result.keys()
    assert "step" not in result


def test_a_section_without_time_is_recorded_as_skipped(run):
    status, result = run({"build": section({}), "step": section({}, 10, 20)}, "--seconds", "3")
    assert status == 1
    assert result["build"]["skipped"] == result["step"]["skipped"] == "no time was left"


def test_interrupted_what_was_measured_is_kept(run):
    status, result = run({"build": section({"a": 1}), "step": section(KeyboardInterrupt())})
    assert status == command.INTERRUPTED == 130
    assert result["build"]["a"] == 1


def test_the_stages_come_in_order_of_use_and_usually_fit():
    assert list(command.STAGES) == ["build", "tests", "time", "peers", "sanitize"]
    assert [section for sections in command.STAGES.values() for section in sections] == list(command.SECTIONS)
    for stages, seconds in (((), command.BUDGET_S), (("sanitize",), command.SANITIZE_S)):
        names = command.sections_of(stages)
        assert command.budget_of(names) == seconds
        assert sum(command.SECTIONS[name].need.typical for name in names) < seconds
    assert command.BUDGET_S <= 360
    assert command.SANITIZE_S <= 240


def test_a_stage_is_asked_for_by_name_and_has_a_result_of_its_own(run, tmp_path):
    sections = {name: section({"rows": []}) for name in command.SECTIONS}
    status, result = run(sections, "time")
    assert status == 0
    assert result.keys() - {"schema", "machine", "targets"} == set(command.STAGES["time"])
    run(sections, "build", "peers")
    for stage in ("build", "time", "peers"):
        kept = json.loads((tmp_path / f"gpu-{stage}.json").read_text())
        assert set(command.STAGES[stage]) <= kept.keys()


def test_only_the_last_stage_has_to_be_asked_for(run):
    sections = {name: section({}) for name in command.SECTIONS}
    _, result = run(sections)
    assert "sanitizer" not in result
    assert "eigenvalues" in result
    _, result = run(sections, "sanitize")
    assert set(command.STAGES["sanitize"]) <= result.keys()
    assert "build" not in result


def test_an_unknown_stage_is_answered_with_those_there_are(capsys):
    with pytest.raises(SystemExit):
        main(["gpu", "tests", "tmie"])
    assert "no stage 'tmie'; choose from build, tests, time" in " ".join(capsys.readouterr().err.split())


# -- time --------------------------------------------------------------------------------------------


def test_a_section_may_take_its_longest_where_the_later_ones_keep_their_usual_time():
    assert share(Need(30, 60), [Need(20, 40)], 100) == 60
    assert share(Need(30, 60), [Need(20, 40)], 70) == 50


def test_where_time_is_short_the_earlier_section_keeps_its_usual_time():
    assert share(Need(30, 60), [Need(20, 40), Need(20, 40)], 50) == 30
    assert share(Need(30, 60), [Need(20, 40)], 25) == 25


@pytest.mark.parametrize("remaining", [-3, 0, budget.LEAST_S / 2])
def test_a_section_with_next_to_no_time_gets_none(remaining):
    assert share(Need(30, 60), [], remaining) == 0


def test_no_overrun_of_any_section_takes_the_whole_over_its_time():
    remaining = float(command.BUDGET_S)
    needs = [command.SECTIONS[name].need for name in command.sections_of(())]
    taken = []
    for i, need in enumerate(needs):
        taken.append(share(need, needs[i + 1 :], remaining))
        remaining -= taken[-1]
    assert remaining >= 0
    assert min(taken) >= 20


def test_backends_share_a_sections_time_and_what_one_leaves_the_next_one_gets(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(checks, "time", clock)
    shares = checks.in_turn(("cuda", "cupy"), 100)
    assert next(shares) == ("cuda", 50)
    clock.sleep(20)
    assert next(shares) == ("cupy", 80)


# -- processes ---------------------------------------------------------------------------------------


@pytest.fixture
def out_of_time(monkeypatch, tmp_path):
    """Processes whose time is over as soon as they have written to this file."""
    said = tmp_path / "said"

    class Process(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout == 3:
                while not said.exists():
                    time.sleep(0.01)
                raise subprocess.TimeoutExpired(self.args, timeout)
            return super().wait(timeout)

    monkeypatch.setattr(processes.subprocess, "Popen", Process)
    return said


def test_a_process_out_of_time_ends_with_its_children_and_what_it_said_is_kept(out_of_time, tmp_path):
    code = f"sleep {PATIENCE} & echo row $!; touch {out_of_time}; wait"
    ended = processes.run(["sh", "-c", code], 3, tmp_path / "log")
    assert ended.status is None
    assert "stopped for lack of time" in ended.failure()
    row, number = ended.output.split()
    assert row == "row"
    while running(int(number)):  # the system may need a moment
        time.sleep(0.01)


def running(number):
    try:
        with open(f"/proc/{number}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_log_has_every_process_and_the_result_only_its_own(tmp_path):
    log = tmp_path / "new" / "log"
    for word in ("one", "two"):
        ended = processes.run([sys.executable, "-c", f"print('{word}')"], 60, log)
        assert (ended.status, ended.output, ended.failure()) == (0, f"{word}\n", None)
    assert log.read_text().count("\none\n") == log.read_text().count("\ntwo\n") == 1


def test_a_process_that_fails_is_told_with_its_last_words(tmp_path):
    ended = processes.run([sys.executable, "-c", "raise SystemExit('no luck')"], 60, tmp_path / "log")
    assert ended.failure() == "status 1: no luck"


# -- tests of the kernels ----------------------------------------------------------------------------

SAID = """
collecting ... collected 5 items

tests/test_gpu.py::test_steps[cuda-{'momentum': 0.0, 'nesterov': False}-torch.float32] PASSED [ 20%]
tests/test_gpu.py::test_extra_memory[cuda] SKIPPED (no GPU with [much] memory) [ 40%]
tests/test_gpu.py::test_hard_spectra[cuda-(40, 60)-0.001] FAILED                  [ 60%]
tests/test_gpu.py::test_teardown[cuda] PASSED                                     [ 80%]
tests/test_gpu.py::test_teardown[cuda] ERROR                                      [ 80%]
"""
HANGING = "tests/test_gpu.py::test_graph[cuda-(2, 3)] "
SUMMARY = (
    "\n=== short test summary info ===\nFAILED tests/test_gpu.py::test_hard_spectra[cuda-(40, 60)-0.001]\n"
)


def test_results_of_tests_are_read_line_by_line():
    found = checks.results(SAID + SUMMARY)
    assert (found["passed"], found["skipped"], found["unfinished"]) == (2, 1, None)
    assert found["failed"] == [
        "tests/test_gpu.py::test_hard_spectra[cuda-(40, 60)-0.001]",
        "tests/test_gpu.py::test_teardown[cuda]",
    ]


@pytest.mark.parametrize(
    "said",
    ["", "Timeout (0:01:00)!\nThread 0x7f (most recent call first):\n", "Fatal Python error: Aborted\n"],
)
@pytest.mark.parametrize("status", [None, -6])
def test_a_test_that_hangs_or_crashes_is_named(said, status):
    output = SAID + HANGING + said
    assert checks.results(output)["unfinished"] == HANGING.strip()
    failure = checks.failure(processes.Ended(status, 60.0, output))
    assert failure.startswith(f"at {HANGING.strip()}: ")
    assert ("stopped for lack of time after 60 s" if status is None else "status -6") in failure


def test_this_pytest_prints_such_lines(tmp_path):
    """The lines include a test that fails, and one whose parameters hold spaces."""
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('n', [(1, 2), (3, 4)], ids=str)\n"
        "def test_a(n): assert n == (1, 2)\n"
        "@pytest.mark.skip(reason='PASSED over')\n"
        "def test_b(): pass\n"
    )
    code = f"import os, pytest; os.chdir({str(tmp_path)!r}); raise SystemExit(pytest.main(['-v', 'tests']))"
    ended = processes.run([sys.executable, "-c", code], 60, tmp_path / "log")
    found = checks.results(ended.output)
    assert (found["passed"], found["skipped"]) == (1, 1)
    assert found["failed"] == ["tests/test_it.py::test_a[(3, 4)]"]
    assert checks.failure(ended) == "1 failed"


@needs_no_gpu
def test_the_tests_of_each_backend_run_in_a_process_of_its_own(tmp_path):
    result = checks.gpu_tests(120, tmp_path / "log", ("cuda",), "gpu and not slow", hanging_s=60)
    found = result["backends"]["cuda"]
    assert result["error"] is found["error"] is None
    assert found["passed"] == 0
    assert found["skipped"] > 50
    log = (tmp_path / "log").read_text()
    assert "[cuda-" in log
    assert "[cupy-" not in log
    assert "sanitizer" not in log


@needs_no_gpu
def test_a_smoke_test_says_why_a_backend_cannot_run(tmp_path):
    result = checks.smoke_tests(120, tmp_path / "log")
    assert result["error"] == "no backend runs here"
    assert list(result["backends"]) == ["cuda", "cupy"]
    assert all(found["absent"] for found in result["backends"].values())


def test_what_passed_its_smoke_test_is_tested_and_measured(tmp_path, monkeypatch):
    session = command.Session(tmp_path)
    assert list(session.backends) == ["cuda", "cupy"]
    assert session.environment == {}
    found = {"cuda": {"error": "status -6: illegal access"}, "cupy": {"error": None}}
    monkeypatch.setattr(checks, "smoke_tests", lambda limit, log: {"backends": found, "error": "cuda failed"})
    assert command._smoke(session, 60)["error"] == "cuda failed"
    assert session.backends == ["cupy"]
    assert session.environment == {"RMSGD_BACKEND": "cupy"}


def test_without_a_backend_that_runs_there_is_nothing_to_test(tmp_path):
    assert checks.gpu_tests(60, tmp_path / "log", [], "gpu", hanging_s=60)["error"] == "no backend runs here"


# -- rows --------------------------------------------------------------------------------------------


def test_rows_that_were_printed_before_the_end_are_kept():
    output = 'noise\nrow {"n": 32}\nTraceback ...\nrow {"n": 64}\nrow {"n": 12'
    assert measurements.parse(output) == [{"n": 32}, {"n": 64}]


@needs_no_gpu
def test_what_cannot_be_measured_is_a_row_with_the_reason(tmp_path):
    result = command.SECTIONS["eigenvalues"].run(command.Session(tmp_path), 120)
    assert result["rows"]
    assert all("error" in row or "absent" in row for row in result["rows"])
    assert result["error"]
    assert printed(*tables.tables({"eigenvalues": result}))


def test_an_optimizer_whose_package_is_missing_is_absent_and_the_others_are_timed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    asked = []

    def run(arguments, limit_s, log, environment):
        asked.extend(arguments[arguments.index("--optimizers") + 1].split(","))
        written = tmp_path / "epoch-time" / "epoch-time-resnet18-cuda.json"
        written.parent.mkdir()
        row = {"epoch": {"median": 1.0}, "ratio": {"median": 1.0}}
        written.write_text(json.dumps({"optimizers": [{"optimizer": name, **row} for name in asked]}))
        return processes.Ended(0, 1.0, "")

    monkeypatch.setattr(processes, "run", run)
    result = command.SECTIONS["epoch-time"].run(command.Session(tmp_path), 60)
    assert asked == ["rmsgd", "sgd"]
    assert result["error"] is None
    assert [row["optimizer"] for row in result["rows"]] == ["rmsgd", "sgd", "sam"]
    assert "pip install" in result["rows"][-1]["absent"]
    assert "absent" in printed(*tables.tables({"epoch-time": result}))


def test_rmsgd_1_0_2_out_of_reach_costs_its_own_rows(monkeypatch):
    def unreachable(name, parameters, **settings):
        raise peers.PeerUnavailableError("could not be fetched")

    monkeypatch.setattr(measurements, "backend_name", lambda: "cuda")
    monkeypatch.setattr(measurements, "weighted", lambda network, weights: torch.nn.Linear(2, 2))
    monkeypatch.setattr(measurements, "epoch_end_of", lambda model: {"device_seconds": {"median": 1.0}})
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self)
    monkeypatch.setattr(peers, "make", unreachable)
    rows = list(measurements.epoch_end())
    assert [row.get("absent") for row in rows[-2:]] == ["PeerUnavailableError: could not be fetched"] * 2
    assert all("device_seconds" in row for row in rows[:-2])


def test_a_routine_that_fails_is_absent_from_its_row(monkeypatch):
    def missing(gram):
        raise ImportError("libcusolver.so.12")

    on_cpu, randn = next(entry for entry in ENTRIES if entry.name == "torch"), torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, device: randn(*shape))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr("rmsgd.backends.backend_for", lambda device: on_cpu.load())
    monkeypatch.setattr(
        measurements, "VENDOR", {"torch eigvalsh": torch.linalg.eigvalsh, "cupy eigvalsh": missing}
    )
    row = measurements.eigenvalues_of(8)
    assert row["absent"] == {"cupy eigvalsh": "ImportError: libcusolver.so.12"}
    assert set(row["seconds"]) == {"ours", "torch eigvalsh"}
    assert set(row["ratio"]) == {"torch eigvalsh"}
    table = printed(*tables.tables({"eigenvalues": {"rows": [{"n": 8, "count": 16, **row}]}}))
    assert "absent" in table


@pytest.mark.slow
def test_every_measurement_runs_on_the_pretended_gpu(gpu_folder, monkeypatch):
    monkeypatch.setattr(models, "build", partial(models.build, width=0.04))
    small = {
        "STEP_NETWORKS": ("resnet18",),
        "STEP_CASES": ("rmsgd", "sgd-foreach", "sgd-per-layer"),  # torch's fused kernel wants a real one
        "COPIED_FLOATS": 1024,
        "EPOCH_END_NETWORKS": ("resnet18",),
        "RELEASE_NETWORKS": (),
        "EIGENVALUE_SIZES": (8,),
        "MATRICES": 2,
        "ROUNDS": 1,
    }
    for name, value in small.items():
        monkeypatch.setattr(measurements, name, value)
    with rehearsal.rehearsed(gpu_folder):
        rows = {name: list(measure()) for name, measure in measurements.SECTIONS.items()}
    assert not [row for found in rows.values() for row in found if "error" in row]
    assert all(ratio["median"] > 0 for ratio in rows["step"][0]["wall_ratio_to"].values())
    assert [sum(row["stages"].values()) for row in rows["epoch-end"]] == [38, 38]
    assert "torch eigvalsh" in rows["eigenvalues"][0]["ratio"]


@pytest.fixture
def small_stress(monkeypatch):
    """On matrices that the emulator measures in seconds, of every stage of the accuracy guard."""
    monkeypatch.setattr(models, "build", lambda name: torch.nn.Sequential(torch.nn.Linear(12, 9)))
    for name, value in {"TIMES": 3, "LOAD": 8, "DEFICIENT": (12, 15)}.items():
        monkeypatch.setattr(stress, name, value)


@pytest.mark.parametrize("order", ["launched", "others last"])
def test_epoch_ends_under_load_give_the_same_bits_on_the_pretended_gpu(
    gpu_folder, small_stress, capsys, order
):
    with rehearsal.rehearsed(gpu_folder, order):
        assert stress.main() == 0
    assert "2 matrices, 3 times: 0 tables differ" in capsys.readouterr().out


def test_an_epoch_end_that_gives_another_bit_fails_the_stress(gpu_folder, small_stress, monkeypatch, capsys):
    measure, turns = CudaBackend.measure, []

    def measured(backend, matrices):
        turns.append(0)
        return measure(backend, matrices) + (len(turns) == 3)

    monkeypatch.setattr(CudaBackend, "measure", measured)
    with rehearsal.rehearsed(gpu_folder):
        assert stress.main() == 1
    assert "1 tables differ [1]" in capsys.readouterr().out


def test_kernels_are_timed_by_name_and_others_are_left_out():
    seen = [
        SimpleNamespace(key=name, device_time_total=total, count=count)
        for name, total, count in (("rmsgd_gram", 30, 10), ("sgemm", 99, 1), ("rmsgd_tridiagonal", 500, 20))
    ]
    found = measurements.kernel_seconds(seen, 10)
    assert found == {
        "rmsgd_tridiagonal": {"seconds": pytest.approx(50e-6), "launches": 2},
        "rmsgd_gram": {"seconds": pytest.approx(3e-6), "launches": 1},
    }
    assert list(found) == ["rmsgd_tridiagonal", "rmsgd_gram"]
    rows = [{"network": "resnet18", "kernels": found}, {"network": "resnet50", "error": "no [profiler]"}]
    table = printed(*tables.tables({"kernels": {"rows": rows}}))
    assert "0.050" in table
    assert "no [profiler]" in table


# -- counted times -----------------------------------------------------------------------------------


H200 = next(card for card in CARDS if card.name == "H200")
RTX_2080_TI = next(card for card in CARDS if card.name == "RTX 2080 Ti")


@pytest.mark.parametrize(
    ("network", "card", "goal_ms"),
    [
        ("resnet18", H200, 3),
        ("resnet50", H200, 6),
        ("vit-b16", H200, 15),
        ("resnet50", RTX_2080_TI, 15),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_by_count_an_epoch_end_reaches_its_goal(network, card, goal_ms):
    row = counting.count(network, card)
    assert 0 < row["total_ms"] <= goal_ms
    assert row["total_ms"] == pytest.approx(sum(row[f"{stage}_ms"] for stage in tables.COUNTED))
    old = counting.count_before(network, card)
    assert row["total_ms"] < old["total_ms"]
    assert row["host"] == 0


def test_counted_times_come_from_the_tables_that_kernels_are_launched_by(monkeypatch):
    before = counting.count("resnet18", H200)
    monkeypatch.setattr("rmsgd.backends.cuda_spectra._COLUMNS_PER_SPLIT", 10**9)
    assert counting.count("resnet18", H200)["gram_ms"] > before["gram_ms"]
    (plan,) = counting.plans_of(counting.weights_of("resnet18"), H200)
    assert before["waves"] == len(plan.rounds[0].waves)
    assert before["reduction_ms"] == pytest.approx(1e3 * sum(w.seconds for w in plan.rounds[0].waves))


def test_the_counted_table_of_the_docs_is_what_its_command_writes(monkeypatch, tmp_path):
    few = {name: counting.NETWORKS[name] for name in ("resnet50", "mobilenetv2")}
    monkeypatch.setattr(counting, "NETWORKS", few)
    page = tmp_path / "page.md"
    page.write_text("<!-- measured: counted -->\n<!-- /measured -->\n")
    assert main(["gpu", "--model", "--json", "--readme", str(page)]) == 0
    rows = [
        line for line in page.read_text().splitlines() if line.startswith(("| resnet50", "| mobilenetv2"))
    ]
    assert len(rows) == len(few)
    docs = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert all(row in docs for row in rows), "python -m bench gpu --model --readme docs/gpu.md"


def test_matrices_that_were_left_to_the_host_are_counted_now():
    old, new = counting.count_before("transformer-1b", H200), counting.count("transformer-1b", H200)
    assert (old["host"], new["host"]) == (97, 0)
    assert new["batches"] > 1
    assert "host" in printed(*tables.counted([old, new]))


def test_counted_times_as_json_are_all_that_is_printed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(counting, "NETWORKS", {"mobilenetv2": counting.NETWORKS["mobilenetv2"]})
    monkeypatch.setattr(counting, "CARDS", (H200,))
    assert main(["gpu", "--model", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["counted"]
    assert [(row["device"], row["design"]) for row in rows] == [("H200", "before"), ("H200", "after")]
    assert all({"network", "total_ms", "dominated_by"} <= row.keys() for row in rows)
    assert main(["gpu", "--model", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "mobilenetv2, ms, by count: not measured" in " ".join(said.split())


# -- targets -----------------------------------------------------------------------------------------


def median(value):
    return {"median": value, "low": value, "high": value}


def ratios(value):
    return dict.fromkeys(measurements.STEP_CASES[1:], median(value))


STEP_ROW = {
    "network": "resnet50",
    "parameters": 25_557_032,
    "device_seconds": dict.fromkeys((*measurements.STEP_CASES, "copy"), median(2e-4)),
    "queued": dict.fromkeys((*measurements.STEP_CASES, "copy"), True) | {"sgd-per-layer": False},
    "bytes_per_second": 2.5e12,
    "of_copy": median(0.93),
    "device_ratio_to": ratios(0.9),
    "wall_ratio_to": ratios(0.05),
}


def epoch_end_row(network, weights, ms, mib=200):
    return {
        "network": network,
        "weights": weights,
        "device_seconds": median(ms / 1e3),
        "host_seconds": 1e-3,
        "queued": True,
        "extra_bytes": mib * 2**20,
        "stages": {"fp32 Gram": 30, "fp64 Gram": 1, "SVD": 0},
    }


RESULT = {
    "step": {"rows": [STEP_ROW, {"network": "resnet101", "error": "OutOfMemoryError: [12 GiB]"}]},
    "epoch-end": {
        "rows": [
            epoch_end_row("resnet18", "initial", 2.0),
            epoch_end_row("resnet18", "trained-like", 4.0),
            epoch_end_row("resnet50", "initial", 30.0),
            epoch_end_row("resnet50", "trained-like", 15.0),
            epoch_end_row("resnet101", "initial", 30.0, mib=257),
            epoch_end_row("resnet101", "trained-like", 30.0),
            epoch_end_row("vit-b16", "initial", 10.0),  # and no time for the others
            {"network": "resnet18", "weights": "trained-like", "peer": "rmsgd-1.0.2", "seconds": 2.0},
            {"network": "resnet50", "weights": "trained-like", "peer": "rmsgd-1.0.2", "absent": "no network"},
        ]
    },
    "epoch-time": {
        "rows": [
            {"optimizer": "rmsgd", "epoch": median(5.0), "ratio": median(1.005)},
            {"optimizer": "sam", "absent": "not installed"},
        ]
    },
}


def test_every_target_is_judged_by_what_was_measured():
    judged = {t.name: t for t in targets.judge(RESULT)}
    expected = {
        "step, resnet50: of a copy's bandwidth": (0.93, True),
        "step, resnet50: device time / fused SGD": (0.9, True),
        "step, resnet50: times faster than a group per layer": (20.0, True),
        "step, resnet101: of a copy's bandwidth": (None, None),
        "epoch end, resnet18: ms": (4.0, True),  # the slower of both kinds of weights
        "epoch end, resnet50: ms": (30.0, False),
        "epoch end, vit-b16: ms": (None, None),
        "epoch end, resnet18: times faster than rmsgd-1.0.2": (500.0, True),
        "epoch end, resnet50: times faster than rmsgd-1.0.2": (None, None),
        "epoch end, resnet101: extra MiB": (257.0, False),
        "epoch, resnet18, batch 128: time / SGD": (1.005, True),
    }
    for name, (measured, met) in expected.items():
        assert judged[name].met is met, name
        assert judged[name].measured == (None if measured is None else pytest.approx(measured)), name


def test_without_any_figure_no_target_is_met_or_missed():
    judged = targets.judge({"step": {"skipped": "no time was left"}})
    assert len(judged) == 16
    assert all(t.measured is None and t.met is None for t in judged)


def test_the_tables_show_rows_reasons_and_targets():
    said = printed(*tables.tables(RESULT), tables.targets(targets.judge(RESULT)))
    assert "OutOfMemoryError: [12 GiB]" in said
    assert "0.900*" in said  # one group per layer: the queue was too short
    assert "no network" in said
    lines = {line.split("  ")[0].strip(): line for line in said.splitlines()}
    assert lines["epoch end, resnet18: ms"].split()[-1] == "yes"
    assert lines["epoch end, resnet50: ms"].split()[-1] == "NO"
    assert "not measured" in lines["epoch end, vit-b16: ms"]


# -- clocks ------------------------------------------------------------------------------------------


class Event:
    """An event of a device that is busy until the host has queued everything, or is not."""

    reached = False

    def __init__(self, **_):
        pass

    def record(self):
        pass

    def query(self):
        return self.reached

    def elapsed_time(self, end):
        return 3.0


@pytest.fixture
def slept(monkeypatch):
    """The cycles of every sleep, on a device whose clock stands still."""
    cycles = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", cycles.append)
    monkeypatch.setattr(clocks, "cycles_per_second", lambda: 1e9)
    return cycles


def test_a_case_that_is_slow_to_queue_is_called_once_behind_a_sleep_that_is_long_enough(slept, monkeypatch):
    clock, calls = Clock(), {"quick": 0, "slow": 0}
    monkeypatch.setattr(clocks, "time", clock)

    def quick():
        calls["quick"] += 1

    def slow():
        calls["slow"] += 1
        clock.sleep(0.02)

    times = clocks.interleaved({"quick": quick, "slow": slow}, rounds=2)
    # Once for what is done once, then twice per timing: alone, and behind the sleep.
    assert calls == {"quick": 3 + 2 * 2 * clocks.MOST_CALLS, "slow": 3 + 2 * 2 * 1}
    assert all(t.queued for found in times.values() for t in found)
    assert clocks.host_seconds(times["slow"]) == pytest.approx(0.02)
    assert max(slept) >= 2 * 0.02 * 1e9


def test_a_device_that_did_not_wait_for_the_host_is_noticed(slept, monkeypatch):
    monkeypatch.setattr(Event, "reached", True)
    found = clocks.device_time(lambda: None, 3)
    assert not found.queued
    assert found.device == pytest.approx(1e-3)
