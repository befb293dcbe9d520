"""The comparison of RMSGD's defaults with SGD at the same learning rate."""

import json

import pytest
import torch
from torch import nn

import rmsgd
from bench.__main__ import main
from bench.data.split import Split
from bench.same_lr import images, language, training
from bench.same_lr.command import OPTIMIZERS


def test_the_rmsgd_that_is_compared_is_the_one_of_the_defaults():
    model = nn.Linear(3, 2)
    compared, plain = OPTIMIZERS["rmsgd"](model, 0.03), rmsgd.RMSGD(model.named_parameters())
    assert compared.state_dict()["param_groups"] == plain.state_dict()["param_groups"]


def test_both_optimizers_begin_with_the_same_weights_and_see_the_same_batches(monkeypatch):
    seen = {}

    def watched(model, optimizer, batches, measure_every):
        drawn = list(batches)
        key = type(optimizer).__name__
        seen.setdefault(key, []).append([*(p.detach().clone() for p in model.parameters()), *drawn[0]])
        return training.train(model, optimizer, drawn[:2], measure_every)

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
    found = language._fit(model, "library", make, 0, steps=20, measurements=5)
    assert made[0].state_dict()["state"][0]["epoch"] == 5
    assert found.loss > 0
    assert 0 <= found.accuracy <= 1


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
