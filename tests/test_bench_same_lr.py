"""The comparison of RMSGD's defaults with SGD at the same learning rate."""

import itertools
import json
from functools import partial

import pytest
import torch
from torch import nn

import rmsgd
from bench.__main__ import main
from bench.data.split import Split
from bench.locks import locked
from bench.same_lr import command, images, language, outcomes, training
from bench.same_lr.command import OPTIMIZERS


def test_the_rmsgd_that_is_compared_is_the_one_of_the_defaults():
    model = nn.Linear(3, 2)
    compared, plain = OPTIMIZERS["rmsgd"](model, 0.03), rmsgd.RMSGD(model.named_parameters())
    assert compared.state_dict()["param_groups"] == plain.state_dict()["param_groups"]


def test_both_optimizers_begin_with_the_same_weights_and_see_the_same_batches(monkeypatch):
    seen = {}

    def watched(model, optimizer, lr, batches, **given):
        drawn = list(itertools.islice(batches, 2))
        key = type(optimizer).__name__
        seen.setdefault(key, []).append([*(p.detach().clone() for p in model.parameters()), *drawn[0]])
        return training.train(model, optimizer, lr, drawn, **{**given, "steps": 2})

    monkeypatch.setattr(images, "train", watched)
    for name in ("sgd", "rmsgd"):
        images.teacher(2, 3, OPTIMIZERS[name])
    assert all(map(torch.equal, seen["SGD"][0], seen["RMSGD"][0]))


def test_a_gpt_is_measured_as_often_as_is_asked(monkeypatch):
    monkeypatch.setattr(language, "corpus", lambda part: torch.arange(4000) % 90)
    made = []

    def make(model, lr):
        made.append(OPTIMIZERS["rmsgd"](model, lr))
        return made[-1]

    model = nn.Sequential(nn.Embedding(128, 8), nn.Linear(8, 128))
    found = language._fit(model, "library", make, 0.1, 0, steps=20, measurements=5)
    assert made[0].state_dict()["state"][0]["epoch"] == 5
    assert found.loss > 0
    assert 0 <= found.accuracy <= 1


def test_a_run_counts_as_the_mean_over_the_last_half_of_its_epochs(monkeypatch):
    # One weight, whose loss says how many steps have been taken.
    model = nn.Linear(1, 2, bias=False)
    evaluated = iter(range(100))
    monkeypatch.setattr(training, "evaluate", lambda model, split: (float(next(evaluated)), step["taken"]))
    step = {"taken": 0}

    class Counting(torch.optim.SGD):
        def step(self):
            step["taken"] += 1

    x, y = torch.ones(3, 1), torch.zeros(3, dtype=torch.int64)
    found = training.train(
        model,
        Counting(model.parameters()),
        0.1,
        itertools.repeat((x, y)),
        steps=80,
        measure_every=10,
        training=Split(x, y),
        held_out=Split(x, y),
    )
    assert step["taken"] == 80
    assert found.accuracy == (50 + 60 + 70 + 80) / 4
    assert found.last_accuracy == 80
    # Training and held-out data are evaluated in turn.
    assert (found.loss, found.last_loss) == ((0 + 2 + 4 + 6) / 4, 6)


def test_evaluation_is_over_every_sample():
    x = torch.eye(4).repeat(300, 1)
    y = torch.arange(4).repeat(300)
    y[:3] = 3
    loss, accuracy = training.evaluate(nn.Identity(), Split(x, y))
    assert accuracy == pytest.approx(1197 / 1200)
    assert loss == pytest.approx(float(nn.functional.cross_entropy(x, y)), rel=1e-5)


def test_the_command_writes_every_task_with_differences_paired_by_seed(tmp_path, capsys):
    assert main(["same-lr", "--tasks", "teacher-2", "--seeds", "2", "--out", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "same-lr.json").read_text())["same-lr"]
    ours, sgd = row["runs"]["rmsgd"], row["runs"]["sgd"]
    expected = sum(a - b for a, b in zip(ours["accuracy"], sgd["accuracy"], strict=True)) / 2
    assert row["rmsgd"]["accuracy_difference"][0] == pytest.approx(expected)
    assert row["rmsgd"]["highest"] > 1.0
    assert "teacher-2" in capsys.readouterr().out


def outcome(*_):
    return training.Outcome(0.1, 0.9, 0.1, 0.9, 1.0, 1.0)


def test_a_comparison_that_was_killed_repeats_no_run_that_had_ended(tmp_path, monkeypatch, capsys):
    trained = []

    def run(killed_at, seed, make):
        trained.append(seed)
        if len(trained) == killed_at:
            raise KeyboardInterrupt
        return outcome()

    arguments = ["same-lr", "--tasks", "teacher-2", "--seeds", "3", "--out", str(tmp_path)]
    monkeypatch.setitem(command.TASKS, "teacher-2", command.Task(partial(run, 5)))
    assert main(arguments) == 130
    assert "goes on" in capsys.readouterr().out
    assert not (tmp_path / "same-lr.json").exists()
    assert len(trained) == 5
    monkeypatch.setitem(command.TASKS, "teacher-2", command.Task(partial(run, None)))
    assert main(arguments) == 0
    # Three seeds of RMSGD and SGD, two of the letter, and again the one that was cut off.
    assert len(trained) == 3 + 3 + 2 + 1
    assert main(arguments) == 0
    assert len(trained) == 3 + 3 + 2 + 1
    (row,) = json.loads((tmp_path / "same-lr.json").read_text())["same-lr"]
    assert row["runs"]["sgd"]["accuracy"] == 3 * [0.9]


def test_two_comparisons_do_not_write_to_one_folder(tmp_path, capsys):
    with locked(tmp_path):
        assert main(["same-lr", "--tasks", "teacher-2", "--seeds", "2", "--out", str(tmp_path)]) == 1
    assert "another process" in capsys.readouterr().out


def test_a_file_that_holds_no_runs_is_left_alone_and_named(tmp_path, capsys):
    (tmp_path / outcomes.FILE).write_text('[{"task": 1}]')
    assert main(["same-lr", "--tasks", "teacher-2", "--seeds", "2", "--out", str(tmp_path)]) == 2
    assert outcomes.FILE in capsys.readouterr().err
    assert (tmp_path / outcomes.FILE).read_text() == '[{"task": 1}]'


def test_a_loss_that_is_no_number_is_kept_as_such(tmp_path):
    nan = outcome()._replace(loss=float("nan"))
    outcomes.Outcomes(tmp_path).add(("digits", 0, "sgd"), nan)
    found = outcomes.Outcomes(tmp_path)["digits", 0, "sgd"]
    assert found.loss != found.loss
    assert found[1:] == nan[1:]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tasks", "digit"], "digits"),
        (["--seeds", "1"], "at least two"),
        (["--tasks", "cifar10"], "needs --data"),
    ],
)
def test_what_cannot_be_compared_is_refused_at_once(flags, said, tmp_path, capsys):
    try:
        status = main(["same-lr", "--out", str(tmp_path), *flags])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert said in capsys.readouterr().err
