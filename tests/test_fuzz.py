"""A few seconds of each fuzzer, from cases that are always the same; ``make fuzz`` takes new ones."""

import io
import shutil
import subprocess

import numpy as np
import pytest
import torch
from rich.console import Console

pytest.importorskip("rmsgd._cpu", reason="the compiled core was not built")
from fuzz import core, files, spectra, states

import rmsgd
from rmsgd.inspection.reading.stored import CheckpointError


def test_ranks_and_noise_variances_of_hostile_spectra_are_the_references():
    oracle = pytest.importorskip("numba") and spectra.Oracle()
    for seed in range(1500):
        spectra.check(spectra.draw(seed), oracle)


def test_spectra_of_hostile_weights_are_the_references():
    for seed in range(150):
        spectra.check_weight(spectra.draw_weight(seed))


def test_mangled_state_dicts_are_loaded_or_refused_and_then_nothing_has_changed():
    assert {states.check(states.draw(seed)) for seed in range(300)} == {"loaded", "refused"}


def test_damaged_checkpoints_are_read_or_refused_in_one_line(tmp_path):
    outcomes = set()
    for seed in range(600):
        name, data = files.draw(seed)
        (tmp_path / name).write_bytes(data)
        outcomes.add(files.check(tmp_path / name))
        (tmp_path / name).unlink()
    assert outcomes == {"read", "refused"}


def test_sound_checkpoints_are_read(tmp_path):
    for name, data in files.sound_files().items():
        if not name.endswith(".json"):
            (tmp_path / name).write_bytes(data)
            # What is refused by itself leaves the rest of its file to be read.
            assert files.check(tmp_path / name) == ("refused" if name in files.REFUSED else "read"), name


def test_the_first_bytes_of_a_checkpoint_are_refused_in_one_line(tmp_path):
    for name, data in files.sound_files().items():
        for length in range(24):
            (tmp_path / name).write_bytes(data[:length])
            with pytest.raises(CheckpointError) as refusal:
                rmsgd.probe(tmp_path / name)
            assert str(refusal.value).startswith(str(tmp_path / name))
            assert len(str(refusal.value).splitlines()) == 1


def test_the_fuzzer_would_notice_code_that_is_executed(tmp_path):
    (tmp_path / "m.pt").write_bytes(files.sound_files()["command.pt"])
    with pytest.raises(AssertionError, match=r"os\.system"), files.nothing_is_executed():
        torch.load(tmp_path / "m.pt", weights_only=False)


def test_the_fuzzer_would_notice_a_wrong_rank(monkeypatch):
    class Wrong:
        @staticmethod
        def measure_spectrum(gamma, M):
            return np.array([0, 1.0, 0.0, 1.0, 0.0, 0, 2])

    monkeypatch.setattr(spectra, "_cpu", Wrong)
    gamma = np.array([9.0, 1.0, 0.9, 0.8])
    with pytest.raises(AssertionError):
        spectra.check(spectra.Case(gamma, 9), lambda gamma, M: (1, 0.4, 0.2, 0.0, 1.0))


@pytest.mark.slow
def test_the_cpp_headers_survive_libfuzzer():
    if core.find_compiler() is None:
        pytest.skip("no clang")
    said = io.StringIO()
    assert core.fuzz(10, Console(file=said)) == 0, said.getvalue()


@pytest.mark.slow
def test_the_core_compiles_for_arm64_and_runs_there(tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("no compiler or no emulator for arm64 (Debian: g++-aarch64-linux-gnu, qemu-user)")
    sources = [*core.SOURCES, *core.ISA_SOURCES, "csrc/sgd/step_cpu.cpp", "tests/fuzz/replay.cpp"]
    flags = ["-std=c++17", "-O3", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-pthread"]
    flags += ["-DRMSGD_ISA=baseline", "-Icsrc", "-Itests/emulator", "-o", str(tmp_path / "replay")]
    subprocess.run([compiler, *flags, *sources], cwd=core.ROOT, check=True)
    run = [emulator, "-L", "/usr/aarch64-linux-gnu", tmp_path / "replay", "3000"]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "done\n"
