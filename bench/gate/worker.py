"""A process of the gate that times what it is asked to: `python worker.py`, requests on stdin.

It imports `rmsgd` from the folder that its first request names and everything else from here, so that
two revisions of the optimizer meet the same benchmark. One line of JSON asks, one answers.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).parents[2])
LONG_ENOUGH_S = 0.002


def import_from(folder: str) -> None:
    """Makes `rmsgd` the one of this folder, and `bench` ours."""
    sys.path[0] = folder
    import rmsgd

    if not str(rmsgd.__file__).startswith(str(Path(folder).resolve())):
        raise ImportError(f"{folder} holds no package rmsgd")
    sys.path[0] = ROOT


class Bench:
    """The cases, warm, and how often each is called per timing."""

    def __init__(self, threads: int, target: str | None) -> None:
        import torch

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        from bench.gate import cases

        self._cases = cases.target(target) if target else cases.standard()
        self._wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        self._calls = dict.fromkeys(self._cases, 1)
        for name in self._cases:
            self.time(name)
            seconds = self.time(name)
            self._calls[name] = max(1, round(LONG_ENOUGH_S / max(seconds, 1e-9)))

    def time(self, name: str) -> float:
        """Seconds of one call."""
        case, calls = self._cases[name], self._calls[name]
        self._wait()
        start = time.perf_counter()
        for _ in range(calls):
            case()
        self._wait()
        return (time.perf_counter() - start) / calls


def answers(request: dict[str, Any], bench: Bench | None) -> tuple[Any, Bench | None]:
    """The answer to one request, and the cases from now on."""
    if "rmsgd" in request:
        import_from(request["rmsgd"])
        return None, Bench(request["threads"], request["target"])
    if "time" in request:
        assert bench is not None
        return bench.time(request["time"]), bench
    from bench.gate import counts

    return counts.count(), bench


def main() -> None:
    """Answers until stdin ends. What the cases print goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    bench: Bench | None = None
    for line in sys.stdin:
        try:
            answer, bench = answers(json.loads(line), bench)
            reply = {"answer": answer}
        except Exception as error:  # the gate says which side failed, and how
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=out, flush=True)


if __name__ == "__main__":
    main()
