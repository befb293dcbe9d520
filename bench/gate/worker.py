"""A process of the gate that times what it is asked to: `python worker.py`, requests on stdin.

It imports `rmsgd` from the folder that its first request names and everything else from here, so that
two revisions of the optimizer meet the same benchmark. One line of JSON asks, one answers.
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
    """Makes `rmsgd` the one of this folder, and `bench` ours."""
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
