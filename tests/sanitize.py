"""The compiled core under sanitizers: ``python tests/sanitize.py [address] [thread]`` (``make sanitize``).

``address`` is AddressSanitizer with UndefinedBehaviorSanitizer, ``thread`` is ThreadSanitizer. For each,
the core is built into ``build/sanitize`` and the numerical tests run on it, once for every
instruction set that this CPU has. The first report of a sanitizer ends the run.
"""

import argparse
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[1]

TESTS = {
    "address": [
        "test_entry_points.py",
        "test_step_kernel.py",
        "test_evbmf.py",
        "test_backends_agree.py",
        "test_learning_rate_rules.py",
        "test_parameters.py",
        "test_threads.py",
        "test_banded_reduction.py",
    ],
    "thread": ["test_threads.py", "test_step_kernel.py", "test_banded_reduction.py"],
}
LEFT_OUT = "not every_instruction_set"  # this test would run the tests again, in processes of its own

OPTIONS = {
    # CPython frees nothing at its exit. The arguments of a torch operation stay addressable on the stack.
    "address": {
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    },
    # Torch and its threads are not built for the sanitizer, which therefore sees only half of their work.
    "thread": {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:exitcode=66"},
}
RUNTIMES = {"address": ["libasan.so", "libubsan.so", "libstdc++.so.6"], "thread": ["libtsan.so"]}


def runtimes(sanitizer: str) -> str:
    """The compiler's libraries that must be loaded before Python's own."""
    compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX"))
    found = []
    for name in RUNTIMES[sanitizer]:
        command = [*compiler, f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if os.path.isabs(path):
            found.append(os.path.realpath(path))
    if not found:
        sys.exit(f"{compiler[0]} has no {RUNTIMES[sanitizer][0]}: install GCC's sanitizer libraries")
    return ":".join(found)


def folder(sanitizer: str) -> Path:
    return ROOT / "build" / "sanitize" / sanitizer


def build(sanitizer: str) -> Path:
    """Build the package for a sanitizer, and return the folder to import it from."""
    base = folder(sanitizer)
    environment = {"RMSGD_SANITIZE": sanitizer, "RMSGD_CUDA": "0", "RMSGD_REQUIRE_NATIVE": "1"}
    command = [sys.executable, "setup.py", "-q", "build", f"--build-base={base}", f"--build-lib={base}/lib"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=True)
    return base / "lib"


def run(sanitizer: str, library: Path, isa: str) -> None:
    """Run the tests on one instruction set; exit where one fails or the sanitizer reports anything."""
    environment = {
        **os.environ,
        **OPTIONS[sanitizer],
        "LD_PRELOAD": runtimes(sanitizer),
        "PYTHONPATH": str(library),
        "PYTHONMALLOC": "malloc",  # so that the sanitizer sees every allocation
        "RMSGD_ISA": isa,
        "RMSGD_TEST_BACKENDS": "native",
    }
    tests = [f"tests/{name}" for name in TESTS[sanitizer]]
    pytest = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-o", f"pythonpath={library} ."]
    # It runs without address randomisation, since older versions of ThreadSanitizer cannot handle some
    # layouts.
    command = ["setarch", "-R", *pytest, "--capture=sys", "-x", "-k", LEFT_OUT, *tests]
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    if code != 0:
        sys.exit(f"{sanitizer}, {isa}: exit code {code}")


def instruction_sets() -> list[str]:
    """The instruction sets that this CPU has."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return ["baseline", *(isa for isa, flag in (("avx2", "avx2"), ("avx512", "avx512vl")) if flag in flags)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # Python 3.11 also checks the default against the choices.
    parser.add_argument("sanitizers", nargs="*", choices=[*TESTS, "all"], default="all")
    parser.add_argument("--built", action="store_true", help="take the core as an earlier run built it")
    options = parser.parse_args()
    for sanitizer in TESTS if "all" in options.sanitizers else options.sanitizers:
        library = folder(sanitizer) / "lib" if options.built else build(sanitizer)
        for isa in instruction_sets():
            print(f"-- {sanitizer}, {isa} kernels", flush=True)
            run(sanitizer, library, isa)
    print("clean")


if __name__ == "__main__":
    main()
