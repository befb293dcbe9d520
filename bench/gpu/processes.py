"""Processes of a time-limited run, each in a session of its own, writing to one log."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DYING_S = 15.0


@dataclass(frozen=True)
class Ended:
    """A process that has ended.

    Attributes:
        status: its exit status; None where it was stopped for lack of time.
        seconds: how long it ran.
        output: its stdout and stderr.

    """

    status: int | None
    seconds: float
    output: str

    def failure(self) -> str | None:
        """None where it ended well, else what happened, with the end of its output."""
        if self.status == 0:
            return None
        said = self.output.strip()[-1000:]
        if self.status is None:
            return f"stopped for lack of time after {self.seconds:.0f} s: {said}"
        return f"status {self.status}: {said}"


def run(
    command: Sequence[str], limit_s: float, log: Path, environment: Mapping[str, str] | None = None
) -> Ended:
    """Runs a command in the checkout, and appends its output to `log` as it comes.

    After `limit_s` seconds, or when this process is interrupted, the command is killed with all processes
    that it has started, since a process left behind would disturb the next measurement.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("a+b") as file:
        file.write(f"\n$ {' '.join(command)}\n".encode())
        file.flush()
        begin = file.tell()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        status = None
        try:
            with suppress(subprocess.TimeoutExpired):
                status = process.wait(max(limit_s, 0.0))
        finally:
            with suppress(ProcessLookupError):  # no process is left
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # a driver may hold it back
                process.wait(DYING_S)
        file.seek(begin)
        return Ended(status, time.monotonic() - start, file.read().decode(errors="replace"))
