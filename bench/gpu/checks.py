"""Checks that the kernels are built, run and give right results, which come before any figure."""

import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu import processes, smoke

BACKENDS = ("cuda", "cupy")
TESTS = "tests/test_gpu.py"
# A test in the output of `pytest -v` and its result. There is none yet for the last test, or after a hang or
# a crash, where Python prints a traceback. Parameters may hold spaces.
TEST = re.compile(
    r"^(?P<test>tests/\S+?::.+?)"
    r"(?: (?P<result>PASSED|FAILED|ERROR|SKIPPED)\b| ?Timeout \(| ?Fatal Python error| *\Z)",
    re.M,
)


def build(limit_s: float, log: Path) -> dict[str, Any]:
    """Builds rmsgd._cuda for this GPU, or for what RMSGD_CUDA_ARCHS names."""
    major, minor = torch.cuda.get_device_capability()
    environment = {"RMSGD_CUDA_ARCHS": f"{major}{minor}", "RMSGD_CUDA": "1", **os.environ}
    environment["RMSGD_REQUIRE_NATIVE"] = "1"  # a failed build is an error
    ended = processes.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], limit_s, log, environment
    )
    return {"architectures": environment["RMSGD_CUDA_ARCHS"], "error": ended.failure()}


def smoke_tests(limit_s: float, log: Path) -> dict[str, Any]:
    """Runs a short training loop for each backend in a process of its own, and returns their output."""
    found: dict[str, Any] = {}
    for backend, seconds in in_turn(BACKENDS, limit_s):
        ended = processes.run(
            [sys.executable, "-m", "bench.gpu.smoke"], seconds, log, {"RMSGD_BACKEND": backend}
        )
        said = ended.output.strip()
        if ended.status == smoke.ABSENT:
            found[backend] = {"absent": said.splitlines()[-1].removeprefix("absent: ")}
        else:
            found[backend] = {"said": said[-300:], "seconds": ended.seconds, "error": ended.failure()}
    failed = [backend for backend, result in found.items() if result.get("error")]
    runs = [backend for backend in found if usable(found, backend)]
    error = f"{', '.join(failed)} failed" if failed else None if runs else "no backend runs here"
    return {"backends": found, "error": error}


def usable(found: Mapping[str, Any], backend: str) -> bool:
    """Whether a backend's smoke test passed."""
    return "error" in found[backend] and found[backend]["error"] is None


def gpu_tests(
    limit_s: float, log: Path, backends: Sequence[str], marks: str, hanging_s: int
) -> dict[str, Any]:
    """Runs the tests with these marks, those of each backend in a process of its own.

    For a test that takes longer than `hanging_s` seconds, the log tells where it was.
    """
    if not backends:
        return {"backends": {}, "error": "no backend runs here"}
    command = [sys.executable, "-m", "pytest", TESTS, "-m", marks, "-v", "--tb=short", "--no-header"]
    # The project's own options are left out, since -q would suppress the lines with the results.
    command += ["-pno:cacheprovider", "--override-ini=addopts=--strict-markers"]
    command += [f"--override-ini=faulthandler_timeout={hanging_s}"]
    found: dict[str, Any] = {}
    for backend, seconds in in_turn(backends, limit_s):
        ended = processes.run(command, seconds, log, {"RMSGD_TEST_BACKENDS": backend})
        found[backend] = {**results(ended.output), "seconds": ended.seconds, "error": failure(ended)}
    failed = [f"{backend}: {result['error']}" for backend, result in found.items() if result["error"]]
    return {"backends": found, "error": "; ".join(failed) or None}


def stress(limit_s: float, log: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """Runs epoch ends under load, which must give the same bits; see `bench.gpu.stress`."""
    ended = processes.run([sys.executable, "-m", "bench.gpu.stress"], limit_s, log, environment)
    return {"said": ended.output.strip()[-300:], "error": ended.failure()}


def results(output: str) -> dict[str, Any]:
    """The results in the output of `pytest -v`: how many passed, which failed, and which is unfinished."""
    tests = [(match["test"], match["result"]) for match in TEST.finditer(output)]
    return {
        "passed": sum(result == "PASSED" for _, result in tests),
        "skipped": sum(result == "SKIPPED" for _, result in tests),
        "failed": [test for test, result in tests if result in ("FAILED", "ERROR")],
        "unfinished": tests[-1][0] if tests and tests[-1][1] is None else None,
    }


def failure(ended: processes.Ended) -> str | None:
    """What is wrong with a run of pytest, or None. The output of the tests is in the log."""
    found = results(ended.output)
    if ended.status == 0:
        return None
    if ended.status == 1 and found["failed"]:
        return f"{len(found['failed'])} failed"
    where = f"at {found['unfinished']}: " if found["unfinished"] else ""
    return f"{where}{ended.failure()}"


def in_turn(backends: Sequence[str], limit_s: float) -> Iterator[tuple[str, float]]:
    """Each backend with the seconds that it may take, an equal share of those that are left."""
    end = time.monotonic() + limit_s
    for i, backend in enumerate(backends):
        yield backend, (end - time.monotonic()) / (len(backends) - i)
