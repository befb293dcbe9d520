"""What layer-wise rates cost and are worth: what is compared is the same work, and runs are kept."""

import json
import re

import pytest
import torch
from torch import nn

from bench.__main__ import main
from bench.layer_rates import language, speed
from bench.networks import OneLinear


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small networks, and a short text of few characters."""
    made = {
        "conv": lambda: nn.Sequential(
            nn.Conv2d(8, 12, 3), nn.Conv2d(12, 8, 3), nn.Flatten(), nn.Linear(8, 60)
        ),
        "linear": lambda: OneLinear(60),
    }
    monkeypatch.setattr(speed, "network", lambda name: made["conv" if name == "resnet18" else "linear"]())
    monkeypatch.setattr(language, "text", lambda: (torch.arange(3000) % 7, torch.arange(2000) % 7))
    monkeypatch.setattr(language, "WIDTH", 1 / 6)
    monkeypatch.setattr(language, "EVERY", 2)
    monkeypatch.setattr(language, "HELD_OUT", 1)
    monkeypatch.setattr(language, "LENGTH", 16)


def test_the_loop_of_svds_finds_the_exponents_that_layer_rates_finds(one_thread):
    for model in ("resnet18", "linear-60"):
        row = speed.epoch_end(model, 1)
        assert row["compared"] == row["layers"]
        assert row["exponents_apart"] < 0.01
        assert set(row["ratio"]) == {"rank-momentum", "tempbalance"}


def test_the_steps_that_are_compared_are_of_one_group_and_of_many():
    row = speed.step("resnet18", 1)
    assert row["groups"] == 3
    assert row["tensors"] == 6
    assert set(row["seconds"]) == {"one group", "a group per layer", "with LayerRates"}


def test_the_first_losses_of_all_variants_are_the_same_and_runs_are_not_repeated(tmp_path, monkeypatch):
    found = language.runs(tmp_path, 2, 4, lambda: None)
    assert {name: len(of_seeds) for name, of_seeds in found.items()} == dict.fromkeys(language.VARIANTS, 2)
    for seed in range(2):
        first = {name: of_seeds[seed]["training"][0] for name, of_seeds in found.items()}
        assert max(first.values()) - min(first.values()) < 0.5
    assert found["llr"][0]["highest"] == pytest.approx(5.0)
    assert found["adamw"][0]["highest"] == 1.0
    monkeypatch.setattr(language, "run", None)
    assert language.runs(tmp_path, 2, 4, lambda: None) == json.loads(
        next(tmp_path.glob("language-*.json")).read_text()
    )
    rows = {row["variant"]: row for row in language.summary(found)}
    expected = sum(
        a["held_out"][-1] - b["held_out"][-1] for a, b in zip(found["llr"], found["adamw"], strict=True)
    )
    assert rows["llr"]["held_out_difference"][0] == pytest.approx(expected / 2)


def test_the_command_writes_what_it_measured(tmp_path, capsys, one_thread):
    page = tmp_path / "page.md"
    tables = ("layer-rates-step", "layer-rates-end", "layer-rates-gpt")
    page.write_text("".join(f"<!-- measured: {name} -->\n<!-- /measured -->\n" for name in tables))
    flags = [
        "--readme",
        str(page),
        "--models",
        "resnet18",
        "--rounds",
        "1",
        "--seeds",
        "2",
        "--steps",
        "4",
        "--out",
        str(tmp_path),
    ]
    assert main(["layer-rates", *flags]) == 0
    written = json.loads((tmp_path / "layer-rates.json").read_text())
    assert {"layer-rates-step", "layer-rates-end", "layer-rates-gpt", "runs", "machine"} <= set(written)
    assert re.search(r"\| resnet18 \| 6 \| 3 \| \d", page.read_text())
    assert re.search(r"\| llr \| \d\.\d{3} \|", page.read_text())
    assert (tmp_path / "layer-rates-gpt.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "A measurement of all layers" in said
    assert "tempbalance" in said
    assert main(["layer-rates", "--parts", "nothing", "--out", str(tmp_path)]) == 2
