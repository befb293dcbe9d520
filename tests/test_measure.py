"""Timing is interleaved, ratios have intervals, and their JSON can be read."""

import gc
import json

import numpy as np
import pytest
import torch
from clock import Clock

from bench import measure


def test_every_round_times_every_case_once():
    calls = []
    seconds = measure.interleave({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=5)
    assert {name: values.shape for name, values in seconds.items()} == dict.fromkeys("abc", (5,))
    timed = calls[3:]  # one warm-up call each comes first
    for start in range(0, 15, 3):
        assert sorted(timed[start : start + 3]) == ["a", "b", "c"]


def test_the_order_changes_between_rounds():
    calls = []
    measure.interleave({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=12)
    rounds = {tuple(calls[start : start + 3]) for start in range(3, len(calls), 3)}
    assert len(rounds) > 2


def test_a_quick_case_is_repeated_until_the_round_is_long_enough(monkeypatch):
    clock, calls = Clock(), {"quick": 0, "slow": 0}
    monkeypatch.setattr(measure, "time", clock)

    def case(name, seconds):
        calls[name] += 1
        clock.sleep(seconds)

    cases = {"quick": lambda: case("quick", 1e-3), "slow": lambda: case("slow", 0.1)}
    seconds = measure.interleave(cases, rounds=3, min_seconds=0.0095)
    assert calls == {"quick": 1 + 3 * 10, "slow": 1 + 3}
    assert seconds["quick"] == pytest.approx([1e-3] * 3)


def test_more_rounds_are_added_to_the_earlier_ones():
    timer = measure.Interleaved({"case": lambda: None})
    assert timer.run(2)["case"].shape == (2,)
    assert timer.run(3)["case"].shape == (5,)


def test_the_device_is_waited_for_around_every_timing():
    waits = []
    measure.interleave({"case": lambda: None}, rounds=2, synchronise=lambda: waits.append(None))
    assert len(waits) == 2 * 3


def test_the_garbage_collector_rests_while_the_clock_runs():
    states = []
    measure.interleave({"case": lambda: states.append(gc.isenabled())}, rounds=2)
    assert not any(states)
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cases": {}}, "cases is empty"),
        ({"cases": {"a": int}, "warmup": 0, "min_seconds": 0.1}, "warmup must be at least 1"),
        ({"cases": {"a": int}, "warmup": -1}, "warmup must be at least 0"),
        ({"cases": {"a": int}, "min_seconds": float("nan")}, "min_seconds must not be negative"),
    ],
)
def test_a_timing_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        measure.Interleaved(**arguments)


def test_the_ratio_is_taken_round_by_round():
    drift = np.linspace(1, 10, 21)  # a machine that gets slower and slower
    interval = measure.ratio(2 * drift, drift)
    assert interval == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("rounds", [6, 10, 15, 31])
def test_the_interval_covers_the_true_ratio_as_often_as_it_says(rounds):
    noise = np.random.default_rng(1).lognormal(0, 0.1, size=(4000, 2, rounds))
    intervals = [measure.ratio(1.1 * ours, theirs) for ours, theirs in noise]
    assert np.mean([interval.low <= 1.1 <= interval.high for interval in intervals]) >= 0.95


def test_the_interval_is_that_of_the_sign_test():
    """Tables give the 2nd and the 9th of 10 sorted samples, and the 4th and the 12th of 15."""
    assert measure.median(range(10)) == (4.5, 1.0, 8.0)
    assert measure.median(range(15)) == (7.0, 3.0, 11.0)


@pytest.mark.parametrize("rounds", [1, 3, 5])
def test_rounds_too_few_for_an_interval_have_a_median_only(rounds, tmp_path):
    interval = measure.median(range(rounds))
    assert str(interval) == f"{(rounds - 1) / 2:.3f} [-]"
    measure.write_json(tmp_path / "result.json", interval._asdict())
    assert json.loads((tmp_path / "result.json").read_text())["low"] is None
    assert str(measure.median(range(6))) == "2.500 [0.000, 5.000]"


def test_a_ratio_of_unequal_rounds_is_refused():
    with pytest.raises(ValueError, match="same rounds"):
        measure.ratio([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="non-empty"):
        measure.ratio([], [])


def test_json_holds_plain_values_and_null_for_what_is_not_a_number(tmp_path):
    path = tmp_path / "deep" / "result.json"
    payload = {
        "tensor": torch.ones(2),
        "array": np.arange(2),
        "nan": float("nan"),
        "tuple": (1, np.float32(2)),
    }
    measure.write_json(path, payload)
    assert json.loads(path.read_text()) == {
        "tensor": [1.0, 1.0],
        "array": [0, 1],
        "nan": None,
        "tuple": [1, 2.0],
    }


def test_a_result_that_cannot_be_written_leaves_the_old_one_whole(tmp_path):
    path = tmp_path / "result.json"
    measure.write_json(path, {"kept": True})
    with pytest.raises(TypeError):
        measure.write_json(path, {"kept": object()})
    assert json.loads(path.read_text()) == {"kept": True}
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_the_machine_is_described_in_json():
    description = measure.machine()
    assert json.loads(json.dumps(description)) == description
    assert description["torch"] == torch.__version__
    assert description["cores"] >= 1
    assert description["cpu"]
