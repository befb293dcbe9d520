"""Differences, correlations, rates, tables and figures follow from the runs."""

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from bench import measure, models, readme
from bench.__main__ import main
from bench.locks import locked
from bench.study import command, fit, part_plots, parts, report, table, tuning
from bench.study import plots as figures
from bench.study.config import RunConfig, sorted_settings
from bench.study.experiments import EXPERIMENTS, experiment, small
from bench.study.plots import draw
from bench.study.records import read
from bench.study.run import METRICS, PHASES
from bench.study.runner import Place, Runner
from bench.study.selection import by_experiment
from bench.study.statistics import bootstrapped, correlation, detectable, holm, in_deviations, paired
from rmsgd.inspection.report.csv_table import write_csv

CELL = RunConfig("resnet18", "cifar10", "sgd", budget=True)


def write_run(
    out, config, accuracy, *, train=1.0, quality=0.5, epochs=None, diverged=False, layers=3, budget=None
):
    """Write the folder of a run that ended with these numbers."""
    folder = config.folder(out)
    folder.mkdir(parents=True)
    count = epochs or config.epochs
    rows = [
        {
            "epoch": epoch,
            "train_loss": 1.0 / epoch,
            "train_accuracy": train,
            "test_loss": 0.1,
            "test_accuracy": accuracy - 0.001 * (count - epoch),
            "test_top5": 1.0,
            "Q": quality,
            "stable_rank": quality / 10,
            "condition_number": 1 - quality / 10,
            "learning_rate": 0.1,
            **{f"seconds_{phase}": 1.0 for phase in PHASES},
        }
        for epoch in range(1, count + 1)
    ]
    write_csv(folder / "epochs.csv", rows)
    write_csv(
        folder / "layers.csv",
        [
            {"epoch": epoch, "layer": f"conv{layer}", **{name: quality + layer for name in METRICS}}
            for epoch in range(1, count + 1)
            for layer in range(layers)
        ],
    )
    measure.write_json(folder / "environment.json", measure.machine())
    status = "diverged" if diverged else "complete"
    (folder / "result.json").write_text(json.dumps({"status": status, "budget_seconds": budget}))


def seeds(out, config, accuracies, **options):
    configs = [replace(config, seed=seed) for seed in range(len(accuracies))]
    for entry, accuracy in zip(configs, accuracies, strict=True):
        write_run(out, entry, accuracy, **options)
    return configs


# --- Statistics


def test_a_paired_difference_is_students():
    a, b = np.array([95.1, 95.4, 95.2, 95.9, 95.0]), np.array([95.0, 95.0, 95.3, 95.2, 94.9])
    found = paired(a, b)
    expected = stats.ttest_rel(a, b)
    assert found.mean == pytest.approx(np.mean(a - b))
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))


def test_pairs_that_do_not_differ_have_no_difference():
    assert paired([1, 2], [1, 2]) == (0.0, 0.0, 0.0, 1.0)


def test_pairs_that_all_differ_by_one_image_show_no_significance():
    a = 100 * np.array([350, 351, 352]) / 360
    found = paired(a, a - 100 / 360)
    assert found.mean == pytest.approx(100 / 360)
    assert found.p == 1.0
    assert np.isnan(found.low)
    assert np.isnan(found.high)


def test_one_pair_says_nothing():
    with pytest.raises(ValueError, match="two pairs"):
        paired([1.0], [2.0])


def test_holm_corrects_the_smallest_most_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_correlations_are_linear_and_of_ranks():
    x = np.array([1.0, 2.0, 3.0, 4.0])
    found = correlation(x, np.exp(5 * x))
    assert found.rocc == pytest.approx(1)
    assert found.plcc == pytest.approx(stats.pearsonr(x, np.exp(5 * x)).statistic)
    assert found.n == 4


def test_constant_or_few_values_do_not_correlate():
    assert correlation([1, 1, 1], [1, 2, 3]) is None
    assert correlation([1, 2], [1, 2]) is None
    assert correlation([1, 2, math.nan, 3], [2, 4, 9, 6]).n == 3


def test_a_difference_is_counted_in_both_deviations_or_the_known_one():
    assert in_deviations(95.0, 0.3, 95.5, 0.4) == pytest.approx(-1)
    assert in_deviations(95.0, math.nan, 95.5, 0.5) == pytest.approx(-1)
    assert math.isnan(in_deviations(95.0, math.nan, 95.5, math.nan))


# --- Measured against published


def test_a_cell_is_compared_with_its_published_number(tmp_path):
    configs = seeds(tmp_path, CELL, [0.950, 0.953, 0.956])
    (row,) = report.rows("table1a", read(tmp_path, configs))
    assert row["seeds"] == 3
    assert row["measured"] == pytest.approx({"mean": 95.3, "std": 0.3})
    assert row["published"] == {"mean": 95.32, "std": 0.07}
    assert row["deviations"] == pytest.approx((95.3 - 95.32) / math.hypot(0.3, 0.07))
    assert row["gap"] == pytest.approx(4.7)


def test_a_run_that_diverged_is_counted_and_left_out(tmp_path):
    configs = seeds(tmp_path, CELL, [0.95, 0.96])
    lost = replace(CELL, seed=2)
    write_run(tmp_path, lost, math.nan, diverged=True, epochs=3)
    (row,) = report.rows("table1a", read(tmp_path, [*configs, lost]))
    assert (row["seeds"], row["diverged"]) == (3, 1)
    assert row["measured"]["mean"] == pytest.approx(95.5)


def test_table_2_reports_after_150_and_250_epochs(tmp_path):
    config = RunConfig("mobilenetv2-imagenet", "imagenet", "sam")
    write_run(tmp_path, config, 0.65)
    first, second = report.rows("table2", read(tmp_path, [config]))
    assert (first["epoch"], second["epoch"]) == (150, 250)
    assert first["measured"]["mean"] == pytest.approx(55.0)
    assert (first["published"]["mean"], second["published"]["mean"]) == (61.41, 63.43)
    assert (first["gap"], second["gap"]) == pytest.approx((45.0, 35.0))  # each of its own epoch


def test_two_optimizers_at_two_epochs_are_not_taken_for_an_order_of_four(tmp_path):
    configs = [RunConfig("mobilenetv2-imagenet", "imagenet", name) for name in ("sam", "sgd")]
    for config, accuracy in zip(configs, (0.65, 0.64), strict=True):
        write_run(tmp_path, config, accuracy)
    assert report.order_agreement(list(report.rows("table2", read(tmp_path, configs)))) == []


OTHER = [
    {"width": 0.5},
    {"epochs": 3},
    {"batch": 64},
    {"dataset": "digits"},
    {"budget": False},
    {"cutout": True},
    {"settings": (("momentum", 0.5),)},
]


@pytest.mark.parametrize("change", OTHER, ids=lambda change: next(iter(change)))
def test_what_is_not_the_papers_cell_gets_no_difference_and_says_why(change, tmp_path):
    config = replace(CELL, **change)
    write_run(tmp_path, config, 0.9, epochs=3)
    (row,) = report.rows("table1a", read(tmp_path, [config]))
    assert row["deviations"] is None
    assert row["published"]["mean"] == 95.32
    assert row["differs"] == list(change)
    said = "other data" if "dataset" in change else f"where the paper has another {next(iter(change))}"
    assert said in report.accuracy_table("table1a", [row]).caption


def test_a_tuned_rate_is_compared_with_the_papers_tuned_rate(tmp_path):
    config = replace(CELL, settings=(("lr", 0.03),))
    write_run(tmp_path, config, 0.9)
    (row,) = report.rows("table1a", read(tmp_path, [config]))
    assert row["deviations"] is not None


def test_epochs_that_a_run_did_not_reach_are_not_reported(tmp_path):
    configs = [RunConfig("mobilenetv2-imagenet", "imagenet", name, budget=True) for name in ("sam", "sgd")]
    for config, epochs in zip(configs, (130, 200), strict=True):
        write_run(tmp_path, config, 0.65, epochs=epochs)
    rows = list(report.rows("table2", read(tmp_path, configs)))
    assert [(row["optimizer"], row["epoch"]) for row in rows] == [("sam", None), ("sgd", 150)]
    assert [row["deviations"] for row in rows] == [None, None]


def test_differences_to_rmsgd_are_tested_seed_by_seed(tmp_path):
    ours, theirs = [0.96, 0.95, 0.97, 0.96], [0.94, 0.95, 0.94, 0.95]
    configs = seeds(tmp_path, replace(CELL, optimizer="rmsgd"), ours)
    configs += seeds(tmp_path, CELL, theirs)
    configs += seeds(tmp_path, replace(CELL, optimizer="adam"), ours)
    sgd, adam = report.comparisons(read(tmp_path, configs))
    expected = stats.ttest_rel(np.multiply(ours, 100), np.multiply(theirs, 100))
    assert (sgd["other"], sgd["seeds"]) == ("sgd", 4)
    assert sgd["p"] == pytest.approx(expected.pvalue)
    assert sgd["p_corrected"] == pytest.approx(2 * expected.pvalue)
    assert (adam["mean"], adam["p"]) == (0.0, 1.0)


def test_a_tuned_rate_is_no_other_optimizer_and_several_rates_are_not_compared(tmp_path):
    tuned = replace(CELL, optimizer="rmsgd", settings=(("lr", 0.1),))
    beta = replace(tuned, settings=(("beta", 0.9), ("lr", 0.1)))
    configs = seeds(tmp_path, tuned, [0.96, 0.95]) + seeds(tmp_path, beta, [0.97, 0.95])
    (entry,) = report.comparisons(read(tmp_path, configs))
    assert (entry["reference"], entry["other"]) == ("rmsgd (lr 0.1)", "rmsgd (beta 0.9, lr 0.1)")
    configs += seeds(tmp_path, replace(tuned, settings=()), [0.9, 0.91])
    assert report.comparisons(read(tmp_path, configs)) == []


def test_seeds_that_make_no_pair_are_named_with_what_became_of_them(tmp_path, capsys):
    ours = seeds(tmp_path, replace(CELL, optimizer="rmsgd"), [0.96, 0.95, 0.97, 0.96])
    sgd = seeds(tmp_path, CELL, [0.94, 0.95])
    lost = replace(CELL, seed=2)
    write_run(tmp_path, lost, math.nan, diverged=True, epochs=3)
    adam = [replace(CELL, optimizer="adam", seed=seed) for seed in range(4)]
    for config in adam:
        write_run(tmp_path, config, 0.9, diverged=config.seed > 0)
    first, second = report.comparisons(read(tmp_path, [*ours, *sgd, lost, *adam]))
    assert first["seeds"] == 2
    assert first["left_out"] == [
        {"seed": 2, "optimizer": "sgd", "why": "diverged"},
        {"seed": 3, "optimizer": "sgd", "why": "not ended"},
    ]
    assert first["p_corrected"] == first["p"]
    assert second["seeds"] == 1
    assert math.isnan(second["p_corrected"])
    assert [entry["seed"] for entry in second["left_out"]] == [1, 2, 3]
    assert main(["study", "report", "table1a", "--out", str(tmp_path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "sgd 2 of 4" in said
    assert (
        "Seeds left out of resnet18, cifar10: adam 1, 2, 3 (diverged); sgd 2 (diverged); sgd 3 (not" in said
    )
    assert "adam, 3 of 4" in said
    assert "adam 1 of 4 - -" in said


def test_a_seed_that_the_reference_lacks_makes_no_pair(tmp_path):
    ours = seeds(tmp_path, replace(CELL, optimizer="rmsgd"), [0.96, 0.95])
    sgd = seeds(tmp_path, CELL, [0.94, 0.95, 0.93])
    (found,) = report.comparisons(read(tmp_path, [*ours, *sgd]))
    assert found["seeds"] == 2
    assert found["left_out"] == [{"seed": 2, "optimizer": "rmsgd", "why": "not ended"}]


@pytest.mark.parametrize(("second", "compared"), [(100.0, 1), (130.0, 0)])
def test_runs_with_different_budgets_are_marked_and_not_compared(second, compared, tmp_path):
    configs = seeds(tmp_path, replace(CELL, optimizer="rmsgd"), [0.95, 0.96], budget=100.0)
    configs += seeds(tmp_path, CELL, [0.94, 0.96], budget=second)
    records = read(tmp_path, configs)
    rows = list(report.rows("table1a", records))
    told = report.accuracy_table("table1a", rows).caption
    assert len(report.comparisons(records)) == compared
    assert ["Not comparable, for different budgets: resnet18 on cifar10 (100.0, 130.0 s)" in told] == [
        not compared
    ]
    assert [row["deviations"] is not None for row in rows] == [bool(compared)] * 2


def test_one_seed_is_not_compared(tmp_path):
    configs = [CELL, replace(CELL, optimizer="rmsgd")]
    for config in configs:
        write_run(tmp_path, config, 0.95)
    assert report.comparisons(read(tmp_path, configs)) == []


def test_metrics_are_correlated_with_accuracy_and_gap(tmp_path):
    configs = [replace(CELL, optimizer=name, epochs=2) for name in ("sgd", "sam", "adam", "sgdp")]
    for config, quality in zip(configs, (0.1, 0.2, 0.4, 0.3), strict=True):
        write_run(tmp_path, config, 0.5 + quality, quality=quality)
    found = {(row["metric"], row["against"]): row for row in report.correlations(read(tmp_path, configs))}
    assert found["Q", "test_accuracy"]["plcc"] == pytest.approx(1)
    assert found["Q", "gap"]["rocc"] == pytest.approx(-1)
    assert found["condition_number", "test_accuracy"]["rocc"] == pytest.approx(-1)


# --- Figures


def write_small(name, out):
    """Write runs of the small preset, as if they had been trained."""
    configs = small(EXPERIMENTS[name]).runs()
    for index, config in enumerate(configs):
        write_run(out, config, 0.9 - 0.01 * (index % 7), quality=0.3 + 0.01 * (index % 5))
    return configs


FIGURES = {
    "table1a": 1,
    "table4": 1,
    "fig1b": 1,
    "fig2": 1,
    "fig3": 2,
    "fig4": 3,
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_experiment_is_drawn(name, tmp_path):
    files = draw(name, read(tmp_path, write_small(name, tmp_path)), tmp_path / "figures")
    assert len(files) >= FIGURES[name]
    for path in files:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.stat().st_size > 5000


def test_figure_3_shows_both_parts_of_tuned_runs(tmp_path, monkeypatch):
    configs = [
        tuning.with_rates(config, {"rmsgd": 0.01, "sgd": 0.3}) for config in small(EXPERIMENTS["fig3"]).runs()
    ]
    for config in configs:
        write_run(tmp_path, config, 0.9)
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure) or path)
    files = draw("fig3", read(tmp_path, configs), tmp_path / "figures")
    assert [path.name for path in files] == ["fig3.png", "fig3-beta.png"]
    # As in every other figure, whatever rates were tuned.
    curves = {line.get_label(): line.get_color() for line in drawn[0].axes[0].get_lines()}
    assert curves["sgd (lr 0.3)"] == figures.style_of("sgd")[0]
    assert curves["rmsgd (lr 0.01)"] == figures.style_of("rmsgd")[0]


def test_every_batch_size_is_on_the_axis_where_an_optimizer_lacks_one(tmp_path, monkeypatch):
    sizes = {"sgd": (128, 256, 512), "rmsgd": (128, 256)}
    configs = [replace(CELL, optimizer=name, batch=size) for name in sizes for size in sizes[name]]
    for config in configs:
        write_run(tmp_path, config, 0.9, epochs=2)
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure) or path)
    draw("fig4", read(tmp_path, configs), tmp_path / "figures")
    (axes,) = drawn[-1].axes
    assert list(axes.get_xticks()) == [128, 256, 512]


def test_the_low_rank_of_kept_weights_is_drawn(tmp_path):
    (config,) = small(EXPERIMENTS["fig1a"]).runs()
    write_run(tmp_path, config, 0.9)
    folder = config.folder(tmp_path) / "weights"
    folder.mkdir()
    for epoch in (0, 3):
        torch.manual_seed(epoch)
        torch.save(models.build("resnet14-digits").state_dict(), folder / f"epoch_{epoch:03d}.pt")
    (path,) = draw("fig1a", read(tmp_path, [config]), tmp_path / "figures")
    assert path.stat().st_size > 5000


def test_nothing_is_drawn_where_all_diverged(tmp_path):
    write_run(tmp_path, CELL, math.nan, diverged=True, epochs=1)
    assert draw("table1a", read(tmp_path, [CELL]), tmp_path / "figures") == []


# --- Tuning


def test_the_grid_is_factors_of_the_optimizers_own_rate_on_a_held_out_part():
    runs = tuning.grid([CELL, replace(CELL, optimizer="sls")], (0.1, 1.0))
    assert [dict(run.settings)["lr"] for run in runs] == [0.01, 0.1]
    assert all(run.holdout for run in runs)


def test_the_best_rate_is_that_of_the_best_mean_and_the_edge_is_told(tmp_path):
    configs = [replace(CELL, seed=seed) for seed in (0, 1)]
    runs = tuning.grid(configs, (0.1, 1.0, 10.0))
    accuracies = {0.01: (0.8, 0.9), 0.1: (0.84, 0.88), 1.0: (0.99, None)}
    for run in runs:
        accuracy = accuracies[dict(run.settings)["lr"]][run.seed]
        write_run(tmp_path, run, accuracy or math.nan, epochs=2, diverged=accuracy is None)
    best = tuning.best(read(tmp_path, runs), (0.1, 1.0, 10.0))["sgd"]
    # 1.0 diverged once; .1 has the higher mean of the last epoch.
    assert best["lr"] == 0.1
    assert not best["at_the_edge"]
    assert best["accuracy"] == pytest.approx({0.01: 85.0, 0.1: 86.0})
    edge = tuning.best(read(tmp_path, [run for run in runs if dict(run.settings)["lr"] == 0.01]), (0.1, 10.0))
    assert edge["sgd"]["at_the_edge"]


def test_tuned_rates_go_through_a_file_and_into_runs_that_set_none(tmp_path):
    path = tmp_path / "rates.json"
    tuning.write(path, {"sgd": {"lr": 0.3, "at_the_edge": False, "accuracy": {0.3: 90.0}}}, CELL)
    rates = tuning.read(path)
    assert tuning.with_rates(CELL, rates).settings == (("lr", 0.3),)
    fixed = replace(CELL, settings=sorted_settings({"lr": 0.01}))
    assert tuning.with_rates(fixed, rates) == fixed
    assert tuning.with_rates(replace(CELL, optimizer="adam"), rates).settings == ()
    assert tuning.with_rates(CELL, {"sgd": 0.1}) == CELL


def test_tuned_rates_leave_a_sweep_over_rates_as_it_is(tmp_path):
    tuning.write(tmp_path / "rates.json", {"sgd": {"lr": 0.03}}, CELL)

    def labels(name, *flags):
        given = ["run", name, "--network", "resnet18", "--dataset", "cifar10", "--optimizers", "sgd"]
        options = command._parser().parse_args([*given, "--seeds", "1", *flags])
        return [run.label for runs in by_experiment(options)[name].values() for run in runs]

    rates = ("--rates", str(tmp_path / "rates.json"))
    swept = ["sgd (lr 0.01)", "sgd (lr 0.03)", "sgd", "sgd (lr 0.3)"]
    assert labels("fig2", *rates) == labels("fig2") == swept
    assert labels("table1a", *rates) == ["sgd (lr 0.03)"]


@pytest.mark.parametrize("content", ["", "[]", '{"optimizers": {"sgd": {}}}', '{"optimizers": 3}'])
def test_a_file_without_rates_is_refused(content, tmp_path):
    (tmp_path / "rates.json").write_text(content)
    with pytest.raises(ValueError, match="holds no rates"):
        tuning.read(tmp_path / "rates.json")


def test_a_missing_file_of_rates_says_what_writes_it(tmp_path):
    with pytest.raises(ValueError, match="study tune"):
        tuning.read(tmp_path / "none.json")


# --- The command


def test_report_prints_every_cell_writes_json_and_draws(tmp_path, capsys):
    write_small("table1a", tmp_path)
    target = tmp_path / "report.json"
    arguments = ["study", "report", "table1a", "--preset", "small", "--out", str(tmp_path)]
    assert main([*arguments, "--json", str(target)]) == 0
    captured = capsys.readouterr()
    assert "resnet34, digits" in captured.out
    assert "95.66 ± 0.17" in captured.out
    assert "other data" in " ".join(captured.out.split())
    assert max(map(len, captured.out.splitlines())) <= 80
    assert "table1a.png" in captured.err
    content = json.loads(target.read_text())
    assert len(content["experiments"]["table1a"]["cells"]) == 22


def test_the_readmes_table_is_written_from_the_runs(tmp_path, capsys):
    configs = [run for run in experiment("digits").runs((0, 1)) if not run.settings]
    for config in configs:
        write_run(tmp_path, config, 0.9 + 0.01 * config.seed, epochs=2)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- measured: study -->\nold\n<!-- /measured -->\nafter\n")
    assert main(["study", "report", "digits", "--out", str(tmp_path), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert "| sgd | 90.50 ± 0.71 |" in text
    assert "+0.00 [+0.00, +0.00] | 1 |" in text
    assert text.startswith("before")
    assert "old" not in text


def test_a_difference_without_spread_has_no_interval(tmp_path, capsys):
    configs = [run for run in experiment("digits").runs((0, 1)) if run.label in ("sgd", "rmsgd")]
    for config in configs:
        write_run(tmp_path, config, 0.9 if config.optimizer == "sgd" else 0.91, epochs=2)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- measured: study -->\n<!-- /measured -->\n")
    assert main(["study", "report", "digits", "--out", str(tmp_path), "--readme", str(readme)]) == 0
    assert "| +1.00 [-] | 1 |" in readme.read_text()
    assert "nan" not in readme.read_text()
    [row] = [line for line in capsys.readouterr().out.splitlines() if "2 of 2" in line]
    assert row.split() == ["sgd", "2", "of", "2", "+1.00", "-", "1", "1"]


def test_one_seed_has_no_deviation_in_the_readmes_table(tmp_path):
    (config,) = [run for run in experiment("digits").runs((0,)) if run.label == "sgd"]
    write_run(tmp_path, config, 0.9, epochs=2)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- measured: study -->\n<!-- /measured -->\n")
    assert main(["study", "report", "digits", "--out", str(tmp_path), "--readme", str(readme)]) == 0
    assert "| sgd | 90.00 |" in readme.read_text()


def test_optimizers_without_a_run_are_named_and_the_rates_asked_for(tmp_path, capsys):
    write_run(tmp_path, CELL, 0.95)
    command = ["study", "report", "table1a", "--optimizers", "sgd,adam", "--out", str(tmp_path)]
    assert main(command) == 0
    assert "table1a: no ended run of adam; where they were run with --rates FILE" in capsys.readouterr().err


def test_the_readmes_table_needs_the_runs_on_digits(tmp_path, capsys):
    write_run(tmp_path, CELL, 0.95)
    arguments = [
        "study",
        "report",
        "table1a",
        "--out",
        str(tmp_path),
        "--readme",
        str(tmp_path / "README.md"),
    ]
    assert main(arguments) == 2
    assert "digits and cifar10-rules: report one of them" in capsys.readouterr().err


def test_an_optimizer_that_always_diverged_has_no_figures(tmp_path, capsys):
    write_run(tmp_path, CELL, math.nan, diverged=True, epochs=1)
    assert main(["study", "report", "table1a", "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "diverged - - - -" in " ".join(captured.out.split())
    assert "nan" not in captured.out
    # Nor has one seed of a table without deviations a difference in deviations.
    write_run(tmp_path, RunConfig("resnet50-imagenet", "imagenet", "sgd", batch=256), 0.76)
    assert main(["study", "report", "table3", "--out", str(tmp_path)]) == 0
    assert "nan" not in capsys.readouterr().out
    assert "wrote" not in captured.err


def test_report_of_nothing_says_where_it_looked(tmp_path, capsys):
    assert main(["study", "report", "table3", "--out", str(tmp_path)]) == 2
    assert f"{tmp_path} has no ended run of table3" in " ".join(capsys.readouterr().err.split())


def test_tune_trains_the_grid_and_keeps_the_best(tmp_path, capsys):
    arguments = ["study", "tune", "digits", "--optimizers", "sgd", "--epochs", "1", "--batch", "512"]
    status = main([*arguments, "--seeds", "1", "--factors", "0.001,1", "--out", str(tmp_path)])
    captured = capsys.readouterr()
    assert status == 0
    assert "held-out" in captured.out
    assert tuning.read(tmp_path / "rates.json")["sgd"] in (0.0001, 0.1)


def test_tune_searches_the_rate_of_an_optimizer_whose_other_settings_are_changed(tmp_path, capsys):
    arguments = [
        "study",
        "tune",
        "digits",
        "--optimizers",
        "rmsgd,sgd,sls",
        "--epochs",
        "1",
        "--batch",
        "512",
    ]
    changed = ["--set", "sgd.momentum=0", "--factors", "1", "--out", str(tmp_path)]
    assert main([*arguments, *changed]) == 0
    assert tuning.read(tmp_path / "rates.json").keys() == {"rmsgd", "sgd"}
    runs = [json.loads(path.read_text()) for path in tmp_path.rglob("config.json")]
    assert sorted((run["optimizer"], run["settings"]) for run in runs) == [
        ("rmsgd", {"lr": 0.03}),
        ("sgd", {"lr": 0.1, "momentum": 0}),
    ]
    assert "sls: searches its rate itself" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--optimizers", "sls"], "no optimizer is left to tune"), (["--set", "sgd.lr=1"], "tune searches lr")],
)
def test_tune_says_what_it_cannot_search(arguments, message, tmp_path, capsys):
    assert main(["study", "tune", "digits", *arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_factors_that_are_no_factors_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["study", "tune", "digits", "--factors", "0,1"])
    assert "expected positive numbers" in capsys.readouterr().err


def test_the_study_on_digits_is_no_part_of_the_paper():
    assert "digits" not in EXPERIMENTS
    runs = experiment("digits").runs()
    settings = [dict(run.settings) for run in runs if run.optimizer == "rmsgd"]
    assert {"gamma": 0.9, "step_size": 1} in settings
    assert {"beta": 0.8} in settings
    assert {} in settings


def test_an_optimizer_that_diverged_at_every_rate_is_named_and_the_others_are_tuned(tmp_path, capsys):
    arguments = ["study", "tune", "digits", "--optimizers", "sgd,rmsgd", "--epochs", "1", "--batch", "512"]
    changed = ["--set", "sgd.weight_decay=1e30", "--factors", "1", "--out", str(tmp_path)]
    assert main([*arguments, *changed]) == 1
    assert "diverged in every run: sgd" in capsys.readouterr().err
    assert tuning.read(tmp_path / "rates.json").keys() == {"rmsgd"}


def test_no_rate_is_chosen_while_another_process_is_at_the_grid(tmp_path, capsys):
    arguments = ["study", "tune", "digits", "--optimizers", "sgd", "--epochs", "1", "--batch", "512"]
    config = RunConfig("resnet14-digits", "digits", "sgd", epochs=1, batch=512, width=0.5)
    (run,) = tuning.grid([config], (1.0,))
    run.folder(tmp_path).mkdir(parents=True)
    with locked(run.folder(tmp_path)):
        assert main([*arguments, "--seeds", "1", "--factors", "1", "--out", str(tmp_path)]) == 1
    assert "another process is at 1" in capsys.readouterr().err
    assert not (tmp_path / "rates.json").exists()


# --- The search of an experiment that tunes its own rates


def searched(accuracies):
    """The rates that a search tries if SGD has these accuracies, the best, and whether it is at the edge."""
    config = RunConfig("resnet8-stride2", "cifar10", "sgd", schedule="cosine")
    tried, known = [], {}
    while True:
        found = tuning.search(config, known.get)
        if found.best:
            return tried, dict(found.best.settings)["lr"], found.at_the_edge
        assert all(run.holdout and run.schedule == "cosine" for run in found.missing)
        for run in found.missing:
            rate = dict(run.settings)["lr"]
            tried.append(rate)
            known[run] = accuracies[rate]


def test_a_search_goes_on_beyond_the_best_rate_until_it_lies_between_two_others():
    inner = {0.03: 0.5, 0.1: 0.6, 0.3: 0.4}
    assert searched(inner) == ([0.03, 0.1, 0.3], 0.1, False)
    low = {0.03: 0.6, 0.1: 0.5, 0.3: 0.4, 0.01: 0.7, 0.003: 0.3}
    assert searched(low) == ([0.03, 0.1, 0.3, 0.01, 0.003], 0.01, False)
    high = {0.03: 0.1, 0.1: 0.2, 0.3: 0.3, 1.0: 0.4, 3.0: 0.5}
    assert searched(high) == ([0.03, 0.1, 0.3, 1.0, 3.0], 3.0, True)


def test_a_search_passes_over_rates_that_diverged_and_takes_the_usual_one_of_equals():
    diverged = {0.03: 0.5, 0.1: 0.6, 0.3: -math.inf}
    assert searched(diverged) == ([0.03, 0.1, 0.3], 0.1, False)
    assert searched({0.03: 0.5, 0.1: 0.5, 0.3: 0.5}) == ([0.03, 0.1, 0.3], 0.1, False)


def test_an_experiment_that_tunes_trains_the_search_and_then_its_parts_with_the_rates_found(tmp_path, capsys):
    arguments = [
        "cifar10-small",
        "--preset",
        "small",
        "--epochs",
        "1",
        "--optimizers",
        "sgd",
        "--out",
        str(tmp_path),
    ]
    assert main(["study", "run", *arguments, "--part", "tuning"]) == 0
    runs = {folder: json.loads((folder / "config.json").read_text()) for folder in tmp_path.glob("*/sgd*")}
    assert all(config["holdout"] for config in runs.values())
    assert {config["schedule"] for config in runs.values()} == {"constant", "step", "cosine", "onecycle"}
    tuned = {}
    for folder, config in runs.items():
        accuracy = json.loads((folder / "result.json").read_text())["final"]["test_accuracy"]
        tuned.setdefault(config["schedule"], {})[config["settings"]["lr"]] = accuracy
    assert main(["study", "run", *arguments, "--part", "main", "--seeds", "2"]) == 0
    for folder in set(tmp_path.glob("*/sgd*")) - runs.keys():
        config = json.loads((folder / "config.json").read_text())
        tried = tuned[config["schedule"]]
        assert tried[config["settings"].get("lr", 0.1)] == max(tried.values())
    assert "accuracy on the held-out part" in capsys.readouterr().out


def test_a_part_that_an_experiment_has_not_is_answered_with_those_it_has(tmp_path, capsys):
    arguments = ["study", "run", "cifar10-small", "--part", "ratse", "--out", str(tmp_path)]
    assert main(arguments) == 2
    assert "Did you mean 'rates'" in capsys.readouterr().err


# --- Parts, and the table of records


def test_the_smallest_difference_seen_has_the_power_that_is_asked_for():
    # Student's t by simulation: so many experiments of five pairs with that true difference.
    least = detectable(2.0, 5)
    drawn = np.random.default_rng(0).normal(least, 2.0, size=(20_000, 5))
    assert np.mean(stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.01)
    assert detectable(2.0, 50) < least
    assert math.isnan(detectable(2.0, 2))
    assert math.isnan(detectable(0.0, 5))


def test_a_bootstrap_interval_covers_the_correlation_that_the_points_were_drawn_with():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        x, y = random.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], size=60).T
        _, low, high = bootstrapped(x, y, range(60), resamples=200)["plcc"]
        covered += low <= 0.6 <= high
    assert 50 <= covered <= 60


def test_within_clusters_only_what_differs_inside_them_counts():
    # Between the two clusters y falls as x rises, within each it rises.
    x, y = np.array([0, 1, 2, 10, 11, 12]), np.array([10, 11, 12, 0, 1, 2])
    clusters = "aaabbb"
    assert bootstrapped(x, y, clusters, centred=True)["plcc"][0] == pytest.approx(1.0)
    assert bootstrapped(x, y, range(6))["plcc"][0] < -0.9
    assert bootstrapped(x, y, clusters) is None
    assert bootstrapped(x, np.zeros(6), range(6)) is None


def test_labels_say_what_tells_configurations_apart_and_no_more(tmp_path):
    cosine = RunConfig("resnet18", "cifar10", "sam", schedule="cosine", settings=(("lr", 0.3),))
    fewer = replace(cosine, epochs=100)
    many = RunConfig("resnet18", "cifar10", "rmsgd", schedule="constant", measurements=30)
    other = replace(many, settings=(("beta", 0.9),))
    for config in (cosine, fewer, many, other):
        seeds(tmp_path, config, (0.5, 0.6))
    configs = [replace(config, seed=seed) for config in (cosine, fewer, many, other) for seed in (0, 1)]
    assert list(parts.by_configuration(read(tmp_path, configs))) == [
        "sam cosine, 250 epochs",
        "sam cosine, 100 epochs",
        "rmsgd constant, beta 0.98",
        "rmsgd constant, beta 0.9",
    ]


SMALL = ("cifar10-small", "--preset", "small", "--epochs", "1", "--optimizers", "sgd,rmsgd", "--seeds", "2")


def test_the_report_is_the_same_from_the_table_of_records_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(part_plots, "draw", lambda *arguments: drawn.append(arguments[1:]) or [])
    drawn = []
    out, kept = tmp_path / "out", tmp_path / "records" / "kept.csv"
    chosen = [*SMALL, "--schedules", "constant", "--part", "main"]
    assert main(["study", "run", *chosen, "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["study", "report", *chosen, "--out", str(out), "--save-records", str(kept)]) == 0
    first = capsys.readouterr().out
    (out / "digits-resnet8-stride2").rename(tmp_path / "away")
    alone = tmp_path / "alone"
    assert main(["study", "report", *chosen, "--out", str(alone), "--records", str(kept)]) == 0
    assert capsys.readouterr().out == first
    assert "rmsgd constant" in first
    # The figures are drawn from the same: runs, their layers where they are drawn, and the search.
    for first_part, again in zip(*(parts_drawn["main"] for parts_drawn, _, _ in drawn), strict=True):
        assert first_part.config == again.config
        assert first_part.final["test_accuracy"] == pytest.approx(again.final["test_accuracy"])
    best = [parts.best(parts_drawn["main"], "rmsgd") for parts_drawn, _, _ in drawn]
    assert best[0].layers.keys() == best[1].layers.keys() != set()


def test_the_rules_of_layer_rates_are_held_against_sgd_in_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(part_plots, "draw", lambda *arguments: [])
    runs = experiment("cifar10-rules").runs(range(9))
    assert len(runs) == 12
    plus = {"sgd": 0.0, "sgd-rank-momentum": 0.01, "sgd-tempbalance": 0.02, "sgd-llr": -0.1}
    for run in runs:
        write_run(tmp_path, run, 0.5 + 0.01 * run.seed + plus[run.optimizer] * (1 + 0.1 * run.seed))
    page = tmp_path / "page.md"
    page.write_text("<!-- measured: cifar10-rules -->\n<!-- /measured -->\n")
    kept = tmp_path / "study-cifar10-rules.json"
    arguments = [
        "report",
        "cifar10-rules",
        "--out",
        str(tmp_path),
        "--readme",
        str(page),
        "--json",
        str(kept),
    ]
    assert main(["study", *arguments]) == 0
    lines = page.read_text().splitlines()
    assert re.search(r"^\| sgd \| 51\.00 \[.*\] \| - \| - \|$", page.read_text(), re.MULTILINE)
    (tempbalance,) = (line for line in lines if line.startswith("| sgd-tempbalance |"))
    assert "| +2.20 [+1.70, +2.70] |" in tempbalance
    (llr,) = (line for line in lines if line.startswith("| sgd-llr |"))
    assert "| -11.00 [-13.48, -8.52] |" in llr
    # The same table comes from the JSON alone.
    content = json.loads(kept.read_text())
    rows = parts.rules_rows(content["experiments"]["cifar10-rules"])
    again = tmp_path / "again.md"
    again.write_text("<!-- measured: cifar10-rules -->\n<!-- /measured -->\n")
    readme.rewrite(again, {"machine": content["machine"], "cifar10-rules": rows})
    assert again.read_text() == page.read_text()


def test_every_part_is_drawn_and_has_a_table(tmp_path):
    ended = {}
    for part in experiment("cifar10-small").parts[1:]:
        runs = experiment("cifar10-small").part(part).runs((0, 1) if part == "main" else (0,))
        for index, config in enumerate(runs):
            if not config.folder(tmp_path).exists():  # parts share runs
                write_run(tmp_path, config, 0.4 + 0.01 * (index % 7), quality=0.1 * (index % 5), epochs=3)
        ended[part] = read(tmp_path, runs)
    content, tables = parts.tables(ended, {})
    assert len(tables) > len(ended)
    assert content["main"]["comparisons"][0]["reference"] == "rmsgd constant"
    assert "10,000 training images" in content["main"]["size"]
    written = part_plots.draw(tmp_path / "figures" / "study", ended, {})
    assert [path.name for path in written] == [
        "study.png",
        "study-layers.png",
        "study-measurements.png",
        "study-rates.png",
        "study-metrics-cifar10.png",
    ]


def test_a_table_of_records_says_by_which_revision_a_run_was_begun(tmp_path):
    (config,) = seeds(tmp_path, CELL, [0.5], epochs=2)
    path = tmp_path / "kept.csv"
    (record,) = read(tmp_path, [config])
    table.write(path, [replace(record, revision="0123abc")])
    assert table.read(path)[config].revision == "0123abc"
    rows = list(csv.DictReader(path.open()))
    write_csv(path, [{name: value for name, value in row.items() if name != "revision"} for row in rows])
    older = table.read(path)[config]
    assert older.revision is None
    assert older.epochs == record.epochs


@pytest.mark.parametrize(
    "content", ["", "optimizer,seed\nsgd,0\n", "optimizer,settings,seed,run,status,epoch\nsgd\n"]
)
def test_what_is_no_table_of_records_is_refused(content, tmp_path, capsys):
    path = tmp_path / "records.csv"
    path.write_text(content)
    arguments = ["study", "report", *SMALL, "--out", str(tmp_path), "--records", str(path)]
    assert main(arguments) == 2
    assert "not a table of records" in capsys.readouterr().err


# --- Runs that fit a time


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (10_000, (30, 5)),  # everything that is wanted
        (500, (30, 4)),  # all epochs with three seeds leave time for a fourth
        (300, (25, 3)),  # three seeds come before further epochs
        (60, (7, 2)),  # three seeds of five epochs would be less than a fifth of thirty
        (8, (2, 1)),  # one seed of whatever fits
    ],
)
def test_three_seeds_come_first_then_epochs_then_seeds(seconds, expected):
    found = fit.fitting([1.0, 3.0], seconds, most_epochs=30, most_seeds=5)
    assert (found.epochs, found.seeds) == expected
    assert found.seconds <= seconds


def test_a_time_in_which_nothing_fits_is_refused():
    with pytest.raises(ValueError, match="an epoch of every optimizer takes 4 s"):
        fit.fitting([1.0, 3.0], 3, 30, 5)


def test_what_fits_a_time_is_decided_once_run_seed_by_seed_and_reported(tmp_path, capsys, monkeypatch):
    arguments = ["cifar10-gpu", "--preset", "small", "--minutes", "1", "--seeds", "2", "--device", "cpu"]
    arguments += ["--optimizers", "sgd", "--out", str(tmp_path)]
    monkeypatch.setattr(fit, "_seconds_per_epoch", lambda runner, config: 20.0)
    assert main(["study", "run", *arguments]) == 0
    monkeypatch.setattr(fit, "_seconds_per_epoch", None)
    assert main(["study", "run", *arguments]) == 0
    assert "1 epoch with 2 seeds of every optimizer" in capsys.readouterr().err
    kept = [json.loads(path.read_text()) for path in tmp_path.glob("digits-resnet18/*/config.json")]
    assert {config["epochs"] for config in kept} == {1}
    assert {config["precision"] for config in kept} == {"bf16"}
    assert sorted(config["seed"] for config in kept) == [0, 1]
    assert main(["study", "report", *arguments]) == 0
    assert "sgd step" in capsys.readouterr().out


def test_steps_are_timed_on_the_runs_own_network(tmp_path):
    place = Runner(Place(tmp_path))
    config = RunConfig("resnet14-digits", "digits", "sam", batch=64, epochs=1)
    assert 0 < fit._seconds_per_epoch(place, config) < 600


def test_minutes_that_no_run_was_given_are_said_to_be_unknown_to_the_report(tmp_path, capsys):
    arguments = ["study", "report", "cifar10-gpu", "--preset", "small", "--minutes", "1"]
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    assert "knows of no such runs" in capsys.readouterr().err


# --- What was measured on CIFAR-10


RECORDS = Path(__file__).parents[1] / "bench" / "results" / "cifar10-small.csv"


def test_the_records_of_cifar_10_are_small_and_have_all_seeds_of_the_main_table():
    assert RECORDS.stat().st_size < 1_000_000
    known = table.read(RECORDS)
    judged = [record for record in known.values() if not record.config.holdout]
    assert all(len(record.epochs) == record.config.epochs for record in judged)
    asked = {run.variant for run in experiment("cifar10-small").part("main").runs((0,))}
    of_five = [mine for mine in parts.by_configuration(judged).values() if len(mine) == 5]
    assert asked <= {mine[0].config.variant for mine in of_five}
    assert {record.config.optimizer for record in known.values() if record.layers} == {"rmsgd", "sgd"}


def test_the_report_of_cifar_10_comes_from_its_records_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(part_plots, "draw", lambda *arguments: [])
    arguments = ["cifar10-small", "--records", str(RECORDS), "--out", str(tmp_path)]
    assert main(["study", "report", *arguments]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "10,000 training images, 6 epochs, 5,000 test images" in said
    assert "test accuracy of rmsgd cosine minus another's (%)" in said
    assert "accuracy on the held-out part (%) by learning rate" in said


def test_a_part_that_only_shares_the_runs_of_others_is_not_shown_again(tmp_path):
    runs = seeds(tmp_path, RunConfig("resnet18", "cifar10", "sgd", schedule="constant"), (0.5, 0.6, 0.7))
    records = read(tmp_path, runs)
    shown = parts.with_own_runs({"main": records[:2], "rates": records[:1], "batches": records[1:]})
    assert list(shown) == ["main", "batches"]
