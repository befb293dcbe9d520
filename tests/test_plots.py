"""Figures are drawn without a display, from plain values, and name a missing package."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from rmsgd import cli, plots
from rmsgd.extras import install_command

PNG = b"\x89PNG"


@pytest.mark.parametrize("layers", [1, 2, 20, 200])
def test_layer_curves_are_drawn_for_any_number_of_layers(tmp_path, layers):
    curves = {f"layers.{index}.conv.weight": np.linspace(0.03, 0.01 * index, 5) for index in range(layers)}
    path = tmp_path / "figure.png"
    plots.layer_curves(path, curves, ylabel="learning rate")
    assert path.read_bytes().startswith(PNG)


def test_curves_are_named_at_their_ends_and_those_that_end_alike_together(tmp_path):
    ends = {
        "a.weight": 0.03,
        "b.weight": 0.03,
        "c.weight": 0.09,
        "d.weight": 0.03,
        "e.weight": float("nan"),
    }  # the gap shows a run that ended before
    plots.layer_curves(tmp_path / "f.svg", {name: [0.03, end] for name, end in ends.items()}, ylabel="rate")
    drawn = (tmp_path / "f.svg").read_text()
    assert "<!-- a and 3 more -->" in drawn
    assert "<!-- c -->" in drawn
    assert "<!-- b -->" not in drawn


def test_gaps_single_epochs_and_logarithms_are_drawn(tmp_path):
    plots.layer_curves(tmp_path / "one.png", {"a": [0.1]}, ylabel="stable rank")
    plots.layer_curves(tmp_path / "gap.svg", {"a": [0.1, float("nan"), 0.3]}, ylabel="stable rank")
    plots.layer_curves(tmp_path / "log.pdf", {"a": [0.0, 1e-3, 1.0]}, ylabel="rate", log=True)
    assert all(path.stat().st_size > 1000 for path in tmp_path.iterdir())


def drawn_figures(monkeypatch):
    """The figures that are written from now on."""
    figures = []
    write = Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda self, *args, **options: (figures.append(self), write(self, *args, **options)),
    )
    return figures


def test_no_label_of_a_figure_of_the_probe_is_cut_off(tmp_path, monkeypatch):
    figures = drawn_figures(monkeypatch)
    torch.manual_seed(0)
    for epoch in (1, 2, 3):
        weights = {f"{i}.weight": torch.randn(20, 32) + epoch * torch.randn(20, 1) for i in range(4)}
        torch.save(weights, tmp_path / f"epoch_{epoch}.pt")
    epochs = [str(tmp_path / f"epoch_{epoch}.pt") for epoch in (1, 2, 3)]
    assert cli.main(["probe", epochs[0], "--plot", str(tmp_path / "one.png")]) == 0
    assert cli.main(["probe", *epochs, "--plot", str(tmp_path / "series.png")]) == 0
    for figure in figures:
        FigureCanvasAgg(figure).draw()
        page = figure.bbox.padded(1)  # px
        # Short texts are left out: among them are ticks beyond the ends of an axis, which are not drawn.
        texts = [text for text in figure.findobj(Text) if len(text.get_text()) > 8]
        assert len(texts) > 4
        for text in texts:
            box = text.get_window_extent()
            assert page.x0 <= box.x0 <= box.x1 <= page.x1, text
            assert page.y0 <= box.y0 <= box.y1 <= page.y1, text


def test_no_curve_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no layer to draw"):
        plots.layer_curves(tmp_path / "f.png", {}, ylabel="")


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape(install_command("plot"))):
        plots.layer_curves(tmp_path / "f.png", {"a": [1.0]}, ylabel="")


def test_importing_the_module_does_not_import_matplotlib():
    code = "import sys, rmsgd.plots; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- names ---------------------------------------------------------------------------------------

DEEP = [
    f"vision_model.encoder.blocks.{i}.mlp.experts.{j}.down_projection.weight"
    for i in (1, 10, 11)
    for j in (0, 3)
]


@pytest.mark.parametrize("most", [16, 28, 48])
def test_short_names_keep_head_tail_and_numbers_and_stay_apart(most):
    short = plots.short_names(DEEP, most)
    assert len(set(short)) == len(DEEP)
    for name, label in zip(DEEP, short, strict=True):
        assert label.startswith("vi")
        assert label.endswith("ion")
        assert len(label) <= most or label == name.removesuffix(
            ".weight"
        )  # in full, where it would read alike
    if most >= 28:
        assert [re.findall(r"\d+", label) for label in short] == [re.findall(r"\d+", name) for name in DEEP]
        assert all(len(label) <= most for label in short)


def test_names_that_are_short_enough_are_not_cut():
    assert plots.short_names(["conv1.weight", "layers.0.1.conv2.weight"]) == ["conv1", "layers.0.1.conv2"]


def test_names_that_would_read_alike_are_written_in_full():
    long = "a_module_without_any_dot_"
    names = [f"{long}{c}{long}" for c in "xy"]
    assert plots.short_names(names, 12) == names
    assert plots.short_names(["fc.weight", "fc"]) == ["fc.weight", "fc"]
