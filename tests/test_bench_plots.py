"""Figures that only benchmarks draw."""

import re
import sys

import numpy as np
import pytest

from bench import plots
from rmsgd.extras import install_command

PNG = b"\x89PNG"


def test_bands_leave_out_runs_that_ended_early(tmp_path):
    times = np.cumsum(np.ones((3, 6)), axis=1)
    values = np.tile(np.linspace(10, 90, 6), (3, 1))
    values[1, 3:] = np.nan
    lost = np.full((3, 6), np.nan)
    path = tmp_path / "figure.png"
    plots.bands_over_time(path, {"sgd": (times, values), "lost": (times, lost)}, ylabel="accuracy (%)")
    assert path.read_bytes().startswith(PNG)


def test_more_optimizers_than_colours_still_get_a_line_each(tmp_path):
    times = np.cumsum(np.ones((1, 4)), axis=1)
    curves = {f"optimizer {index}": (times, times * index) for index in range(20)}
    plots.bands_over_time(tmp_path / "figure.png", curves, ylabel="accuracy (%)")


@pytest.mark.parametrize("points", [1, 2, 6])
@pytest.mark.parametrize("optimizers", [1, 3, 8])
def test_the_legend_hides_no_point_of_however_short_a_run(tmp_path, monkeypatch, optimizers, points):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    times = np.cumsum(np.ones((3, points)), axis=1)
    curves = {f"optimizer {i}": (times, times * (i + 1) + [[0], [1], [2]]) for i in range(optimizers)}
    plots.bands_over_time(tmp_path / "figure.png", curves, ylabel="accuracy (%)")
    [figure] = drawn
    figure.draw_without_rendering()
    [axes] = figure.axes
    legends = [*figure.legends, *filter(None, [axes.get_legend()])]
    assert not any(legend.get_window_extent().overlaps(axes.get_window_extent()) for legend in legends)
    assert legends
    if points == 1:
        assert len(axes.collections) == 2 * optimizers  # the range is a line, where a band has no width


def test_shapes_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"sgd: times and values must share a shape"):
        plots.bands_over_time(tmp_path / "f.png", {"sgd": (np.ones((1, 2)), np.ones((1, 3)))}, ylabel="")


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape(install_command("plot"))):
        plots.overheads(tmp_path / "f.png", ["a"], {"b": [(1.0, 0.0, 2.0)]}, reference="a", xlabel="%")


def test_an_optimizer_has_the_same_colour_whatever_it_is_drawn_beside(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    curve = (np.arange(3.0)[None], np.arange(3.0)[None])
    for names in (("rmsgd", "sgd"), ("sgd", "adam", "rmsgd")):
        plots.bands_over_time(tmp_path / "f.png", dict.fromkeys(names, curve), ylabel="")
        colours = {line.get_label(): line.get_color() for line in drawn[-1].axes[0].lines}
        assert colours["sgd"] == plots.style_of("sgd")[0]
        assert colours["rmsgd"] == plots.style_of("rmsgd")[0] != colours["sgd"]


def test_an_overhead_is_drawn_with_its_interval_and_value(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    series = {"all": [(-0.1, -0.2, 0.1), (0.0, 0.0, 0.0), (97.0, 90.0, 100.0)]}
    plots.overheads(tmp_path / "f.png", ["rmsgd", "sgd", "sam"], series, reference="sgd", xlabel="%")
    [axes] = drawn[0].axes
    assert [text.get_text() for text in axes.texts] == ["-0.10", "0", "+97.00"]
    assert [list(line.get_xdata()) for line in axes.lines[:-1:2]] == [[-0.2, 0.1], [0.0, 0.0], [90.0, 100.0]]
