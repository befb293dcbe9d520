"""The experiments of the paper train what it says, and have its published numbers."""

import json
import math

import pytest
from commands import run_bench

from bench import models, peers
from bench.data.registry import DATASETS
from bench.study import published
from bench.study.experiments import EXPERIMENTS, experiment, small

IDS = ["table1a", "table1b", "table2", "table3", "table4", "fig1a", "fig1b", "fig2", "fig3", "fig4"]


def run_command(capsys, *arguments):
    return run_bench(capsys, "study", *arguments)


def test_every_table_and_figure_of_the_paper_is_an_experiment():
    assert list(EXPERIMENTS) == IDS


@pytest.mark.parametrize("name", IDS)
def test_an_experiment_names_only_what_there_is(name):
    for run in experiment(name).runs():
        assert run.network in models.ARCHITECTURES
        assert run.optimizer in peers.PEERS
        assert run.dataset in DATASETS


def test_every_published_number_belongs_to_a_cell_that_can_be_run():
    for key in published.load().values:
        cells = {(run.dataset, run.network, run.optimizer) for run in experiment(key.table).runs()}
        assert (key.dataset, key.network, key.optimizer) in cells


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (("table1a", "cifar10", "resnet18", "sgd"), (95.32, 0.07)),
        (("table1a", "cifar100", "resnext29", "rmsgd"), (77.14, 0.31)),
        (("table1a", "cifar100", "resnet18", "adamp"), (76.81, 0.31)),
        (("table1b", "cifar100", "efficientnetb0", "sam"), (69.10, 0.50)),
        (("table4", "adp", "mobilenetv2-imagenet", "rmsgd"), (93.83, 0.28)),
    ],
)
def test_published_numbers_are_the_papers(cell, expected):
    assert published.load().value(*cell) == expected


def test_a_number_that_the_text_lacks_is_none():
    known = published.load()
    assert known.value("table1a", "cifar100", "resnet18", "adam") is None
    assert known.value("table2", "imagenet", "mobilenetv2-imagenet", "rmsgd", 250) is None


def test_all_rules_of_rmsgd_are_compared_with_its_one_column():
    known = published.load()
    rules = [known.value("table1a", "cifar10", "resnet18", name) for name in ("rmsgd", "rmsgd-published")]
    assert rules[0] == rules[1]


def test_a_mean_without_a_deviation_says_so():
    value = published.load().value("table3", "imagenet", "resnet50-imagenet", "rmsgd")
    assert math.isnan(value.std)
    assert str(value) == "76.42"


def test_the_paper_s_protocol_is_the_default():
    (run, *_) = experiment("table1a").runs()
    assert (run.epochs, run.batch, run.budget, run.augment, run.cutout) == (250, 128, True, True, False)
    assert all(run.cutout for run in experiment("table1b").runs())
    assert {run.batch for run in experiment("table3").runs()} == {256}


def test_a_sweep_leaves_the_optimizers_own_value_as_it_is():
    rates = [dict(run.settings).get("lr") for run in experiment("fig2").runs() if run.optimizer == "sgd"]
    assert set(rates) == {0.01, 0.03, None, 0.3}
    betas = {run.settings for run in experiment("fig3").runs() if run.network == "resnet34"}
    assert betas == {(), *((("beta", value),) for value in (0.8, 0.9, 0.95, 0.99))}


def test_an_optimizer_that_searches_its_rate_is_no_part_of_a_sweep_of_rates():
    runs = experiment("fig2").runs()
    count = {name: sum(run.optimizer == name for run in runs) for name in ("sgd", "sls")}
    assert count == {"sgd": 4 * 8, "sls": 8}


@pytest.mark.parametrize("name", IDS)
def test_the_small_preset_keeps_every_column_and_needs_no_data(name):
    known, preset = experiment(name), small(experiment(name))
    assert {run.optimizer for run in preset.runs()} == {run.optimizer for run in known.runs()}
    assert all(not DATASETS[run.dataset].layout for run in preset.runs())
    assert {run.epochs for run in preset.runs()} == {3}
    assert all(len(grid.networks) <= 2 for grid in preset.grids)
    every = {run.network for run in small(known, every=True).runs()}
    assert every == {run.network.removesuffix("-imagenet") for run in known.runs()}


# --- The command


def test_list_shows_every_experiment_in_80_columns(capsys):
    status, out, _ = run_command(capsys, "list")
    assert status == 0
    assert all(name in out for name in IDS)
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("name", [*IDS, "digits"])
def test_list_shows_each_in_full(name, capsys):
    status, out, _ = run_command(capsys, "list", name)
    assert status == 0
    assert name in out


def test_list_shows_the_numbers_of_one(capsys):
    status, out, _ = run_command(capsys, "list", "table3")
    assert status == 0
    assert "76.42" in out


def test_list_writes_json(capsys):
    _, out, _ = run_command(capsys, "list", "--json")
    content = json.loads(out.replace("NaN", "null"))
    assert set(content["experiments"]) == set(IDS)
    assert len(content["published"]) == len(published.load().values)


def test_notes_say_what_is_odd(capsys):
    _, out, _ = run_command(capsys, "list", "notes")
    assert "1.98" in out
    assert "1x1" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "table9"), "unknown experiment 'table9'. Did you mean"),
        (("list", "fig9"), "unknown experiment 'fig9'"),
        (("run", "table1a", "--network", "resnet19"), "unknown model 'resnet19'. Did you mean 'resnet18'"),
        (("run", "table1a", "--network", "senet18"), "table1a has no such cell. It has resnet18, resnet34"),
        (("run", "table1a", "--optimizers", "sdg"), "unknown optimizer 'sdg'. Did you mean 'sgd'"),
        (("run", "table1a", "--dataset", "svhn"), "unknown data set 'svhn'"),
        (
            ("run", "table1a"),
            "cifar10 needs --data PATH. Expected: cifar-10-binary.tar.gz (MD5 c32a1d4ab5d0",
        ),
        (("run", "table1a", "--preset", "small", "--set", "sgd.speed=3"), "sgd refuses its settings: "),
        (("run", "table2", "--set", "adam.lr=3"), "settings for adam, which is not among"),
        (("run", "fig1a", "--device", "cuda:99"), "device 'cuda:99' cannot be used here"),
    ],
)
def test_bad_arguments_are_answered_in_one_line(arguments, message, capsys, tmp_path):
    place = ("--out", str(tmp_path)) if arguments[0] == "run" else ()
    status, _, err = run_command(capsys, *arguments, *place)
    assert status == 2
    assert message in " ".join(err.split())


def test_experiments_without_the_cell_are_named_and_the_others_go_on(capsys, tmp_path):
    place = ("--preset", "small", "--network", "resnet18", "--optimizers", "sgd", "--out", str(tmp_path))
    status, _, err = run_command(capsys, "run", "table3", "fig1a", "table1a", *place, "--epochs", "1")
    assert status == 0
    assert "no such cell in table3, fig1a" in err
    assert "1 complete" in err
    status, out, err = run_command(capsys, "report", "all", *place, "--epochs", "1")
    assert status == 0
    assert "table1a" in out
    assert "no such cell in table2, table3" in err


def test_a_cell_that_no_experiment_has_is_an_error(capsys, tmp_path):
    place = ("--network", "senet18", "--optimizers", "sls", "--out", str(tmp_path))
    for ids in (("all",), ("table1a", "table1b")):
        status, _, err = run_command(capsys, "run", *ids, *place)
        assert status == 2
        assert "none of table1a, table1b" in err


def test_settings_are_for_an_optimizer_of_any_of_the_experiments(capsys, tmp_path):
    place = ("--out", str(tmp_path), "--set", "adagrad.lr=1", "--preset", "small")
    _, _, err = run_command(capsys, "report", "all", *place)
    assert "has no ended run" in " ".join(err.split())


def test_a_small_cell_runs_to_its_end_and_again_in_no_time(capsys, tmp_path):
    arguments = ("run", "table1a", "--preset", "small", "--network", "resnet18", "--optimizers", "sgd")
    for _ in range(2):
        status, _, err = run_command(capsys, *arguments, "--epochs", "1", "--out", str(tmp_path))
        assert status == 0
        assert "1 complete" in err
        assert "study report table1a --preset small --network resnet18" in err
