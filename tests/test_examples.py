"""The scripts in examples/ run, and show what their first lines say."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch, one_thread):
    """Import one of them by name, as `python examples/NAME.py` would find it and its neighbours."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(str(getattr(sys.modules[name], "__file__", ""))).parent == EXAMPLES:
            del sys.modules[name]


def test_images_are_learned(example, capsys):
    pytest.importorskip("sklearn")
    assert example("images").main(["--epochs", "3"]) > 0.9
    out = capsys.readouterr().out
    assert "epoch  3" in out
    assert "10.weight" in out


def test_a_pretrained_network_keeps_its_rates_under_the_default_rule_and_not_under_the_letter(example):
    pytest.importorskip("sklearn")
    highest = example("finetune").main(["--epochs", "1"])
    assert highest["paper"] > 3 * highest["bounded"]
    assert 0.005 <= highest["bounded"] <= 0.02


def test_a_language_model_learns_without_epochs(example, capsys):
    losses = example("language_model").main(["--steps", "60", "--every", "20"])
    assert len(losses) == 3
    assert losses[-1] < losses[0] - 0.3
    assert capsys.readouterr().out.count("rates") == 3


def test_a_language_model_learns_under_adamw_with_a_rate_per_layer(example, capsys):
    losses, ratios = example("layer_rates").main(["--steps", "40", "--every", "20", "--rule", "llr"])
    assert losses[1] < losses[0] - 0.3
    assert ratios["embedding.weight"] == ratios["head.weight"] == pytest.approx(5.0)
    assert 1.0 <= min(ratios.values()) < 1.1  # on its way to 1
    assert "to 5.000" in capsys.readouterr().out


def test_a_series_of_checkpoints_becomes_pages(example, tmp_path, capsys):
    for needed in ("sklearn", "matplotlib", "jinja2"):
        pytest.importorskip(needed)
    index = example("probe_series").main(["--epochs", "2", "--out", str(tmp_path / "made")])
    text = index.read_text(encoding="utf-8")
    assert "epoch_1.html" in text
    assert "epoch_2.html" in text
    assert (tmp_path / "made" / "series.png").stat().st_size > 10_000
    assert "3.weight" in (tmp_path / "made" / "epoch_2.html").read_text(encoding="utf-8")


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="no gloo")
def test_two_processes_have_the_same_rates():
    done = subprocess.run([sys.executable, EXAMPLES / "ddp.py"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "largest difference of weights: 0.0" in done.stdout
    assert "largest difference of learning rates: 0.0" in done.stdout


def test_every_example_says_how_to_run_it_and_is_tested():
    tested = Path(__file__).read_text(encoding="utf-8")
    for script in EXAMPLES.glob("*.py"):
        first = script.read_text(encoding="utf-8").split('"""')[1]
        assert f"python examples/{script.name}" in first
        assert f'"{script.stem}' in tested
