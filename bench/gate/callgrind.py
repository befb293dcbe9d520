"""Instructions of the compiled core's step and spectra, counted by valgrind's callgrind.

Valgrind does not know AVX-512, so the AVX2 path is counted where the processor has it. The count is exact for
one compiler, so it is compared only between builds of the same one.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

KERNELS = Path(__file__).with_name("kernels.py")
FUNCTIONS = {
    "instructions of 3 steps": "rmsgd::StepPlan::step(",
    "instructions of 18 spectra": "rmsgd::measure(",
}


class CallgrindError(RuntimeError):
    """Nothing could be counted; the message says why."""


def count(folder: Path, isa: str) -> dict[str, int]:
    """From a name to the instructions of the core in `folder`/rmsgd.

    Raises:
        CallgrindError: valgrind or the core is missing, or valgrind cannot run it.

    """
    if shutil.which("valgrind") is None:
        raise CallgrindError("valgrind is not installed")
    cores = sorted(folder.glob("rmsgd/_cpu.*.so"))
    if not cores:
        raise CallgrindError("the compiled core is not built in this checkout")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "callgrind.out"
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}"]
        environment = os.environ | {
            "RMSGD_ISA": "avx2" if isa == "avx512" else isa,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",
        }
        done = subprocess.run(
            [*command, sys.executable, str(KERNELS), str(cores[0])],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not out.is_file():
            said = done.stderr.strip().splitlines()
            raise CallgrindError(f"valgrind failed: {said[-1] if said else 'it gave no reason'}")
        with out.open() as lines:
            inclusive = inclusive_costs(lines)
    found = {name: instructions_of(start, inclusive) for name, start in FUNCTIONS.items()}
    if not all(found.values()):
        raise CallgrindError("the core's functions carry no names (a stripped build)")
    return found


def instructions_of(start: str, inclusive: Mapping[str, int]) -> int:
    """The instructions of the functions whose names begin with `start`.

    A lambda's name begins with that of its function, which includes its instructions already.
    """
    return sum(n for name, n in inclusive.items() if name.startswith(start) and "{lambda" not in name)


def inclusive_costs(lines: Iterable[str]) -> Counter[str]:
    """From a function to the instructions of all calls to it, read from the lines of callgrind's file.

    A name is written once, as "(7) name", and after that only by its number. A line "calls=" is followed by a
    line with the position and the cost of the called function.
    """
    names: dict[str, str] = {}
    costs: Counter[str] = Counter()
    called, next_is_cost = "", False
    for line in lines:
        named = re.match(r"(c?)fn=\((\d+)\)(?: (.*))?", line)
        if named:
            if named[3]:
                names[named[2]] = named[3]
            if named[1]:
                called = names[named[2]]
        elif next_is_cost:
            costs[called] += int(line.split()[1])
        next_is_cost = line.startswith("calls=")
    return costs


def compiler(folder: Path) -> str | None:
    """The compiler that built the core in `folder`/rmsgd, by its signature; None where there is none."""
    for core in sorted(folder.glob("rmsgd/_cpu.*.so")):
        signed = re.search(rb"(?:GCC: \([^)]*\)|clang version) [\d.]+", core.read_bytes())
        if signed:
            return signed[0].decode()
    return None
