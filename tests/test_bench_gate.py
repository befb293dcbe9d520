"""`python -m bench gate` decides, counts, and refuses as it says, with the error rate that it promises."""

import ast
import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from clock import Clock
from rich.console import Console

import rmsgd
from bench import measure
from bench.__main__ import main
from bench.gate import baseline as baselines
from bench.gate import callgrind, cases, command, counts, figures, trial
from bench.gate.baseline import Baseline
from bench.gate.figures import FIGURES, OF_CONTROLS, Finding, Session, against, here_over
from bench.gate.processes import ROOT, GateError, Worker
from bench.gate.rule import BATCHES, LEAST, LOOKS, Verdict, interval, judge
from rmsgd import backends
from rmsgd.backends import Status

pytest.importorskip("rmsgd._cpu", reason="the compiled core was not built")

ROUNDS = 320


@pytest.fixture(autouse=True)
def _simulated_clock(request, monkeypatch):
    """Simulate a clock on which a round takes a millisecond; only slow tests read the real clock."""
    if "slow" not in request.keywords:
        monkeypatch.setattr(figures, "time", Clock(tick=0.001))
        monkeypatch.setattr(trial, "time", Clock())


def independent(random, n):
    return 0.1 * random.standard_normal(n)


def heavy_tailed(random, n):
    return 0.06 * random.standard_t(1.5, n)


def in_bursts(random, n):
    """The noise of a neighbour that comes and goes: it is there a third of the time, for ten rounds each."""
    busy = np.repeat(random.random(n // 10 + 1) < 0.3, 10)[:n]
    return random.standard_normal(n) * np.where(busy, 0.3, 0.06)


def correlated(random, n):
    shocks, noise = 0.06 * random.standard_normal(n), np.zeros(n)
    for i in range(1, n):
        noise[i] = 0.5 * noise[i - 1] + shocks[i]
    return noise


NOISES = [independent, heavy_tailed, in_bursts, correlated]


def verdict_of_a_run(noise, true_ratio, random):
    """The first verdict on a figure whose limit is 5 % above 1."""
    logs = math.log(true_ratio) + noise(random, ROUNDS)
    for look in range(1, LOOKS + 1):
        verdict = judge(interval(logs[: ROUNDS * look // LOOKS]), 1.05)
        if verdict is not Verdict.UNDECIDED:
            break
    return verdict


def verdicts(noise, true_ratio, runs=120):
    random = np.random.default_rng(7)
    return [verdict_of_a_run(noise, true_ratio, random) for _ in range(runs)]


@pytest.mark.parametrize("noise", NOISES)
def test_unchanged_code_is_not_called_slower(noise):
    found = verdicts(noise, 1.0)
    assert found.count(Verdict.SLOWER) == 0
    assert found.count(Verdict.PASSED) >= 0.95 * len(found)


@pytest.mark.parametrize("noise", NOISES)
def test_a_slow_down_of_ten_per_cent_is_caught(noise):
    found = verdicts(noise, 1.1)
    assert found.count(Verdict.PASSED) == 0
    assert found.count(Verdict.SLOWER) >= 0.95 * len(found)


@pytest.mark.parametrize("noise", NOISES)
def test_a_figure_at_its_limit_is_rarely_called_either_way(noise):
    found = verdicts(noise, 1.05, runs=200)
    assert found.count(Verdict.UNDECIDED) >= 0.95 * len(found)


def test_rounds_that_resemble_each_other_count_for_less():
    random = np.random.default_rng(0)
    alone, alike = 0.1 * random.standard_normal(400), np.repeat(0.1 * random.standard_normal(40), 10)
    narrow, wide = interval(alone), interval(alike)
    assert math.log(wide.high / wide.low) > 2 * math.log(narrow.high / narrow.low)


def test_a_few_rounds_say_nothing():
    few, enough = [math.log(3)] * (LEAST * BATCHES - 1), [math.log(3)] * (LEAST * BATCHES)
    assert interval(few) == pytest.approx((3.0, 0.0, math.inf))
    assert judge(interval(few), 1.05) is Verdict.UNDECIDED
    assert interval(enough) == pytest.approx((3.0, 3.0, 3.0))
    assert judge(interval(enough), 1.05) is Verdict.SLOWER


def test_rounds_that_were_disturbed_do_not_move_the_figure():
    logs = 0.01 * np.random.default_rng(0).standard_normal(400)
    disturbed = np.where(np.arange(400) % 10 == 0, 3.0, logs)
    assert interval(disturbed).median == pytest.approx(interval(logs).median, rel=0.005)


class SyntheticTimer:
    """Gives the time of each case, with seeded noise."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.random = np.random.default_rng(1)
        self.asked = []

    def time(self, case):
        self.asked.append(case)
        return self.seconds[case] * math.exp(0.05 * self.random.standard_normal())


def session(seconds, limits):
    figures = [here_over(name, name, name, f"{name}-control", 0.05) for name in limits]
    findings = [Finding(figure, 1.0, limits[figure.name]) for figure in figures]
    timer = SyntheticTimer(seconds)
    return Session({"here": timer}, findings), timer


def test_a_session_ends_when_every_figure_is_decided():
    run, timer = session({"a": 1.0, "a-control": 1.0, "b": 1.3, "b-control": 1.0}, {"a": 1.05, "b": 1.05})
    run.run(1.0)
    assert [finding.verdict for finding in run.findings] == [Verdict.PASSED, Verdict.SLOWER]
    assert run.findings[1].change == pytest.approx(0.3, abs=0.05)
    assert timer.asked.count("a") == timer.asked.count("a-control") == 2 * len(run.findings[0].logs)


def test_a_baseline_has_a_figure_however_little_time_there_is():
    timed, _ = session({"a": 1.1, "a-control": 1.0}, {"a": math.inf})
    timed.collect(0.0)
    assert timed.findings[0].measured.median == pytest.approx(1.1, rel=0.2)


def test_a_decided_figure_is_not_timed_further():
    run, timer = session({"a": 1.0, "a-control": 1.0, "b": 1.05, "b-control": 1.0}, {"a": 2.0, "b": 1.05})
    run.run(0.4)
    assert run.findings[0].verdict is Verdict.PASSED
    assert timer.asked.count("a") < timer.asked.count("b")


def test_a_round_times_there_and_back_and_begins_with_either():
    run, timer = session({"a": 1.0, "a-control": 1.0}, {"a": 1.0})
    run.run(0.05)
    rounds = {tuple(timer.asked[i : i + 4]) for i in range(0, len(timer.asked), 4)}
    assert rounds == {("a", "a-control", "a-control", "a"), ("a-control", "a", "a", "a-control")}


class DriftingTimer:
    """Gives times that all grow steadily."""

    now = 1.0

    def time(self, case):
        self.now += 0.1
        return self.now * {"a": 3.0, "a-control": 2.0}[case]


def test_what_slows_a_case_and_its_control_alike_cancels():
    finding = Finding(here_over("a", "a", "a", "a-control", 0.05), 1.0, 1.05)
    Session({"here": DriftingTimer()}, [finding]).collect(0.05)
    assert finding.logs == pytest.approx([math.log(1.5)] * len(finding.logs))


def test_another_revision_is_compared_by_both_controls():
    """A process with an unfavourable layout of memory is slow in a case and in its control."""
    finding = Finding(against(here_over("a", "a", "a", "a-control", 0.05)), 1.0, 1.05)
    timers = {
        "here": SyntheticTimer({"a": 1.2 * 1.3, "a-control": 1.0 * 1.3}),
        "there": SyntheticTimer({"a": 1.0, "a-control": 1.0}),
    }
    Session(timers, [finding]).run(0.5)
    assert finding.verdict is Verdict.SLOWER
    assert finding.measured.median == pytest.approx(1.2, rel=0.03)


# -- the baseline ------------------------------------------------------------------------------------


def stored(**changes):
    machine = command.describe(1)
    figures = {figure.name: {"ratio": 1.0, "tolerance": 0.05} for figure in FIGURES + OF_CONTROLS}
    return Baseline({**machine, **changes.pop("machine", {})}, figures, changes.pop("counts", {}))


def written(path, **changes):
    baselines.save(path, stored(**changes))
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))
    return path


def test_a_baseline_comes_back_as_it_was_written(tmp_path):
    path = written(tmp_path / "baseline.json")
    loaded = baselines.load(path, command.describe(1), 1)
    assert loaded == stored()
    assert loaded.differences(command.describe(1)) == []
    assert loaded.limit("step", elsewhere=False) == pytest.approx(1.05)


def test_another_machine_is_named_and_judged_more_leniently():
    other = stored(machine={"cpu": "another CPU"})
    assert other.differences(command.describe(1))[0].endswith("another CPU there")
    assert other.limit("step", elsewhere=True) == pytest.approx(1.25)


def test_the_tolerance_follows_the_spread_of_processes():
    calm, torn = [1.0, 1.002, 0.998], [1.0, 1.25, 0.8]
    assert command.expectation(calm, 0.05) == {"ratio": 1.0, "tolerance": 0.05, "processes": calm}
    assert command.expectation(torn, 0.05)["ratio"] == pytest.approx(1.0)
    assert command.expectation(torn, 0.05)["tolerance"] > 0.5


def test_a_process_that_was_disturbed_does_not_move_the_baseline():
    found = command.expectation([1.0, 1.002, 0.998, 1.001, 1.3], 0.05)
    assert found["ratio"] == pytest.approx(1.001)
    assert found["tolerance"] == 0.05


def test_counts_are_compared_exactly_and_only_where_they_mean_something():
    known = stored(counts={"spectra per epoch end, cpu": 59, "instructions of 3 steps": 100, "gone": 1})
    found = {"spectra per epoch end, cpu": 60, "instructions of 3 steps": 90, "new": 1}
    rows = {row["name"]: row["verdict"] for row in command.compared(found, known, known.machine)}
    assert rows == {
        "spectra per epoch end, cpu": "more",
        "instructions of 3 steps": "fewer",
        "gone": "not counted here",
        "new": "not counted in the baseline",
    }
    elsewhere = {**known.machine, "compiler": "another"}
    rows = {row["name"]: row["verdict"] for row in command.compared(found, known, elsewhere)}
    assert rows["instructions of 3 steps"].startswith("not compared: compiler another here")
    assert rows["spectra per epoch end, cpu"] == "more"


@pytest.mark.parametrize(
    ("there", "here", "advised"),
    [("avx2", "avx512", True), ("avx512", "avx2", False), ("avx2", "none (torch)", False)],
)
def test_other_kernels_are_advised_only_where_the_processor_has_them(tmp_path, there, here, advised):
    path = written(tmp_path / "baseline.json", machine={**command.describe(1), "isa": there})
    with pytest.raises(GateError, match="was taken with") as refusal:
        baselines.load(path, {**command.describe(1), "isa": here}, 1)
    assert (f"RMSGD_ISA={there} forces the same" in str(refusal.value)) == advised


# -- the command -------------------------------------------------------------------------------------


class SyntheticWorker(SyntheticTimer):
    """Stands in for a process: every case takes a second, or the time that the test sets."""

    slow: dict[str, float] = {}  # noqa: RUF012 - set by the tests

    def __init__(self, *_, **__):
        super().__init__({})

    def time(self, case):
        return self.slow.get(case, 1.0) * math.exp(0.02 * self.random.standard_normal())

    def count(self):
        return {"spectra per epoch end, cpu": 59}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def gate(monkeypatch, tmp_path):
    """Runs the command with synthetic times, against a baseline that expects every ratio as usual."""
    monkeypatch.setattr(command, "Worker", SyntheticWorker)
    monkeypatch.setattr(SyntheticWorker, "slow", {})
    path = tmp_path / "baseline.json"
    assert command.main(["--baseline", str(path), "--update", "--seconds", "0.1", "--no-counts"]) == 0
    return lambda *flags: main(["gate", "--baseline", str(path), "--seconds", "0.5", "--no-counts", *flags])


def test_nothing_slower_is_status_0(gate, capsys):
    assert gate() == 0
    assert "nothing got slower" in capsys.readouterr().out


def test_a_slower_step_is_status_1_and_named_with_its_size(gate, capsys):
    SyntheticWorker.slow = {"step": 1.6}
    assert gate("--json") == 1
    result = json.loads(capsys.readouterr().out)
    assert result["exit"] == 1
    assert [reason.split(" takes ")[0] for reason in result["reasons"]] == [
        "step, resnet18 / fused SGD",
        "step, resnet18 / copy",
    ]
    assert all("more than expected (limit " in reason for reason in result["reasons"])
    assert result["figures"][0]["ratio"]["median"] == pytest.approx(1.6, rel=0.05)


def test_too_little_time_to_decide_is_status_2(gate, capsys):
    assert gate("--seconds", "0.0001") == 2
    assert "undecided" in capsys.readouterr().out


def test_more_spectra_are_status_1_whatever_the_clock_says(gate, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(callgrind, "count", lambda *_: {})
    path = tmp_path / "counted.json"
    flags = ["--baseline", str(path), "--seconds", "0.5"]
    assert command.main([*flags, "--update"]) == 0
    assert command.main(flags) == 0
    monkeypatch.setattr(SyntheticWorker, "count", lambda _: {"spectra per epoch end, cpu": 60})
    assert command.main(flags) == 1
    assert "spectra per epoch end, cpu: 60, 59 expected" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "another/1"}, "has schema 'another/1', this gate reads 'rmsgd-bench-gate/1'"),
        ({"machine": {"isa": "avx7"}}, "was taken with the avx7 kernels"),
        ({"machine": {"isa": "same", "threads": 3}}, "was taken with 3 threads, this run has 1"),
    ],
)
def test_a_baseline_that_says_nothing_here_is_status_2(tmp_path, capsys, changes, message):
    if "machine" in changes:
        same = command.describe(1)
        changed = {key: same[key] if value == "same" else value for key, value in changes["machine"].items()}
        changes = {"machine": {**same, **changed}}
    path = written(tmp_path / "baseline.json", **changes)
    assert main(["gate", "--baseline", str(path)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "lost", ["machine", "figures", "counts", "tolerance_elsewhere", "machine.isa", "figures.step.tolerance"]
)
def test_a_baseline_that_lacks_something_is_status_2_and_says_what(tmp_path, capsys, lost):
    path = written(tmp_path / "baseline.json")
    content = json.loads(path.read_text())
    *places, key = lost.split(".")
    entry = content
    for place in places:
        entry = entry[place]
    del entry[key]
    path.write_text(json.dumps(content))
    assert main(["gate", "--baseline", str(path)]) == 2
    assert f"has no {lost}" in " ".join(capsys.readouterr().err.split())


def test_the_default_baseline_is_the_checkouts_wherever_the_command_is_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.BASELINE.is_file()


def test_a_missing_baseline_is_status_2_and_says_how_to_get_one(tmp_path, capsys):
    assert main(["gate", "--baseline", str(tmp_path / "none.json"), "--json"]) == 2
    result = json.loads(capsys.readouterr().out)
    assert result["exit"] == 2
    assert "write one with --update" in result["reasons"][0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seconds", "0"], "expected a number above 0"),
        (["--limit", "fast"], "expected a number above 0"),
        (["--update", "--against", "HEAD"], "exclude each other"),
        (["--readme", "README.md"], "--readme: the table is that of --self-test N"),
        (["--self-test", "1", "--target", "their:step"], "--self-test runs the gate as it is"),
        (["--json", "--update"], "--json prints a judgement"),
        (["--json", "--self-test", "1"], "--json prints a judgement"),
        (["--limit", "1.2"], "--limit is for --target without a baseline"),
        (["--limit", "1.2", "--target", "a:b", "--baseline", "c.json"], "--limit is for --target without"),
        (["--baseline", "c.json", "--against", "HEAD"], "--baseline and --against exclude each other"),
        (["--target", "their_training"], "expected module:function, got 'their_training'"),
    ],
)
def test_bad_arguments_are_status_2(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["gate", *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def without_core(monkeypatch):
    """Pretend that the core of this checkout was not built."""
    monkeypatch.delenv("RMSGD_BACKEND", raising=False)
    monkeypatch.setitem(sys.modules, "rmsgd._cpu", None)
    monkeypatch.delattr(rmsgd, "_cpu", raising=False)
    backends.forget_loaded()
    yield
    backends.forget_loaded()


@pytest.mark.usefixtures("without_core")
@pytest.mark.parametrize(
    "flags",
    [
        ["--target", "their_training:training_step"],
        [],
        ["--update"],
        ["--against", "HEAD"],
        ["--self-test", "1"],
    ],
    ids=" ".join,
)
def test_a_checkout_whose_core_was_not_built_is_refused_in_one_line(tmp_path, capsys, flags):
    if "--update" in flags:
        flags = [*flags, "--baseline", str(tmp_path / "new.json")]
    assert main(["gate", *flags, "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the compiled core does not run here" in line
    assert f"build it with {sys.executable} -m pip install -e {ROOT}" in line
    assert list(tmp_path.iterdir()) == []


def test_a_core_that_cannot_run_here_is_refused_and_not_to_be_built(monkeypatch, capsys):
    reason = "RMSGD_ISA=avx1024: choose baseline"
    monkeypatch.setattr(command.backends, "statuses", lambda *_: [Status("native", "cpu", False, reason)])
    assert main(["gate"]) == 2
    said = capsys.readouterr().err
    assert reason in said
    assert "pip install" not in said


def test_a_fallback_that_is_asked_for_is_judged(monkeypatch):
    monkeypatch.setenv("RMSGD_BACKEND", "torch")
    command.check_core()
    assert command.describe(1)["isa"] == "none (torch)"


@pytest.mark.parametrize("width", [30, 40, 60, 80])
def test_no_word_of_a_table_is_lost_on_a_narrow_terminal(width):
    report = command.Report({}, [Finding(figure, 1.0, 1.05, [0.0]) for figure in FIGURES + OF_CONTROLS])
    report.counts = [{"name": "spectra redone by SVD", "here": 123456, "expected": None, "verdict": "more"}]
    console = Console(width=width, file=io.StringIO())
    command.show(report, console)
    said = console.file.getvalue()
    assert "…" not in said
    for finding in report.findings:
        assert set(finding.figure.text.split()) <= set(said.split())
    assert {"redone", "SVD", "123456", "more", "undecided", "1.050"} <= set(said.split())


def test_an_unknown_revision_is_status_2(capsys):
    assert main(["gate", "--against", "no-such-revision"]) == 2
    assert "no-such-revision" in capsys.readouterr().err


def test_another_revision_without_git_is_status_2(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["gate", "--against", "HEAD"]) == 2
    assert "git is not installed" in capsys.readouterr().err


# -- real cases --------------------------------------------------------------------------------------

TARGET = """
import torch

def training_step(make_optimizer):
    layer = torch.nn.Linear(64, 64)
    optimizer = make_optimizer(layer.named_parameters(), lr=0.01, beta=0.9)
    inputs = torch.ones(8, 64)

    def step():
        optimizer.zero_grad()
        layer(inputs).square().mean().backward()
        optimizer.step()

    return step

def nothing(make_optimizer):
    return None
"""


@pytest.fixture
def their_project(monkeypatch, tmp_path):
    """A module of the user's, in a place where the gate's processes find it."""
    (tmp_path / "their_training.py").write_text(TARGET)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return ["--target"]


def test_a_step_of_the_callers_own_and_the_same_with_sgd_are_timed(their_project):
    with Worker(ROOT, 1, "their_training:training_step") as worker:
        assert worker.time("target") > 0
        assert worker.time("target-sgd") > 0


@pytest.mark.parametrize(
    ("seconds", "flags", "status"), [(1.0, [], 0), (1.3, [], 1), (1.3, ["--limit", "2"], 0)]
)
def test_a_step_of_the_callers_own_is_held_against_sgd(monkeypatch, capsys, seconds, flags, status):
    monkeypatch.setattr(command, "Worker", SyntheticWorker)
    monkeypatch.setattr(SyntheticWorker, "slow", {"target": seconds})
    assert command.main(["--target", "their_training:training_step", "--json", *flags]) == status
    (figure,) = json.loads(capsys.readouterr().out)["figures"]
    assert figure["limit"] == (2 if flags else command.LIMIT)
    assert figure["ratio"]["median"] == pytest.approx(seconds, rel=0.05)
    assert figure["rounds"] >= LEAST * BATCHES


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_module:step", "expected module:function (No module named 'no_such_module')"),
        ("their_training:nothing", "the function has to return a step"),
    ],
)
def test_a_target_that_is_none_is_status_2(their_project, capsys, target, message):
    assert command.main([*their_project, target]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_step_and_its_control_share_their_tensors(monkeypatch):
    made = []

    def remembered(make):
        return lambda *given, **settings: made.append(make(*given, **settings)) or made[-1]

    monkeypatch.setattr(cases.rmsgd, "RMSGD", remembered(rmsgd.RMSGD))
    monkeypatch.setattr(cases, "sgd", remembered(cases.sgd))
    cases.steps("resnet14-digits")
    ours, theirs = made
    for p in ours.param_groups[0]["params"]:
        assert theirs.state[p]["momentum_buffer"] is ours.state[p]["velocity"]


def test_the_switch_slows_a_case_by_the_share_it_names(monkeypatch):
    monkeypatch.setenv(cases.SLOWER, "step:0.1,epoch-end:0.5")
    assert cases.slowed() == {"step": 0.1, "epoch-end": 0.5}
    clock = Clock(tick=0.25)
    monkeypatch.setattr(cases, "time", clock)
    cases.slower(lambda: clock.sleep(0.75), 0.5)()
    assert clock.now == 1.75  # 0.25 when it began, 1.25 after the call, until 0.5 later


def test_counts_are_the_same_every_time_and_those_of_the_network():
    found = counts.count()
    assert found == counts.count()
    assert found["spectra per epoch end, cpu"] == 59  # as many as `bench speed` lists
    assert found["spectra redone by fp64 Gram, cpu"] < 59
    assert found["spectra redone by SVD, cpu"] == 0
    assert found["allocations per step, cpu"] == 0


def test_inclusive_costs_are_read_from_calls():
    lines = ["fn=(1) main\n", "1 5\n", "cfn=(2) step\n", "calls=3 9\n", "* 300\n", "fn=(2)\n", "1 90\n"]
    lines += [
        "cfn=(3) inner\n",
        "calls=1 4\n",
        "* 10\n",
        "fn=(4) other\n",
        "cfn=(2)\n",
        "calls=1 9\n",
        "* 7\n",
    ]
    assert callgrind.inclusive_costs(lines) == {"step": 307, "inner": 10}


def test_a_lambda_is_not_counted_beside_the_function_that_calls_it():
    costs = {"rmsgd::measure(int)": 30, "rmsgd::measure(int)::{lambda(int)#1}::operator()": 20, "other": 5}
    assert callgrind.instructions_of("rmsgd::measure(", costs) == 30


def test_want_of_valgrind_or_of_a_core_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(callgrind.CallgrindError, match="valgrind is not installed"):
        callgrind.count(ROOT, "avx2")
    monkeypatch.setattr(shutil, "which", lambda name: name)
    with pytest.raises(callgrind.CallgrindError, match="not built"):
        callgrind.count(tmp_path, "avx2")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="no valgrind")
def test_instructions_are_exact():
    assert callgrind.count(ROOT, "avx2") == callgrind.count(ROOT, "avx2")


@pytest.mark.slow
def test_a_real_run_catches_a_step_that_takes_half_as_long_again(monkeypatch, tmp_path):
    path = tmp_path / "baseline.json"
    flags = ["--baseline", str(path), "--no-counts"]
    assert command.main([*flags, "--update", "--seconds", "4"]) == 0
    assert command.main(flags) != 1
    monkeypatch.setenv(cases.SLOWER, "step:0.5")
    assert command.main(flags) == 1


@pytest.mark.slow
def test_a_revision_is_built_and_held_against_this_one(capsys):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    assert command.main(["--against", "HEAD", "--no-counts", "--json"]) != 1
    result = json.loads(capsys.readouterr().out)
    assert {figure["name"] for figure in result["figures"]} == {"step", "step-many-tensors", "epoch-end"}
    assert not list(Path(ROOT).glob(".git/worktrees/there*"))


FILES = """
import sys
import bench.gate.cases, bench.gate.counts
for name, module in sys.modules.items():
    if name.split(".")[0] == "bench" and module.__file__:
        print(module.__file__)
"""


def test_a_process_asks_another_revision_only_for_what_old_ones_have_too():
    files = subprocess.check_output([sys.executable, "-c", FILES], cwd=ROOT, text=True).splitlines()
    found = set()
    for file in files:
        for node in ast.parse(Path(file).read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module)
            elif isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
    of_rmsgd = {name for name in found if name.split(".")[0] == "rmsgd"}
    assert of_rmsgd == {"rmsgd", "rmsgd.backends.base", "rmsgd.layers"}


def test_a_process_that_fails_says_why(tmp_path):
    with pytest.raises(GateError, match="rmsgd"):
        Worker(tmp_path, 1)


def test_a_checkout_is_timed_through_a_symbolic_link_too(their_project, tmp_path):
    (tmp_path / "link").symlink_to(ROOT)
    Worker(tmp_path / "link", 1, "their_training:training_step").close()


@pytest.fixture
def self_test(monkeypatch, tmp_path):
    """Runs the self-test with synthetic runs: a slowed step is caught, a slowed epoch end is missed."""
    path = written(tmp_path / "baseline.json")
    done = []

    def run_of_the_command(*flags, slowed):
        done.append((slowed, flags))
        return (1 if slowed.startswith("step") else 0), json.dumps({"reasons": []})

    monkeypatch.setattr(trial, "gate", run_of_the_command)
    flags = ["gate", "--baseline", str(path), "--out", str(tmp_path)]
    return (lambda *more: main([*flags, *more])), done


def test_the_self_test_knows_what_is_right(self_test, tmp_path):
    run, _ = self_test
    page = tmp_path / "README.md"
    page.write_text("<!-- measured: gate -->\n<!-- /measured -->\n")
    assert run("--self-test", "2", "--readme", str(page)) == 1  # the slowed epoch end was missed
    record = json.loads((tmp_path / "gate.json").read_text())
    assert [(row["kind"], row["passed"], row["slower"]) for row in record["gate"]] == [
        ("unchanged", 2, 0),
        ("step slowed", 0, 2),
        ("epoch end slowed", 2, 0),
    ]
    assert [run["right"] for run in record["runs"][:3]] == [True, True, False]
    assert "| step slowed | 2 | 0 | 2 | 0 |" in page.read_text()


def test_a_run_of_the_self_test_may_take_as_long_as_it_may_measure_and_a_little_more(self_test, monkeypatch):
    for seconds, right in ((84.0, True), (86.0, False)):
        monkeypatch.setattr(trial, "time", Clock(tick=seconds))
        assert trial.one("unchanged", trial.Settings(Path("b.json"), 1, 60.0))["right"] is right


def test_the_self_test_passes_its_settings_on(self_test, tmp_path):
    run, done = self_test
    run("--self-test", "1", "--seconds", "7")
    for _, flags in done:
        assert " ".join(flags).endswith("--threads 1 --seconds 7.0 --json --no-counts")


def test_an_interrupted_self_test_goes_on_where_it_ended(self_test, monkeypatch, tmp_path, capsys):
    run, done = self_test
    undisturbed = trial.gate

    def interrupted(*flags, slowed):
        if len(done) == 4:
            raise KeyboardInterrupt
        return undisturbed(*flags, slowed=slowed)

    monkeypatch.setattr(trial, "gate", interrupted)
    assert run("--self-test", "2") == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "gate.json").exists()
    monkeypatch.setattr(trial, "gate", undisturbed)
    assert run("--self-test", "2") == 1
    assert "going on after 4 of 6 runs" in " ".join(capsys.readouterr().out.split())
    assert len(done) == 6
    assert len(json.loads((tmp_path / "gate.json").read_text())["runs"]) == 6
    assert not (tmp_path / "gate-unfinished.json").exists()


@pytest.mark.parametrize(("ended", "asked"), [(6, 2), (4, 1)])
def test_a_self_test_that_was_stopped_with_nothing_left_to_run_is_finished(
    self_test, monkeypatch, tmp_path, ended, asked
):
    run, done = self_test
    undisturbed = trial.gate

    def stopped(*flags, slowed):
        if len(done) == ended:
            raise KeyboardInterrupt
        return undisturbed(*flags, slowed=slowed)

    monkeypatch.setattr(trial, "gate", stopped)
    assert run("--self-test", "3") == 130
    page = tmp_path / "README.md"
    page.write_text("<!-- measured: gate -->\n<!-- /measured -->\n")
    assert run("--self-test", str(asked), "--readme", str(page)) == 1
    assert len(done) == ended
    record = json.loads((tmp_path / "gate.json").read_text())
    assert [row["runs"] for row in record["gate"]] == [asked] * 3
    assert len(record["runs"]) == 3 * asked
    assert f"| step slowed | {asked} | 0 | {asked} | 0 |" in page.read_text()
    assert not (tmp_path / "gate-unfinished.json").exists()


def test_an_unfinished_self_test_against_another_baseline_begins_anew(self_test, tmp_path):
    run, done = self_test
    measure.write_json(tmp_path / "gate-unfinished.json", {"schema": trial.SCHEMA, "runs": [{}] * 3})
    run("--self-test", "1")
    assert len(done) == 3


def test_a_self_test_without_a_baseline_is_status_2(tmp_path, capsys):
    assert main(["gate", "--self-test", "1", "--baseline", str(tmp_path / "none.json")]) == 2
    assert "there is no baseline" in " ".join(capsys.readouterr().err.split())
