"""Whatever stops a run of the study, it goes on to the result that it would have had anyway."""

import dataclasses
import errno
import itertools
import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from study_jobs import STEPS, TINY, budgets, make, start, weights

from bench import atomic, measure
from bench.__main__ import main
from bench.data import registry
from bench.locks import BusyError, locked
from bench.study import runner
from bench.study.config import RunConfig, sorted_settings
from bench.study.run import Run, kept_epochs
from bench.study.run_folder import status
from bench.study.runner import Place, Runner, train_all

pytestmark = pytest.mark.usefixtures("one_thread")

SECONDS = ("seconds_training", "seconds_epoch_end", "seconds_evaluation", "seconds_checkpoint")
OPTIMIZERS = [
    "rmsgd",
    "rmsgd-published",
    "rmsgd-release",
    "sgd",
    "sam",
    "sgdp",
    "adam",
    "adamp",
    "adagrad",
    "adabelief",
    "adabound",
    "sls",
]


def tiny(**changes):
    return dataclasses.replace(TINY, keep_weights=False, **changes)


def identical(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def measured(folder):
    """Everything that an ended run has recorded, without times."""
    rows = (folder / "epochs.csv").read_text().splitlines()
    columns = [i for i, name in enumerate(rows[0].split(",")) if name not in SECONDS]
    return [[row.split(",")[i] for i in columns] for row in rows], (folder / "layers.csv").read_text()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of `TINY` trained without a break."""
    folder = tmp_path_factory.mktemp("undisturbed")
    torch.set_num_threads(1)
    make(TINY, folder).train()
    return folder


class StoppedError(Exception):
    pass


def stop_after(run, steps, monkeypatch):
    """Trains a run until the end of its `steps`-th step."""
    taken, original = [], run._take_step

    def step(*batch):
        if len(taken) == steps:
            raise StoppedError
        taken.append(original(*batch))
        return taken[-1]

    monkeypatch.setattr(run, "_take_step", step)
    with pytest.raises(StoppedError):
        run.train()


# --- Going on


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_goes_on_in_the_middle_of_an_epoch_as_if_it_had_not_stopped(
    optimizer, tmp_path, monkeypatch
):
    config = tiny(optimizer=optimizer, cutout=True)
    make(config, tmp_path / "whole").train()
    stop_after(make(config, tmp_path / "broken"), STEPS + 2, monkeypatch)
    np.random.seed(1), random.seed(1), torch.manual_seed(1)
    assert status(tmp_path / "broken") == "unfinished"
    assert make(config, tmp_path / "broken").train() == "complete"
    assert identical(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    assert measured(tmp_path / "whole") == measured(tmp_path / "broken")


def test_dropout_goes_on_with_the_same_draws(tmp_path, monkeypatch):
    config = tiny(network="efficientnetb0", width=0.125, epochs=1)
    make(config, tmp_path / "whole").train()
    stop_after(make(config, tmp_path / "broken"), 1, monkeypatch)
    torch.manual_seed(5)
    make(config, tmp_path / "broken").train()
    assert identical(weights(tmp_path / "whole"), weights(tmp_path / "broken"))


def test_a_run_killed_in_a_step_and_while_it_writes_ends_identically(tmp_path, undisturbed):
    # Each child goes on where the one before was killed: while writing the first file, the first weights or
    # the first checkpoint (a file is synchronised, and then its folder), in a step, ...
    kills = [("write", 1), ("write", 5), ("write", 7), ("step", 2), ("write", 3), ("rename", 2), ("step", 3)]
    for where, count in kills:
        process = start(TINY, tmp_path, where, count)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    assert status(tmp_path) == "unfinished"
    make(TINY, tmp_path).train()
    assert identical(weights(undisturbed), weights(tmp_path))
    assert measured(undisturbed) == measured(tmp_path)
    assert files_below(undisturbed) == files_below(tmp_path)


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def killed_at_random(config, folder, moments, most):
    """Trains in processes that are killed at random moments, until one ends; returns the kills.

    The first is killed at once, so that one is on any machine.
    """
    kills = 0
    while status(folder) != "complete":
        process = start(config, folder)
        process.join(moments.uniform(0, 0.3) * (kills > 0) if kills < most else 60)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join(60)
            kills += 1
        assert process.exitcode in (0, -signal.SIGKILL)
    return kills


def test_kills_at_random_moments_change_nothing(tmp_path, undisturbed):
    assert killed_at_random(TINY, tmp_path, random.Random(0), 2) > 0
    assert identical(weights(undisturbed), weights(tmp_path))


@pytest.mark.slow
def test_200_kills_at_random_moments_change_nothing(tmp_path):
    moments = random.Random(1)
    kills, seed = 0, 0
    while kills < 200:
        config = dataclasses.replace(TINY, optimizer=OPTIMIZERS[seed % len(OPTIMIZERS)], seed=seed, epochs=4)
        kills += killed_at_random(config, tmp_path / f"broken{seed}", moments, 200)
        make(config, tmp_path / f"whole{seed}").train()
        assert identical(weights(tmp_path / f"whole{seed}"), weights(tmp_path / f"broken{seed}"))
        seed += 1


def test_a_finished_run_is_left_alone(tmp_path, undisturbed):
    before = (undisturbed / "checkpoint.pt").stat().st_mtime_ns
    assert make(TINY, undisturbed).train() == "complete"
    assert (undisturbed / "checkpoint.pt").stat().st_mtime_ns == before


def test_a_checkpoint_of_another_run_is_refused(tmp_path, monkeypatch):
    stop_after(make(TINY, tmp_path), 3, monkeypatch)
    with pytest.raises(ValueError, match="of another run"):
        make(dataclasses.replace(TINY, seed=1), tmp_path).train()


def test_two_processes_never_train_the_same_run(tmp_path):
    with locked(tmp_path), pytest.raises(BusyError, match="another process"):
        make(TINY, tmp_path).train()


def test_the_table_of_epochs_is_whole_at_every_moment(tmp_path, monkeypatch):
    replace = os.replace

    def stopped(partial, path):
        if path.name == "epochs.csv" and path.exists():
            raise StoppedError
        replace(partial, path)

    monkeypatch.setattr(atomic.os, "replace", stopped)
    with pytest.raises(StoppedError):
        make(TINY, tmp_path).train()
    lines = (tmp_path / "epochs.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["epoch", "1"]


# --- A full disk


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    atomic.save(path, {"epoch": 1})

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content):
            self.file.write(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    opened = type(path).open
    monkeypatch.setattr(type(path), "open", lambda self, mode: Full(opened(self, mode)))
    with pytest.raises(OSError, match="No space left"):
        atomic.save(path, {"epoch": 2})
    monkeypatch.undo()
    assert torch.load(path)["epoch"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_run_whose_disk_was_full_goes_on_identically(tmp_path, undisturbed):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (undisturbed / "checkpoint.pt").stat().st_size
    kept = atomic.save

    def save(path, content):
        # From the third step on, a checkpoint does not fit: the system cuts the write short.
        if content.get("step", 0) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
        kept(path, content)

    atomic.save = save
    try:
        with pytest.raises(OSError, match="File too large"):
            make(TINY, tmp_path, checkpoint_seconds=0.0).train()
    finally:
        atomic.save = kept
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2
    make(TINY, tmp_path).train()
    assert identical(weights(undisturbed), weights(tmp_path))


COMMAND = ["study", "run", "table1a", "--preset", "small", "--network", "resnet18", "--epochs", "1"]


def said_when_a_checkpoint_fails(error, out, monkeypatch, capsys):
    def failing(path, content):
        raise error

    monkeypatch.setattr(atomic, "save", failing)
    assert main([*COMMAND, "--optimizers", "sgd", "--out", str(out)]) == 1
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_the_command_says_what_to_do_about_a_full_disk(number, tmp_path, monkeypatch, capsys):
    full = OSError(number, os.strerror(number))
    said = said_when_a_checkpoint_fails(full, tmp_path, monkeypatch, capsys)
    assert f"{os.strerror(number)}: {tmp_path}" in said
    assert "make room and give the same command again" in said


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "checkpoint.pt"),
            "Permission denied: checkpoint.pt",
        ),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (OSError("the file server is gone"), "the file server is gone"),
    ],
)
def test_what_else_goes_wrong_with_a_file_is_said_as_it_is(error, message, tmp_path, monkeypatch, capsys):
    said = said_when_a_checkpoint_fails(error, tmp_path, monkeypatch, capsys)
    assert message in said
    assert "make room" not in said


# --- What the exit status says


@pytest.mark.parametrize(
    ("ends", "status", "message"),
    [
        ({}, 0, "4 complete"),
        ({("sgd", 0): "diverged"}, 0, "1 diverged"),
        ({("sgd", 0): "diverged", ("sgd", 1): "diverged"}, 1, "diverged in every run: sgd"),
        ({("adam", 1): "busy"}, 1, "another process is at 1 of these runs"),
        ({("sgd", 0): "diverged", ("sgd", 1): "busy"}, 1, "another process is at 1 of these runs"),
        ({("adam", 0): "failed"}, 1, "1 failed: the same command tries them again"),
    ],
)
def test_the_status_is_0_when_all_ended_and_every_optimizer_has_a_good_run(
    ends, status, message, tmp_path, monkeypatch, capsys
):
    def train(self, config, tell):
        return ends.get((config.optimizer, config.seed), "complete")

    monkeypatch.setattr(Runner, "train", train)
    assert main([*COMMAND, "--optimizers", "sgd,adam", "--seeds", "2", "--out", str(tmp_path)]) == status
    assert message in capsys.readouterr().err


# --- What is recorded


def test_the_folder_says_what_was_run_where_and_what_came_of_it(undisturbed):
    assert RunConfig.from_dict(json.loads((undisturbed / "config.json").read_text())) == TINY
    assert "torch" in json.loads((undisturbed / "environment.json").read_text())
    result = json.loads((undisturbed / "result.json").read_text())
    assert (result["status"], result["epochs"]) == ("complete", 2)
    rows, layers = measured(undisturbed)
    assert len(rows) == 3
    names = {line.split(",")[1] for line in layers.splitlines()[1:]}
    assert len(names) == 16
    assert {path.name for path in (undisturbed / "weights").iterdir()} == {
        "epoch_000.pt",
        "epoch_001.pt",
        "epoch_002.pt",
    }


def test_kept_epochs_begin_close_together_and_include_the_last():
    assert kept_epochs(250) == {1, 3, 9, 27, 83, 250}
    assert kept_epochs(2) == {1, 2}


def test_a_run_that_diverges_stops_is_recorded_and_the_others_go_on(tmp_path):
    place = Place(tmp_path)
    wild = tiny(optimizer="sgd", batch=512, settings=sorted_settings({"lr": 1e30}))
    ended = []
    ends = train_all(
        Runner(place), [wild, tiny(optimizer="sgd", batch=512)], ended=lambda config, how: ended.append(how)
    )
    assert ended == ["diverged", "complete"]
    assert list(ends.values()) == ["diverged", "complete"]
    result = json.loads((wild.folder(tmp_path) / "result.json").read_text())
    assert result["status"] == "diverged"
    assert result["epochs"] == 1
    assert result["final"]["test_loss"] is None


def test_a_run_that_raises_an_error_keeps_it_in_its_folder_and_the_others_go_on(tmp_path, monkeypatch):
    def broken(run, inputs, targets):
        raise RuntimeError("the step of this optimizer is broken")

    config, other = tiny(epochs=1, batch=512), tiny(epochs=1, batch=512, optimizer="sgd")
    step = Run._take_step
    with monkeypatch.context() as patch:
        patch.setattr(
            Run,
            "_take_step",
            lambda run, *batch: (broken if run.config == config else step)(run, *batch),
        )
        ends = train_all(Runner(Place(tmp_path)), [config, other])
    assert ends == {config: "failed", other: "complete"}
    error = config.folder(tmp_path) / "error.txt"
    assert "the step of this optimizer is broken" in error.read_text()
    assert Runner(Place(tmp_path)).train(config) == "complete"
    assert not error.exists()


def test_a_search_whose_runs_fail_ends_in_place_of_trying_for_ever(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Runner, "train", lambda self, config, tell: "failed")
    monkeypatch.setattr(Runner, "prepare", lambda self, config: None)
    given = ["study", "run", "cifar10-small", "--preset", "small", "--optimizers", "sgd", "--seeds", "1"]
    given += ["--part", "tuning", "--out", str(tmp_path)]
    assert main(given) == 1
    assert "so no rates can be chosen" in capsys.readouterr().err


def test_done_runs_are_skipped(tmp_path, monkeypatch):
    Runner(Place(tmp_path)).train(tiny(epochs=1, batch=512))
    monkeypatch.setattr(Run, "_take_step", lambda *_: pytest.fail("nothing was to be trained"))
    assert Runner(Place(tmp_path)).train(tiny(epochs=1, batch=512)) == "complete"


def test_images_with_several_labels_have_a_class_wise_accuracy(tmp_path):
    config = tiny(dataset="digits-properties", epochs=5)
    make(config, tmp_path).train()
    final = json.loads((tmp_path / "result.json").read_text())["final"]
    # Answering "no" to everything is right for 52 to 58 % of properties.
    assert 0.6 < final["test_accuracy"] <= 1
    assert final["test_top5"] is None
    assert 0 < final["test_loss"] < 1


def test_a_held_out_part_is_taken_from_the_training_set(tmp_path):
    run = make(tiny(holdout=True), tmp_path)
    held = torch.cat([inputs for inputs, _ in run._source.test()])
    trained = torch.cat([inputs for inputs, _ in run._source.train_sample()])
    assert len(held) == 260 // 5
    assert not any((held[0] == image).all() for image in trained)


# --- Time


def test_with_a_budget_no_epoch_begins_that_would_end_after_it(tmp_path):
    run = make(tiny(budget=True), tmp_path, budget=2.5)
    run._epochs = [{"seconds_training": 0.9, "seconds_epoch_end": 0.1}]
    assert not run._finished()
    run._epochs *= 2
    assert run._finished()


def test_with_a_budget_there_are_never_more_epochs_than_sgd_has(tmp_path):
    run = make(tiny(budget=True), tmp_path, budget=1e9)
    run._epochs = [{"seconds_training": 0.1, "seconds_epoch_end": 0.0}] * 2
    assert run._finished()


def test_the_budget_is_the_time_of_sgd_measured_once(tmp_path):
    runner = Runner(Place(tmp_path))
    config = tiny(budget=True, epochs=100, batch=512)
    budget = runner.budget(config)
    (file,) = (tmp_path / "budgets").glob("*.json")
    content = json.loads(file.read_text())
    assert len(content["timed"]) == 3
    assert budget == pytest.approx(100 * np.median(content["timed"]))
    assert runner.budget(config) == budget
    assert runner.budget(dataclasses.replace(config, optimizer="sam", seed=3)) == budget


def test_a_budget_of_another_device_is_refused(tmp_path, monkeypatch):
    config = tiny(budget=True, epochs=100, batch=512)
    Runner(Place(tmp_path)).budget(config)
    monkeypatch.setattr(runner, "device_name", lambda device: "a faster one")
    with pytest.raises(ValueError, match=r"1 threads, and this is a faster one: .*another folder \(--out\)"):
        Runner(Place(tmp_path)).budget(config)


def test_processes_that_share_a_folder_share_a_budget(tmp_path):
    first, second = budgets(tiny(budget=True, epochs=100, batch=512), tmp_path, 2)
    assert first == second


def test_a_run_in_budget_mode_counts_training_and_epoch_ends_alone(tmp_path, monkeypatch):
    # Whatever is booked takes a second: each step, the epoch end, the evaluation and every checkpoint.
    seconds = itertools.count()
    monkeypatch.setattr(measure.HostClock, "_now", lambda clock: next(seconds))
    each = STEPS + 1
    make(tiny(budget=True, epochs=50), tmp_path, budget=3.5 * each).train()
    result = json.loads((tmp_path / "result.json").read_text())
    lines = (tmp_path / "epochs.csv").read_text().splitlines()
    names = lines[0].split(",")
    spent = [sum(float(line.split(",")[names.index(name)]) for name in SECONDS[:2]) for line in lines[1:]]
    assert spent == 3 * [each]
    assert result["epochs"] == 3
    assert result["budget_seconds"] == 3.5 * each


# --- Bad input


@pytest.mark.parametrize("seconds", ["-1", "nan", "soon"])
def test_an_interval_of_checkpoints_that_is_none_is_refused(seconds, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*COMMAND, "--optimizers", "sgd", "--out", str(tmp_path), "--checkpoint-every", seconds])
    assert f"expected seconds, 0 or more, got '{seconds}'" in capsys.readouterr().err


def test_a_setting_that_the_optimizer_does_not_have_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^sgd refuses its settings: .*rho"):
        make(tiny(optimizer="sgd", settings=sorted_settings({"rho": 1})), tmp_path)


def test_a_batch_larger_than_the_training_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="batch must be between 1 and the 260"):
        make(tiny(batch=5000), tmp_path)


def test_a_key_that_no_run_has_is_refused():
    with pytest.raises(ValueError, match="no run has speed"):
        RunConfig.from_dict({"network": "a", "dataset": "b", "optimizer": "c", "speed": 1})


def test_lists_among_settings_are_tuples_and_go_through_json(tmp_path):
    run = tiny(optimizer="adam", settings=sorted_settings({"betas": [0.9, 0.99]}))
    assert run == tiny(optimizer="adam", settings=sorted_settings({"betas": (0.9, 0.99)}))
    assert RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run


def test_a_setting_that_is_no_plain_value_is_refused(tmp_path, capsys):
    arguments = [*COMMAND, "--optimizers", "adam", "--out", str(tmp_path), "--set", "adam.betas={1: 2}"]
    assert main(arguments) == 2
    assert "betas cannot be set to {1: 2}" in capsys.readouterr().err


def test_equal_runs_share_a_folder_and_different_ones_do_not(tmp_path):
    folders = {
        config.folder(tmp_path)
        for config in (tiny(), tiny(), tiny(seed=1), tiny(cutout=True), tiny(settings=(("beta", 0.9),)))
    }
    assert len(folders) == 4


# --- Schedules and measurements


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [("rmsgd", "cosine"), ("sgd", "onecycle"), ("sam", "step"), ("adamw", "constant")],
)
def test_a_run_with_a_schedule_and_measurements_of_its_own_goes_on_as_if_it_had_not_stopped(
    optimizer, schedule, tmp_path, monkeypatch
):
    config = tiny(optimizer=optimizer, schedule=schedule, measurements=5, channels_last=True)
    make(config, tmp_path / "whole").train()
    stop_after(make(config, tmp_path / "broken"), STEPS + 2, monkeypatch)
    assert make(config, tmp_path / "broken").train() == "complete"
    assert identical(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    assert measured(tmp_path / "whole") == measured(tmp_path / "broken")


def rates_of(config, folder, monkeypatch):
    """The rate that each step of a run takes."""
    run, taken = make(config, folder), []
    original = run._take_step

    def step(*batch):
        taken.append(run._optimizer.param_groups[0]["lr"])
        return original(*batch)

    monkeypatch.setattr(run, "_take_step", step)
    run.train()
    return taken


def test_schedules_are_of_the_share_of_the_run_that_is_done(tmp_path, monkeypatch):
    def rates(schedule):
        config = tiny(optimizer="sgd", schedule=schedule, epochs=5, settings=(("lr", 0.1),))
        return rates_of(config, tmp_path / schedule, monkeypatch)

    steps = 5 * STEPS
    done = np.arange(steps) / steps
    assert rates("constant") == [0.1] * steps
    assert rates("cosine") == pytest.approx(0.05 * (1 + np.cos(np.pi * done)))
    assert rates("step") == pytest.approx(0.1 * 0.5 ** np.repeat(np.arange(10), 2))
    cycle = rates("onecycle")
    assert max(cycle) == pytest.approx(0.1)
    assert 0 < cycle.index(max(cycle)) < steps / 2


def test_an_unknown_schedule_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'cosine'"):
        make(tiny(schedule="cosin"), tmp_path)


@pytest.mark.parametrize("count", [1, 3, 5, 8, 20])
def test_a_run_measures_as_often_as_it_is_told_at_equal_distances(count, tmp_path, monkeypatch):
    config = tiny(epochs=5, measurements=count, schedule="constant")
    run, after = make(config, tmp_path), []
    epoch_step = run._optimizer.epoch_step
    monkeypatch.setattr(
        run._optimizer,
        "epoch_step",
        lambda: (after.append(run._epoch * STEPS + run._step), epoch_step()),
    )
    run.train()
    assert len(after) == count
    assert after[-1] == 5 * STEPS
    distances = np.diff([0, *after])
    assert distances.max() - distances.min() <= 1


def test_measuring_once_an_epoch_is_what_is_done_without_a_number(tmp_path):
    make(tiny(), tmp_path / "own").train()
    make(tiny(measurements=2), tmp_path / "said").train()
    assert identical(weights(tmp_path / "own"), weights(tmp_path / "said"))


def test_fewer_images_are_always_the_same_and_held_out_ones_are_none_of_them():
    source = registry.source("digits", None, "resnet14-digits", torch.device("cpu"))
    judged = source.limited(200, 50, holdout=False)
    held = source.limited(200, 50, holdout=True)
    again = source.limited(200, 50, holdout=True)
    assert torch.equal(judged._train.inputs, held._train.inputs)
    assert torch.equal(held._test.inputs, again._test.inputs)
    assert len(held._train) == 200
    assert len(held._test) == len(judged._test) == 50
    trained = {image.numpy().tobytes() for image in held._train.inputs}
    assert not trained & {image.numpy().tobytes() for image in held._test.inputs}
    with pytest.raises(ValueError, match="2000 training images are wanted"):
        source.limited(2000, 50, holdout=False)


def test_fields_that_came_later_leave_the_folders_of_older_runs_where_they_were():
    config = RunConfig("resnet18", "cifar10", "sgd", settings=(("lr", 0.03),))
    assert config.folder(Path()).name == "sgd-lr=0.03-seed0-68deb273"
    later = dataclasses.replace(config, schedule="cosine", images=100)
    assert later.folder(Path()) != config.folder(Path())
    assert RunConfig.from_dict(later.to_dict()) == later
