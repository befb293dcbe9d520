"""`python -m bench epoch-time`: parts that add up, ratios by round, and answers to bad input."""

import csv
import io
import json

import pytest
import torch
from clock import Clock
from commands import run_bench
from rich.console import Console
from torch.optim.optimizer import register_optimizer_step_post_hook

import rmsgd
from bench import data, epoch_time, epoch_timing, measure
from bench.__main__ import main
from bench.epoch_timing import Settings, Workload

FLAGS = [
    "--model",
    "resnet14-digits",
    "--data",
    "digits",
    "--width",
    "0.5",
    "--rounds",
    "3",
    "--threads",
    "1",
]
TINY = Settings("resnet14-digits", "digits", ("rmsgd", "sgd", "sam"), 64, 3, "cpu", 0.5, 1)


@pytest.fixture(scope="module", autouse=True)
def _simulated_clock():
    """Simulate a clock: a loss takes a second, a step a tenth of one, and an epoch end half of one."""
    clock = Clock()

    def taking(seconds, function):
        def longer(*args, **kwargs):
            clock.sleep(seconds)
            return function(*args, **kwargs)

        return longer

    hook = register_optimizer_step_post_hook(lambda *_: clock.sleep(0.1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "time", clock)
        patch.setattr(epoch_timing, "time", clock)
        patch.setattr(epoch_timing, "cross_entropy", taking(1.0, epoch_timing.cross_entropy))
        patch.setattr(rmsgd.RMSGD, "epoch_step", taking(0.5, rmsgd.RMSGD.epoch_step))
        yield
    hook.remove()


@pytest.fixture(scope="module")
def result():
    with epoch_time.arguments.torch_threads(1):
        return epoch_timing.run(TINY)


def rows(result):
    return {row["optimizer"]: row for row in result["optimizers"]}


def training_steps():
    """The number of steps in an epoch of `bench train` with the same data and batch."""
    return len(data.Batches(data.load(TINY.data, TINY.model).train, TINY.batch, seed=0))


def refusal(capsys, *flags):
    status, _, err = run_bench(capsys, "epoch-time", *FLAGS, *flags)
    assert status == 2
    return err


def test_the_parts_add_up_to_the_measured_whole(result):
    for row in result["optimizers"]:
        assert row["parts_over_whole"] == pytest.approx(1)


def test_every_part_of_every_round_is_kept(result):
    for seconds in result["seconds_per_round"].values():
        assert {part: len(values) for part, values in seconds.items()} == dict.fromkeys(
            ("forward_backward", "step", "epoch_end", "evaluation", "parts", "whole"), 3
        )


def test_the_epoch_is_its_steps_and_its_end(result):
    assert result["epoch"]["steps"] == 22 == training_steps()  # 1437 digits by 64, whole batches only
    assert result["epoch"]["evaluation_batches"] == 6
    row = rows(result)["rmsgd"]
    assert row["epoch"]["median"] == pytest.approx(22 * (1.0 + 0.1) + 0.5)


@pytest.mark.parametrize(
    ("part", "seconds"),
    [
        ("forward_backward", {"rmsgd": 1.0, "sgd": 1.0, "sam": 2.0}),  # SAM has a second pass
        ("step", {"rmsgd": 0.1, "sgd": 0.1, "sam": 0.2}),  # and a second optimizer inside
        ("epoch_end", {"rmsgd": 0.5, "sgd": 0.0, "sam": 0.0}),
        ("evaluation", dict.fromkeys(("rmsgd", "sgd", "sam"), 6.0)),
    ],
)
def test_what_takes_time_is_booked_under_its_part(result, part, seconds):
    assert {name: row[part]["median"] for name, row in rows(result).items()} == pytest.approx(seconds)


def test_momentum_is_the_state_of_sgd(result):
    network = epoch_timing.models.build(TINY.model, width=TINY.width)
    size = sum(parameter.nbytes for parameter in network.parameters()) / 2**20
    assert rows(result)["sgd"]["state_mib"] == pytest.approx(size, rel=1e-3)
    # SAM keeps the weights that it moves away from, and the SGD inside it the momentum.
    assert rows(result)["sam"]["state_mib"] == pytest.approx(2 * size, rel=1e-3)


def test_ratios_are_taken_within_a_round():
    work = Workload([(torch.zeros(1, 1), torch.zeros(1))], (torch.zeros(1), torch.zeros(1)), 10, 2, 10)
    speeds = (1.0, 3.0, 9.0, 27.0, 81.0, 243.0, 729.0)  # the machine gets slower from round to round

    def seconds(forward, step, end):
        parts = {"forward_backward": forward, "step": step, "epoch_end": end, "evaluation": 0.5}
        return {part: [value * speed for speed in speeds] for part, value in parts.items()} | {
            "parts": list(speeds),
            "whole": list(speeds),
        }

    measured = {"rmsgd": seconds(1, 0.1, 0.5), "sgd": seconds(1, 0.1, 0), "sam": seconds(2, 0.1, 0)}
    by_name = {row["optimizer"]: row for row in epoch_timing.summarise(TINY, work, measured)}
    assert by_name["rmsgd"]["ratio"]["median"] == pytest.approx(11.5 / 11)
    assert by_name["rmsgd"]["ratio"]["low"] == pytest.approx(by_name["rmsgd"]["ratio"]["high"])
    assert by_name["rmsgd"]["added_percent"]["median"] == pytest.approx(100 * 0.5 / 11)
    assert by_name["sam"]["ratio"]["median"] == pytest.approx(21 / 11)
    assert by_name["sam"]["added_percent"]["median"] == pytest.approx(0)
    assert by_name["sgd"]["evaluation"]["median"] == pytest.approx(2 * 0.5 * 27)


def test_the_command_leaves_json_csv_and_a_chart(capsys, tmp_path):
    page = tmp_path / "README.md"
    page.write_text("<!-- measured: epoch-time -->\n<!-- /measured -->\n")
    flags = ["--optimizers", "rmsgd,sgd", "--out", str(tmp_path), "--readme", str(page)]
    status = main(["epoch-time", *FLAGS, *flags])
    out = capsys.readouterr().out
    assert status == 0
    for word in ("rmsgd", "fwd+bwd", "step", "epoch end", "eval.", "added"):
        assert word in out
    result = json.loads((tmp_path / "epoch-time-resnet14-digits-cpu.json").read_text())
    assert result["schema"] == epoch_timing.SCHEMA
    assert result["machine"]["cpu"]
    assert result["reference"] == "sgd"
    assert "| sgd |" in page.read_text()
    assert "| 1.000 [-] |" in page.read_text()  # three rounds are too few for an interval
    with (tmp_path / "epoch-time-resnet14-digits-cpu.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["optimizer"] for line in lines] == ["rmsgd", "sgd"]
    assert float(lines[0]["ratio_median"]) > 0
    assert lines[0]["ratio_low"] == lines[0]["ratio_high"] == ""
    assert (tmp_path / "epoch-time-resnet14-digits-cpu.png").stat().st_size > 1000


def test_no_figure_of_the_table_is_cut_in_80_columns(result):
    slow = json.loads(json.dumps(result))
    slow["optimizers"][0] |= {
        "optimizer": "rmsgd-published",
        "forward_backward": {"median": 46.20012},
        "epoch": {"median": 18071.25},
        "ratio": {"median": 10.983, "low": 10.971, "high": 10.993},
    }
    console = Console(width=80, file=io.StringIO())
    console.print(epoch_time.table(slow))
    shown = console.file.getvalue()
    for text in ("rmsgd-published", "46200.12", "18071.25", "10.983", "10.971", "10.993]"):
        assert text in shown
    assert "…" not in shown


def test_parts_that_do_not_add_up_are_status_1(capsys, tmp_path, monkeypatch, result):
    spoilt = json.loads(json.dumps(result))
    spoilt["optimizers"][0]["parts_over_whole"] = 0.9
    monkeypatch.setattr(epoch_timing, "run", lambda *_: spoilt)
    assert main(["epoch-time", *FLAGS, "--out", str(tmp_path)]) == 1
    assert "rmsgd: the parts are -10.0% off the measured whole" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "resnet81"], "unknown model 'resnet81'. Did you mean 'resnet18'?"),
        (["--optimizers", "sgd,smgd"], "unknown optimizer 'smgd'. Did you mean"),
        (["--optimizers", "sgd,sgd"], "every optimizer may be given once"),
        (["--data", "no-such-folder"], "unknown data 'no-such-folder'"),
        (["--data", "tests"], "tests holds no images that are known here: expected cifar-10-binary.tar.gz"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
        (["--batch", "0"], "expected a whole number above 0"),
        (["--batch", "2000"], "batch must be between 1 and the 1437 training samples"),
        (
            ["--data", "synthetic", "--batch", "50001"],
            "batch must be between 1 and the 50000 training samples",
        ),
        (["--rounds", "few"], "expected a whole number above 0"),
        (["--rounds", "1"], "--rounds: a comparison needs at least 2"),
        (["--width", "-1"], "expected a number above 0"),
    ],
)
def test_bad_arguments_are_status_2_and_say_what_was_expected(capsys, monkeypatch, request, flags, message):
    monkeypatch.chdir(request.config.rootpath)
    assert message in refusal(capsys, *flags)


def test_out_of_memory_says_which_batch_would_fit(capsys, tmp_path, monkeypatch):
    step = epoch_timing.Case._steps

    def limited(case, steps):
        if len(case._work.batches[0][0]) > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(case, steps)

    monkeypatch.setattr(epoch_timing.Case, "_steps", limited)
    flags = ["--optimizers", "sgd,adam", "--batch", "256", "--out", str(tmp_path)]
    assert main(["epoch-time", *FLAGS, *flags]) == 1
    assert "out of memory on cpu" in (err := capsys.readouterr().err)
    assert "batch 256" in err
    assert "batch 32 would fit" in err
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_torch_are_not_taken_for_want_of_memory(monkeypatch):
    def broken(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(epoch_timing.Case, "_steps", broken)
    with pytest.raises(RuntimeError, match="something else"):
        epoch_timing.run(TINY)


@pytest.mark.gpu
def test_parts_add_up_on_a_gpu():
    result = epoch_timing.run(Settings("resnet18", "synthetic", ("rmsgd", "sgd"), 64, 3, "cuda", 1.0, 1))
    for row in result["optimizers"]:
        assert abs(row["parts_over_whole"] - 1) < epoch_time.TOLERANCE
        assert row["peak_mib"] > row["state_mib"]
