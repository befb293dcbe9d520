"""The processes that time this checkout, and another revision that is built in a folder of its own."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.gate.cases import SLOWER

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("worker.py")


class GateError(RuntimeError):
    """The gate cannot decide; the message says why."""


class Worker:
    """One process of `worker.py`, which times the cases of the optimizer found in `folder`.

    Raises:
        GateError: the process could not be started or died, or a case failed.

    """

    def __init__(self, folder: Path, threads: int, target: str | None = None, *, slower: bool = True) -> None:
        self._name = folder.name
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "KINETO_LOG_LEVEL": "6",  # torch's profiler would write to stderr
        }
        if not slower:
            environment.pop(SLOWER, None)
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        try:
            self._ask(rmsgd=str(folder), threads=threads, target=target)
        except BaseException:
            self.close()
            raise

    def _ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise GateError(f"the process that times {self._name} died, status {self._process.wait()}")
        reply = json.loads(line)
        if "error" in reply:
            raise GateError(f"{self._name}: {reply['error']}")
        return reply["answer"]

    def time(self, case: str) -> float:
        """Seconds of one call of a case."""
        seconds: float = self._ask(time=case)
        return seconds

    def count(self) -> dict[str, int]:
        """The counts of `counts.count` in that process."""
        found: dict[str, int] = self._ask(count=True)
        return found

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def built(revision: str) -> Iterator[Path]:
    """A temporary folder with the given revision of this repository, built.

    Raises:
        GateError: there is no such revision, or it does not build.

    """
    with tempfile.TemporaryDirectory(prefix="rmsgd-gate-") as scratch:
        folder = Path(scratch) / "there"
        _run(["git", "worktree", "add", "--quiet", "--detach", str(folder), revision], ROOT)
        try:
            environment = {"RMSGD_CUDA": "1" if torch.cuda.is_available() else "0", **os.environ}
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            _run(build, folder, environment | {"RMSGD_REQUIRE_NATIVE": "1"})
            yield folder
        finally:
            _run(["git", "worktree", "remove", "--force", str(folder)], ROOT)


def _run(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise GateError(f"{command[0]} is not installed") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise GateError(f"{' '.join(command[:3])} failed: {said[-1] if said else 'no reason given'}")
