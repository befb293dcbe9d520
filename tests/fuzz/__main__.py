"""The command: it fuzzes for a time or for a number of cases, and prints the number of each that fails."""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from fuzz import core, files, spectra, states

CHUNK = 500
"""The cases that one process takes. If it crashes, the parent looks for the case."""
MEMORY = 16 << 30
"""Bytes of address space for a reader of files, so that a huge size is an error and does not fill memory."""


def spectra_checker() -> Callable[[int], str]:
    oracle = spectra.Oracle()

    def check(seed: int) -> str:
        spectra.check(spectra.draw(seed), oracle)
        return "checked"

    return check


def weights_checker() -> Callable[[int], str]:
    def check(seed: int) -> str:
        spectra.check_weight(spectra.draw_weight(seed))
        return "checked"

    return check


def states_checker() -> Callable[[int], str]:
    return lambda seed: states.check(states.draw(seed))


def files_checker() -> Callable[[int], str]:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    folder = tempfile.TemporaryDirectory(prefix="fuzz-")

    def check(seed: int) -> str:
        name, data = files.draw(seed)
        path = Path(folder.name) / name
        path.write_bytes(data)
        try:
            return files.check(path)
        finally:
            path.unlink()

    return check


CHECKERS = {
    "spectra": spectra_checker,
    "weights": weights_checker,
    "states": states_checker,
    "files": files_checker,
}


def worker(target: str) -> None:
    """Take "first last" lines from stdin; answer each with counts, failures on stderr."""
    check = CHECKERS[target]()
    for line in sys.stdin:
        outcomes: Counter[str] = Counter()
        for seed in range(*map(int, line.split())):
            try:
                outcomes[check(seed)] += 1
            except (Exception, files.Hang) as error:
                outcomes["failed"] += 1
                text = " ".join(f"{type(error).__name__}: {error}".split())
                print(f"{target} {seed}: {text[:600]}", file=sys.stderr, flush=True)
        print(*(f"{name}={count}" for name, count in outcomes.items()), flush=True)


class Worker:
    """A process that checks cases."""

    def __init__(self, target: str) -> None:
        self._command = [sys.executable, "-X", "faulthandler", "-m", "fuzz", target, "--worker"]
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def check(self, first: int, last: int) -> Counter[str] | None:
        """The outcomes of the cases [first, last); None if one of them killed the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{first} {last}\n")
        answer = self._process.stdout.readline()
        if not answer:
            self._process.wait()
            self._start()
            return None
        return Counter({name: int(count) for name, count in (part.split("=") for part in answer.split())})

    def stop(self) -> None:
        self._process.communicate()


def fuzz(target: str, first: int, count: int, seconds: float, console: Console) -> int:
    """Check up to ``count`` cases for up to ``seconds``, and return how many failed."""
    outcomes: Counter[str] = Counter()
    process, end, at = Worker(target), time.monotonic() + seconds, first
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(target, total=count)
        while at < first + count and time.monotonic() < end:
            last = min(at + CHUNK, first + count)
            done = process.check(at, last)
            if done is None:  # the cases run again, one by one
                for seed in range(at, last):
                    done = process.check(seed, seed + 1)
                    outcomes += done if done is not None else Counter({"crashed": 1})
                    if done is None:
                        console.print(f"{target} {seed}: the process crashed")
            else:
                outcomes += done
            at = last
            progress.update(task, completed=at - first)
    process.stop()
    said = ", ".join(f"{number} {name}" for name, number in sorted(outcomes.items()))
    console.print(f"{target}: {outcomes.total()} cases from {first}: {said}", highlight=False)
    return outcomes["failed"] + outcomes["crashed"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    names = ", ".join([*CHECKERS, "core"])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {names} (default: all)")
    parser.add_argument("--seconds", type=float, default=60, help="for each target (default: %(default)s)")
    parser.add_argument("--count", type=int, default=10**9, help="cases of each target, if time allows")
    parser.add_argument("--first", type=int, help="number of the first case (default: from the clock)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = set(options.targets) - {*CHECKERS, "core"}
    if unknown:
        parser.error(f"no target is called {', '.join(sorted(unknown))}; there are {names}")
    if options.worker:
        worker(options.targets[0])
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    console = Console()
    first = time.time_ns() // 10**6 if options.first is None else options.first
    failures = 0
    for target in options.targets or [*CHECKERS, "core"]:
        if target == "core":
            failures += core.fuzz(options.seconds, console)
        else:
            failures += fuzz(target, first, options.count, options.seconds, console)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
