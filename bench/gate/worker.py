"""A process of the gate that times cases on request: `python worker.py`, with requests on stdin.

It imports `rmsgd` from the folder that its first request names, and everything else from here, so that two
revisions of the optimizer are timed by the same benchmark. A request is one line of JSON, and so is an
answer.
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.gate.cases import Bench

ROOT = str(Path(__file__).parents[2])


def import_from(folder: str) -> None:
    """Makes Python import `rmsgd` from this folder, and `bench` from this checkout."""
    sys.path[0] = folder
    import rmsgd

    if not Path(rmsgd.__file__).resolve().is_relative_to(Path(folder).resolve()):
        raise ImportError(f"{folder} holds no package rmsgd")
    sys.path[0] = ROOT


def answers(request: dict[str, Any], bench: "Bench | None") -> tuple[Any, "Bench | None"]:
    """The answer to one request, and the cases from now on."""
    if "rmsgd" in request:
        import_from(request["rmsgd"])
        from bench.gate.cases import Bench

        return None, Bench(request["threads"], request["target"])
    if "time" in request:
        assert bench is not None
        return bench.time(request["time"]), bench
    from bench.gate import counts

    return counts.count(), bench


def main() -> None:
    """Answers requests until stdin ends. The output of the cases goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    bench: Bench | None = None
    for line in sys.stdin:
        try:
            answer, bench = answers(json.loads(line), bench)
            reply = {"answer": answer}
        except Exception as error:  # the gate reports which side failed, and how
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=out, flush=True)


if __name__ == "__main__":
    main()
