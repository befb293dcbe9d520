"""The C++ headers under libFuzzer: built with clang, AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import shutil
import subprocess
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "fuzz"
SOURCES = ["csrc/isa.cpp", "csrc/parallel.cpp", "csrc/spectrum/measure_cpu.cpp", "tests/fuzz/core.cpp"]
ISA_SOURCES = [f"csrc/spectrum/{name}_cpu.cpp" for name in ("gram", "deflate", "tridiagonal", "eigenvalues")]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
ISA_FLAGS = {
    "baseline": [],
    "avx2": AVX2,
    "avx512": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g",
    "-pthread",
    "-Wno-psabi",
    "-fsanitize=fuzzer,address,undefined,float-cast-overflow",
]
FLAGS += ["-fno-sanitize-recover=all", "-Icsrc", "-Itests/emulator"]


def find_compiler() -> str | None:
    """A clang that comes with libFuzzer; None where there is none."""
    names = [os.environ.get("RMSGD_CLANG", ""), "clang++", *(f"clang++-{n}" for n in range(25, 13, -1))]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def build(compiler: str) -> Path:
    """Compile the fuzzer, and return the path of its program."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    machine = subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True, check=True).stdout
    jobs = [(source, None) for source in SOURCES]
    sets = ISA_FLAGS if machine.startswith("x86_64") else ["baseline"]
    jobs += [(source, isa) for source in ISA_SOURCES for isa in sets]
    objects = []
    for source, isa in jobs:
        target = FOLDER / f"{Path(source).stem}-{isa}.o"
        special = [] if isa is None else [*ISA_FLAGS[isa], f"-DRMSGD_ISA={isa}"]
        subprocess.run([compiler, *FLAGS, *special, "-c", source, "-o", str(target)], cwd=ROOT, check=True)
        objects.append(str(target))
    program = FOLDER / "core"
    subprocess.run([compiler, *FLAGS, *objects, "-o", str(program)], cwd=ROOT, check=True)
    return program


def fuzz(seconds: float, console: Console) -> int:
    """Run for ``seconds``, from the inputs that earlier runs have kept; returns 1 if something failed."""
    compiler = find_compiler()
    if compiler is None:
        console.print("core: left out, no clang (Debian: apt install clang libclang-rt-dev)", highlight=False)
        return 0
    program = build(compiler)
    corpus = FOLDER / "corpus"
    corpus.mkdir(exist_ok=True)
    command = [program, f"-max_total_time={seconds:.0f}", "-max_len=4096", "-timeout=20", "-verbosity=0"]
    command += ["-print_final_stats=1", f"-artifact_prefix={FOLDER}/", corpus]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    stats = dict(line.split(": ", 1) for line in done.stderr.splitlines() if line.startswith("stat::"))
    runs = stats.get("stat::number_of_executed_units", "0").strip()
    console.print(f"core: {runs} inputs, {len(list(corpus.iterdir()))} kept", highlight=False)
    if done.returncode != 0:
        console.print(done.stderr[-6000:], highlight=False, markup=False)
    return int(done.returncode != 0)
