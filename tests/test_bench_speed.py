"""`bench speed`, `noise-search`, `probe-speed`: real figures on small networks, and the README's tables."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench import (
    large_checkpoint,
    noise_search,
    probe_speed,
    readme,
    spectrum,
    speed,
    speed_epoch_end,
    split,
)
from bench.epoch_end import gram_products, spectra
from bench.networks import OneLinear, network
from bench.weights import make_trained_like


def test_speed_measures_step_and_epoch_end_and_writes_json_and_plot(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--models", "resnet14-digits", "--rounds", "2", "--quick"]
    assert speed.main(arguments) == 0
    result = json.loads((tmp_path / "speed-cpu.json").read_text())
    (step,), (end,) = result["step"], result["epoch-end"]
    assert step["to_sgd_fused"]["sgd-fused"]["median"] == 1.0
    assert set(step["seconds"]) >= {"rmsgd", "sgd-fused", "sgd-foreach", "sgd-per-layer", "plain loop"}
    assert all(seconds > 0 for seconds in [*step["seconds"].values(), *end["seconds"].values()])
    assert sum(end["stages"].values()) == end["spectra"]
    assert (tmp_path / "epoch-end-cost.png").stat().st_size > 1000
    assert "resnet14-digits" in capsys.readouterr().out


def test_a_networks_weights_do_not_depend_on_the_networks_before_it(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(speed_epoch_end, "stages", lambda model: drawn.append(next(model.parameters())) or {})
    for models in ("linear-8", "linear-12,linear-8"):
        flags = ["--rounds", "1", "--quick", "--section", "epoch-end"]
        assert speed.main(["--out", str(tmp_path), "--models", models, *flags]) == 0
    trained, initial, *_, trained_again, initial_again = drawn
    assert torch.equal(trained, trained_again)
    assert torch.equal(initial, initial_again)


def test_gram_products_are_those_of_both_modes():
    model = network("resnet14-digits")
    # Every convolution but the first, whose in mode has one row, has two; a 1x1 kernel's share a spectrum.
    products = gram_products(model).__closure__
    (matrices,) = [cell.cell_contents for cell in products if isinstance(cell.cell_contents, list)]
    assert len(matrices) == sum(len(u.modes) for _, u in spectra(model))


def test_trained_like_weights_have_a_low_rank_part_and_are_the_same_every_time():
    import torch

    import rmsgd

    torch.manual_seed(0)
    model = OneLinear(48)
    initial = model.linear.weight.detach().clone()
    make_trained_like(model, seed=3)
    again = OneLinear(48)
    again.linear.weight.data.copy_(initial)
    make_trained_like(again, seed=3)
    assert torch.equal(model.linear.weight, again.linear.weight)
    assert rmsgd.evbmf(initial).rank == 0
    assert rmsgd.evbmf(model.linear.weight.detach()).rank > 0


def test_the_parts_of_a_spectrum_are_timed_beside_torchs_routines(tmp_path, capsys):
    assert spectrum.main(["--out", str(tmp_path), "--sizes", "8,40", "--rounds", "2"]) == 0
    rows = json.loads((tmp_path / "spectrum-cpu.json").read_text())["spectrum"]
    assert [(row["size"], row["dtype"]) for row in rows] == [
        (8, "fp32"),
        (40, "fp32"),
        (8, "fp64"),
        (40, "fp64"),
    ]
    for row in rows:
        assert sum(row["shares"].values()) == pytest.approx(1.0)
        assert all(share > 0 for share in row["shares"].values())
        assert set(row["faster"]) == {"mm", "eigvalsh", "svdvals"}
    assert (tmp_path / "spectrum-cpu.png").stat().st_size > 1000
    assert "40 fp32" in capsys.readouterr().out


def test_a_spectrum_of_a_kind_that_is_not_timed_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        spectrum.main(["--out", str(tmp_path), "--dtypes", "fp16"])
    assert "unknown dtype 'fp16'" in capsys.readouterr().err


def test_sizes_of_which_none_is_timed_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        spectrum.main(["--out", str(tmp_path), "--dtypes", "fp64", "--sizes", "4096"])
    assert "--sizes: fp64 is timed up to 2048" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_epoch_end_of_two_ranks_is_timed_and_more_are_modelled(tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text("<!-- measured: split -->\n<!-- /measured -->\n")
    arguments = ["--out", str(tmp_path), "--models", "resnet14-digits", "--rounds", "2"]
    assert split.main([*arguments, "--readme", str(page)]) == 0
    (row,) = json.loads((tmp_path / "split-cpu.json").read_text())["split"]
    assert len(row["seconds"]["matrices"]) == row["spectra"]
    assert len(row["seconds"]["own work"]) == 2
    assert all(seconds > 0 for seconds in [*row["seconds"]["matrices"], *row["seconds"]["own work"]])
    assert list(row["modelled_to_one"]) == ["2", "8", "64", "512"]
    assert "| resnet14-digits |" in page.read_text()
    assert "resnet14-digits" in capsys.readouterr().out


def test_no_number_of_ranks_is_modelled_below_the_slowest_matrix():
    def time(ranks):
        return split.modelled([4.0, 2.0, 1.0, 1.0], [4, 2, 1, 1], exchange=0.125, ranks=ranks)

    assert [time(ranks) for ranks in (1, 2, 8, 512)] == [1.0, 0.625, 0.875, 1.625]


def test_the_noise_search_finds_ours_at_the_minimum():
    row = noise_search.compare("resnet14-digits", "trained-like", "")
    assert row["above_the_minimum"]["rmsgd"] == 0
    assert row["another_rank"]["rmsgd"] == 0
    assert row["worst_error_of_variance"]["rmsgd"] < 1e-9
    assert row["worst_error_of_variance"]["vbmf"] > 1e-9


def test_probing_is_timed_against_a_full_svd_and_an_absent_peer_is_a_cell_that_says_so(tmp_path, capsys):
    row = probe_speed.compare("resnet14-digits", 1, None)
    assert row["seconds"].keys() == {"rmsgd", "full SVD"}
    assert row["faster"]["full SVD"]["median"] > 0
    assert len(row["stable_rank"]) == row["layers"]
    page = tmp_path / "README.md"
    page.write_text("<!-- measured: probe-speed -->\n<!-- /measured -->\n")
    machine = {"cpu": "a CPU", "cores": 2, "torch": "2.13.0", "threads": 2}
    readme.rewrite(page, {"machine": machine, "probe-speed": [row]})
    assert "| resnet14-digits |" in page.read_text()
    assert "| absent |" in page.read_text()


def test_probing_is_compared_with_weightwatcher_by_layer():
    def theirs(state):
        import pandas

        names = [name.removesuffix(".weight") for name, weight in state.items() if weight.ndim > 1]
        return pandas.DataFrame({"longname": names, "stable_rank": range(len(names))})

    row = probe_speed.compare("resnet14-digits", 1, theirs)
    assert [layer["weightwatcher"] for layer in row["stable_rank"]] == list(range(row["layers"]))


def test_a_large_checkpoint_is_probed_in_a_process_of_its_own_and_a_tenth_beside_a_peer(
    tmp_path, monkeypatch, capsys
):
    size = large_checkpoint.Size(blocks=2, dim=32, tokens=100)
    calls = []
    monkeypatch.setattr(probe_speed, "SIZE", size)
    monkeypatch.setattr(probe_speed, "weightwatcher", lambda: calls.append)
    page = tmp_path / "page.md"
    page.write_text("<!-- measured: probe-large -->\n<!-- /measured -->\n")
    arguments = ["--large", "--out", str(tmp_path), "--readme", str(page)]
    assert probe_speed.main(arguments) == 0
    whole, tenth = json.loads((tmp_path / "probe-large.json").read_text())["probe-large"]
    assert whole["parameters"] == 100 * 32 + 2 * (4 + 8) * 32**2
    assert (whole["layers"], tenth["layers"]) == (13, 6)
    assert sum(whole["stages"].values()) == 13
    assert whole["peak_mib"] >= whole["before_mib"] > 0
    assert "peak_mib" not in tenth
    assert len(calls) == 1
    assert tenth["faster"]["median"] > 0
    assert "| whole, bfloat16, from disk | 0 M | 13 |" in page.read_text()
    assert "billion" in capsys.readouterr().out
    assert not list(tmp_path.glob("tmp*"))


def test_a_weight_of_the_large_checkpoint_has_a_strong_mean_and_outlier_columns():
    weight = large_checkpoint.weight(300, 200, torch.Generator().manual_seed(0))
    norms = weight.norm(dim=0).sort(descending=True).values
    assert norms[5] > 10 * norms[6]
    plain = weight[:, weight.norm(dim=0) < norms[5]]
    assert plain.mean() > large_checkpoint.STD
    assert large_checkpoint.Size().shapes["reduce"] == (2048, 8192)


def test_the_readme_is_rewritten_between_its_marks_only(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- measured: step -->\nold\n<!-- /measured -->\nafter\n")
    times = {"rmsgd": 0.001, "sgd-fused": 0.002}
    ratios = {
        "rmsgd": {"median": 0.5, "low": 0.4, "high": 0.6},
        "sgd-fused": {"median": 1.0, "low": None, "high": None},
    }
    row = {
        "model": "net",
        "tensors": 3,
        "seconds": times,
        "to_sgd_fused": ratios,
        "bandwidth_of_floor": {"median": 0.9},
    }
    machine = {"cpu": "a CPU", "cores": 2, "torch": "2.13.0", "threads": 2}
    readme.rewrite(page, {"machine": machine, "step": [row]})
    text = page.read_text()
    assert text.startswith("before\n<!-- measured: step -->\na CPU, 2 cores")
    assert "| net<br>3 tensors |" in text
    assert "| rmsgd | 1.00<br>0.50 [0.40, 0.60] |" in text
    assert "| sgd-fused | 2.00<br>1.00 [-] |" in text
    assert text.endswith("<!-- /measured -->\nafter\n")
    assert "old" not in text


def test_a_readme_stays_whole_on_a_full_disk_and_a_link_stays_one(tmp_path, monkeypatch):
    page, link = tmp_path / "README.md", tmp_path / "link.md"
    page.write_text("<!-- measured: step -->\nold\n<!-- /measured -->\n")
    link.symlink_to(page)
    monkeypatch.setitem(readme.TABLES, "step", lambda rows: "new")
    result = {"machine": {"cpu": "a CPU", "cores": 2, "torch": "2.13.0", "threads": 2}, "step": []}

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            readme.rewrite(page, result)
    assert "old" in page.read_text()
    assert sorted(tmp_path.iterdir()) == [page, link]
    readme.rewrite(link, result)
    assert link.is_symlink()
    assert "new" in page.read_text()


def test_a_readme_without_the_mark_is_refused(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("nothing here\n")
    with pytest.raises(ValueError, match="measured: step"):
        readme.rewrite(page, {"machine": {}, "step": []})
    assert page.read_text() == "nothing here\n"


CASES = "digits and (rmsgd or epoch) or evbmf and 64"


def test_the_cases_run_under_pytest_benchmark(request, tmp_path):
    path = tmp_path / "benchmark.json"
    flags = ["--benchmark-json", str(path), "--benchmark-max-time=0.01", "--benchmark-min-rounds=1"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "bench/",
            "-k",
            "digits and (rmsgd or epoch) or evbmf and 64",
            *flags,
        ],
        cwd=request.config.rootpath,
        env={key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    groups = {case["group"] for case in json.loads(path.read_text())["benchmarks"]}
    assert groups == {"step, resnet14-digits", "epoch end, resnet14-digits", "evbmf, 64 x 128"}
