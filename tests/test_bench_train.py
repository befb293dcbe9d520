"""`python -m bench train` trains, measures, writes and answers as it says."""

import dataclasses
import io
import json
import math
import subprocess
import sys

import pytest
import torch
from commands import run_bench
from rich.console import Console

from bench import data, plots, training
from bench import train as train_command
from bench.__main__ import COMMANDS, main
from bench.training import Settings

TINY = Settings(optimizers=("sgd", "sam"), seeds=(0,), epochs=2, batch=256, width=0.5)
FLAGS = ["--epochs", "1", "--batch", "512", "--width", "0.5", "--seeds", "0"]


def train(**changes):
    settings = dataclasses.replace(TINY, **changes)
    return settings, training.train(settings)


def run_command(capsys, *arguments):
    return run_bench(capsys, "train", *arguments)


def refusal(capsys, *arguments):
    status, _, err = run_command(capsys, *arguments)
    assert status == 2
    return err


# --- Data


def test_digits_are_split_by_class_and_standardised():
    digits = data.load("digits", "resnet14-digits")
    assert digits.sample == (1, 8, 8)
    assert len(digits.train) + len(digits.test) == 1797
    counts = torch.bincount(digits.test.targets)
    assert counts.min() >= 34
    assert counts.max() <= 38
    assert digits.train.inputs.mean().abs() < 1e-5
    assert abs(digits.train.inputs.std() - 1) < 1e-3


def test_the_split_is_always_the_same():
    first, second = (data.load("digits", "resnet14-digits") for _ in range(2))
    assert torch.equal(first.test.inputs, second.test.inputs)


@pytest.mark.parametrize(("model", "targets"), [("resnet18", (10,)), ("gpt", (10, 256))])
def test_synthetic_samples_are_shaped_for_the_model(model, targets):
    dataset = data.load("synthetic", model, samples=40)
    assert dataset.train.inputs.shape[0] == 40
    assert dataset.test.targets.shape == targets


def test_a_pass_holds_every_sample_at_most_once_and_only_full_batches():
    split = data.Split(torch.arange(10), torch.arange(10))
    batches = data.Batches(split, 3, seed=0)
    seen = [sample.item() for inputs, _ in batches for sample in inputs]
    assert len(batches) == 3
    assert len(seen) == len(set(seen)) == 9


def test_the_order_changes_with_every_pass_and_only_depends_on_the_seed():
    split = data.Split(torch.arange(100), torch.arange(100))

    def passes(seed):
        batches = data.Batches(split, 10, seed)
        return [torch.cat([inputs for inputs, _ in batches]).tolist() for _ in range(2)]

    assert passes(0) == passes(0)
    assert passes(0)[0] != passes(0)[1]
    assert passes(0) != passes(1)


# --- Training


def test_the_same_seed_gives_the_same_result():
    runs = [train(optimizers=("rmsgd", "sgd"))[1] for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        for left, right in zip(first.epochs, second.epochs, strict=True):
            assert dataclasses.replace(left, seconds={}) == dataclasses.replace(right, seconds={})


def test_the_neighbours_of_an_optimizer_do_not_change_its_result():
    small = {"model": "efficientnetb0", "data": "synthetic", "samples": 64, "batch": 16, "width": 0.25}
    _, alone = train(optimizers=("sgd",), **small)
    _, (together, _) = train(optimizers=("sgd", "sam"), **small)
    assert [epoch.train_loss for epoch in alone[0].epochs] == [epoch.train_loss for epoch in together.epochs]


def test_every_optimizer_starts_from_the_same_weights():
    (runs,) = training.prepare(TINY)
    first, second = (list(run._network.parameters()) for run in runs)
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))


def test_epochs_of_the_optimizers_alternate():
    told = []
    training.train(TINY, lambda run: told.append((len(run.epochs), run.optimizer_name)))
    assert [epoch for epoch, _ in told] == [1, 1, 2, 2]
    assert {name for _, name in told[:2]} == {name for _, name in told[2:]} == {"sgd", "sam"}


def test_rmsgd_reports_rates_ranks_and_quality_of_its_layers():
    # Under Algorithm 1 to the letter every rate decays; those of the default stay at lr without a gain.
    _, (run,) = train(optimizers=("rmsgd-paper",))
    first, second = run.epochs
    assert set(first.learning_rates.values()) == {0.03}
    assert set(first.stable_rank) < set(first.learning_rates)
    assert "conv1.weight" in first.stable_rank
    assert all(0 <= rank <= 1 for rank in first.stable_rank.values())
    assert set(second.learning_rates.values()) != {0.03}
    assert second.quality >= 0


def test_the_rates_of_the_others_are_halved_every_tenth_of_the_run():
    settings, (run,) = train(optimizers=("sgd",), epochs=3)
    assert [epoch.learning_rates["group 0"] for epoch in run.epochs] == [0.1, 0.05, 0.025]
    assert training.summary(settings, [run])["sgd"]["epoch_time_ratio"]["median"] == 1


def test_a_run_that_diverges_stops_and_the_others_go_on():
    settings, (sgd, adam) = train(optimizers=("sgd", "adam"), overrides={"sgd": {"lr": 1e30}}, epochs=3)
    assert sgd.diverged
    assert len(sgd.epochs) < 3
    assert not adam.diverged
    assert len(adam.epochs) == 3
    entry = training.summary(settings, [sgd, adam])["sgd"]
    assert entry["diverged"] == entry["runs"] == 1
    assert entry["test_accuracy_mean"] is None


def test_a_gpt_learns_its_tokens():
    _, (run,) = train(
        model="gpt", data="synthetic", samples=64, batch=8, width=0.2, epochs=3, optimizers=("adam",)
    )
    assert run.epochs[-1].test_loss < run.epochs[0].test_loss


# --- The command


def test_a_run_leaves_a_result_a_table_and_figures(capsys, tmp_path):
    status, out, _ = run_command(capsys, *FLAGS, "--optimizers", "rmsgd,sgd", "--out", str(tmp_path))
    assert status == 0
    for word in ("rmsgd", "sgd", "accuracy", "training", "epoch end", "evaluation", "epoch time"):
        assert word in out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "accuracy-over-time.png",
        "result.json",
        "rmsgd-learning-rates.png",
        "rmsgd-stable-rank.png",
    ]


def test_no_figure_of_the_table_is_cut_in_80_columns():
    settings = dataclasses.replace(TINY, epochs=1, seeds=(0,), optimizers=("rmsgd-published", "sgd"))
    entry = {
        "runs": 3,
        "diverged": 1,
        "test_accuracy_mean": 0.9852,
        "test_accuracy_std": 0.0089,
        "seconds": dict.fromkeys(training.PHASES, 1234.567),
        "epoch_time_ratio": {"median": 10.983, "low": 10.971, "high": 10.993},
    }
    console = Console(width=80, file=io.StringIO())
    console.print(train_command.table(settings, dict.fromkeys(settings.optimizers, entry)))
    shown = console.file.getvalue()
    for text in (
        "98.52 ±",
        "0.89",
        "diverged)",
        "1234.567",
        "10.983",
        "10.971",
        "10.993]",
        "1 epoch, 1 seed",
    ):
        assert text in shown
    assert "…" not in shown


def test_the_result_says_what_was_run_where_and_how_it_went(capsys, tmp_path):
    run_command(capsys, *FLAGS, "--optimizers", "rmsgd,sgd", "--out", str(tmp_path))
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result) == {"schema", "config", "machine", "optimizers", "summary", "runs"}
    assert result["schema"] == training.SCHEMA
    assert result["config"]["epochs"] == 1
    assert {"cpu", "cores", "torch"} <= set(result["machine"])
    assert result["optimizers"]["rmsgd"]["settings"]["lr"] == 0.03
    assert [(run["optimizer"], run["seed"]) for run in result["runs"]] == [("rmsgd", 0), ("sgd", 0)]
    (epoch,) = result["runs"][0]["epochs"]
    assert set(epoch) == {field.name for field in dataclasses.fields(training.Epoch)}
    assert set(epoch["seconds"]) == set(training.PHASES)
    assert epoch["seconds"]["training"] > 0
    assert epoch["stable_rank"].keys() <= epoch["learning_rates"].keys()
    assert result["runs"][1]["epochs"][0]["stable_rank"] is None
    for name in ("rmsgd", "sgd"):
        assert 0 <= result["summary"][name]["test_accuracy_mean"] <= 1
        assert result["summary"][name]["test_accuracy_std"] is None
    assert result["summary"]["sgd"]["epoch_time_ratio"]["median"] == 1


def test_an_optimizer_that_diverges_with_every_seed_is_status_1(capsys, tmp_path):
    flags = [*FLAGS, "--optimizers", "adam,sgd", "--set", "sgd.lr=1e30", "--out", str(tmp_path)]
    status, out, err = run_command(capsys, *flags, "--epochs", "2")
    assert status == 1
    assert "1 of 1 diverged" in out
    assert "diverged with every seed: sgd" in err
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["runs"][1]["diverged"] is True
    assert result["summary"]["sgd"]["test_accuracy_mean"] is None


def test_the_largest_seed_trains(capsys, tmp_path):
    flags = [*FLAGS, "--optimizers", "sgd", "--seeds", str(2**63 - 1), "--out", str(tmp_path)]
    assert run_command(capsys, *flags)[0] == 0


def test_without_matplotlib_the_result_is_still_written(capsys, tmp_path, monkeypatch):
    def missing(*_, **__):
        raise ModuleNotFoundError("figures need matplotlib: pip install 'rmsgd-kernels[plot]'")

    monkeypatch.setattr(plots, "bands_over_time", missing)
    status, _, err = run_command(capsys, *FLAGS, "--optimizers", "sgd", "--out", str(tmp_path))
    assert status == 0
    assert "no figures: figures need matplotlib" in err
    assert (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "resnet81"], "unknown model 'resnet81'. Did you mean 'resnet18'?"),
        (["--optimizers", "sgd,rmsdg"], "unknown optimizer 'rmsdg'. Did you mean 'rmsgd'?"),
        (["--data", "cifar"], "unknown data 'cifar'. Known: digits, synthetic."),
        (["--optimizers", "sgd,sgd"], "every optimizer may be given once"),
        (["--seeds", "one"], "expected whole numbers like 0,1,2, got 'one'"),
        (["--seeds", "-1"], "seeds must lie between 0 and 2^63, got -1"),
        (["--seeds", "9223372036854775808"], "seeds must lie between 0 and 2^63"),
        (["--epochs", "0"], "--epochs: expected a whole number above 0, got '0'"),
        (["--width", "nan"], "--width: expected a number above 0, got 'nan'"),
        (["--batch", "5000"], "batch must be between 1 and the 1437 training samples, got 5000"),
        (["--threads", "-1"], "--threads: expected a whole number above 0, got '-1'"),
        (["--model", "vit-b16"], "vit-b16 reads samples of shape (3, 224, 224)"),
        (["--set", "sgd=3"], "expected OPTIMIZER.KEY=VALUE"),
        (["--set", "sgd.lr=fast"], "expected OPTIMIZER.KEY=VALUE"),
        (["--set", "adam.lr=0.1"], "settings for adam, which is not among the optimizers"),
        (["--set", "sgd.speed=3"], "unexpected keyword argument 'speed'"),
        (["--set", "rmsgd.beta=2"], "beta"),
        (["--device", "toaster"], "device 'toaster' cannot be used here"),
    ],
)
def test_bad_arguments_are_status_2_and_say_what_was_expected(capsys, tmp_path, flags, message):
    err = refusal(capsys, *flags, "--out", str(tmp_path))
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_command_is_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["trian"])
    assert stop.value.code == 2
    assert "train" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"python -m bench {command}" in capsys.readouterr().out


def test_listing_the_commands_does_not_import_torch():
    code = "import sys, bench.__main__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_interrupted_run_writes_nothing(capsys, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupt)
    status, _, err = run_command(capsys, *FLAGS, "--out", str(tmp_path))
    assert status == 130
    assert "interrupted" in err
    assert list(tmp_path.iterdir()) == []


def test_accuracy_is_a_fraction_of_all_targets():
    _, (run,) = train(optimizers=("sgd",), epochs=1)
    correct = run.epochs[0].test_accuracy * len(data.load("digits", TINY.model).test)
    assert math.isclose(correct, round(correct))


def test_the_note_says_which_rates_were_used_what_moves_them_and_what_was_tuned():
    plain = training.note(dataclasses.replace(TINY, optimizers=("sgd", "rmsgd", "sls")))
    assert "sgd 0.1 (halved after each tenth of the run)" in plain
    assert "rmsgd 0.03, sls 1 (no schedule)" in plain
    assert plain.endswith("Nothing was tuned on these data.")
    given = training.note(dataclasses.replace(TINY, overrides={"sgd": {"lr": 0.3, "momentum": 0.5}}))
    assert "sgd 0.3" in given
    assert given.endswith("given by hand: sgd.lr, sgd.momentum.")
