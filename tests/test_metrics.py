"""A metric is declared once and every view shows it; a network without a measured layer has no quality."""

import dataclasses
import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import rmsgd
from rmsgd import metrics
from rmsgd.inspection.report.comparison import Comparison
from rmsgd.inspection.report.comparison_table import comparison_table
from rmsgd.inspection.report.layer_table import layer_table
from rmsgd.inspection.report.series import Series
from rmsgd.inspection.report.series_table import series_table
from rmsgd.integrations import log_dict

NOTHING = rmsgd.Report((rmsgd.LayerMetrics.skip("codes", (4, 4), "packed"),))


def test_every_declared_metric_is_a_field_of_a_layer():
    fields = {field.name for field in dataclasses.fields(rmsgd.LayerMetrics)}
    assert fields - {"name", "shape", "modes", "skipped"} == {metric.name for metric in metrics.METRICS}


@pytest.mark.parametrize(
    "metric", [*metrics.METRICS, metrics.NETWORK_QUALITY], ids=lambda metric: metric.label
)
def test_a_metric_says_what_it_is(metric):
    assert all((metric.label, metric.heading, metric.symbol, metric.formula, metric.meaning, metric.range))
    assert metric.help.endswith(".")
    assert metric.text(3) if metric.format == "d" else metric.text(0.25)
    assert metric.text(math.nan) == "-"


# A metric that only `metrics.py` knows, and every view of two networks that have it.
NEW_METRIC = """
MADE_UP = Metric(
    "made_up", label="made-up metric", heading="made up", symbol="a", formula="q + 8", meaning="exponent",
    range="8 to 10", better="lower", format=".3f", help="A number.", 
    derive=lambda known: known["quality"] + 8,
)
METRICS = ("""
VIEWS = """
import sys, torch, rmsgd
from rmsgd.cli import main
from rmsgd.integrations import log_dict
first, second = sys.argv[1:]
torch.manual_seed(0)
for path in (first, second):
    torch.save({"fc.weight": torch.randn(20, 2) @ torch.randn(2, 30) + 0.1 * torch.randn(20, 30)}, path)
main(["probe", first, "--csv", first + ".csv", "--html", first + ".html", "--plot", first + ".svg"])
main(["probe", first, second, "--csv", first + ".series.csv", "--plot", first + ".series.svg"])
main(["probe", "--compare", first, second, "--csv", first + ".comparison.csv"])
main(["probe", "--compare", first, second, "--json"])
optimizer = rmsgd.RMSGD([("fc.weight", torch.nn.Parameter(torch.load(first)["fc.weight"]))])
optimizer.epoch_step()
print(*log_dict(optimizer), optimizer.report()._repr_html_())
"""


def test_a_metric_that_is_declared_appears_in_every_view(tmp_path):
    shutil.copytree(Path(rmsgd.__file__).parent, tmp_path / "rmsgd", ignore=shutil.ignore_patterns("_csrc"))
    module = tmp_path / "rmsgd/metrics.py"
    source = module.read_text(encoding="utf-8")
    source = source.replace("\nMETRICS = (", NEW_METRIC, 1)
    source = source.replace("    NOISE_VARIANCE,\n", "    NOISE_VARIANCE,\n    MADE_UP,\n", 1)
    source = source.replace("    quality: float\n", "    quality: float\n    made_up: float\n", 1)
    module.write_text(source, encoding="utf-8")
    checkpoints = [str(tmp_path / "first.pt"), str(tmp_path / "second.pt")]
    done = subprocess.run(
        [sys.executable, "-c", VIEWS, *checkpoints], cwd=tmp_path, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    headers = [line for line in done.stdout.splitlines() if line.startswith(("layer ", "source "))]
    assert len(headers) == 4  # a report, a series' checkpoints and layers, a comparison
    assert all(re.search(r"condition.* made up", line) for line in headers)
    assert '"made_up": 8' in done.stdout
    assert "made_up/fc.weight" in done.stdout
    assert '<th title="A number.">made up</th>' in done.stdout
    for name, column in (
        ("csv", "made_up"),
        ("series.csv", "made_up"),
        ("comparison.csv", "made_up_change"),
    ):
        assert column in (tmp_path / f"first.pt.{name}").read_text().splitlines()[0]
    for name in ("html", "svg", "series.svg"):
        assert "made-up metric" in (tmp_path / f"first.pt.{name}").read_text()


# -- nothing measured ----------------------------------------------------------------------------


@pytest.mark.parametrize("report", [rmsgd.Report(()), NOTHING], ids=["no layer", "all skipped"])
def test_the_quality_of_a_network_of_which_nothing_was_measured_is_undefined(report):
    assert math.isnan(report.quality)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["quality"] is None


def test_a_network_that_was_measured_and_has_no_low_rank_has_quality_0():
    torch.manual_seed(0)
    assert rmsgd.probe({"noise": torch.randn(40, 60)}).quality == 0.0


def text_of(table):
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=200).print(table)
    return out.getvalue()


def test_an_undefined_quality_is_a_dash_in_every_table():
    known = rmsgd.probe({"fc": torch.outer(torch.ones(8), torch.ones(9)) + 0.01 * torch.randn(8, 9)})
    series, comparison = Series(("a", "b"), (NOTHING, known)), Comparison(("a", "b"), NOTHING, known)
    assert "Q = - over 0 layers, 1 skipped" in text_of(layer_table(NOTHING.layers, "a"))
    assert text_of(series_table(series)).splitlines()[2].split() == ["a", "0", "-", "-", "-", "-"]
    assert "Q = - -> " in text_of(comparison_table(comparison))
    assert comparison.to_dict()["quality"] == [None, known.quality]
    assert "Q = -" in NOTHING._repr_html_()


@pytest.mark.filterwarnings("ignore:NaN or infinite weights")
def test_a_log_has_no_quality_of_a_network_of_which_nothing_was_measured():
    network = nn.Linear(6, 8)
    optimizer = rmsgd.RMSGD(network.named_parameters())
    with torch.no_grad():
        network.weight[0, 0] = math.nan
    optimizer.epoch_step()
    logged = log_dict(optimizer)
    assert set(logged) == {"learning_rate/weight", "learning_rate/bias"}
    assert np.isfinite(list(logged.values())).all()


def test_layers_are_equal_where_the_same_numbers_are_undefined():
    skipped = rmsgd.LayerMetrics.skip("w", (3, 4), "no weight")
    again = rmsgd.LayerMetrics.skip("w", (3, 4), "no weight")
    again = dataclasses.replace(again, quality=float("nan"), tail_exponent=float("nan"))
    assert skipped == again
    assert hash(skipped) == hash(again)
    assert skipped != dataclasses.replace(again, quality=0.5)
    assert skipped != dataclasses.replace(again, name="v")
    assert skipped != "w"
