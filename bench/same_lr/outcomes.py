"""The runs that have ended, in one file that is written anew after each: a killed comparison goes on."""

import json
from pathlib import Path
from typing import Any

from bench import measure
from bench.errors import UsageError
from bench.same_lr.training import Outcome

Key = tuple[str, int, str]
"""Task, seed and optimizer."""

FILE = "same-lr-runs.json"


class Outcomes:
    """What runs came to, as a file of a folder keeps it.

    Args:
        folder: of the file; it is there, and no other process writes to it.

    Raises:
        UsageError: the file is none that this class wrote.
        OSError: it cannot be read.

    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._runs: dict[Key, dict[str, Any]] = {}
        if not self._path.exists():
            return
        try:
            for run in json.loads(self._path.read_text(encoding="utf-8")):
                key = (run["task"], run["seed"], run["optimizer"])
                self._runs[key] = {**run, **_numbers(run)._asdict()}
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{self._path} holds no runs of same-lr ({error!r}): remove it") from error

    def __contains__(self, key: Key) -> bool:
        return key in self._runs

    def __getitem__(self, key: Key) -> Outcome:
        return _numbers(self._runs[key])

    def add(self, key: Key, outcome: Outcome) -> None:
        """Keeps what a run came to, and of which revision it was; OSError where that cannot be written."""
        task, seed, optimizer = key
        named = {"task": task, "seed": seed, "optimizer": optimizer}
        machine = {name: value for name, value in measure.machine().items() if name in ("cpu", "revision")}
        self._runs[key] = {**named, **machine, **outcome._asdict()}
        measure.write_json(self._path, list(self._runs.values()))

    def revisions(self) -> list[str]:
        """The revisions whose runs these are."""
        return sorted({str(run.get("revision")) for run in self._runs.values()})


def _numbers(run: dict[str, Any]) -> Outcome:
    """The outcome in a row of the file, where a number that is not finite is null."""
    return Outcome(*(float("nan" if run[name] is None else run[name]) for name in Outcome._fields))
