"""Build of the compiled core; everything declarative is in pyproject.toml.

`rmsgd._cpu` holds the hot kernels once per instruction set and chooses at run time. A machine
without a compiler still gets a working installation: the build says so and the numba or the torch
backend runs instead.
"""

import os
import platform
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
X86 = platform.machine() in ("x86_64", "AMD64")

# Compiled once per instruction set, each time with RMSGD_ISA set to its name (see csrc/isa.h).
ISA_SOURCES = [
    "csrc/sgd/step_cpu.cpp",
    "csrc/spectrum/gram_cpu.cpp",
    "csrc/spectrum/tridiagonal_cpu.cpp",
    "csrc/spectrum/eigenvalues_cpu.cpp",
]
# Compiled once, for the baseline.
SOURCES = [
    "csrc/bind_cpu.cpp",
    "csrc/bind_step.cpp",
    "csrc/isa.cpp",
    "csrc/sgd/plan.cpp",
    "csrc/spectrum/measure_cpu.cpp",
]
ISA_FLAGS = {"baseline": []}
if X86:
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [*ISA_FLAGS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]

CXX_FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-psabi"]


def say(message: str) -> None:
    """Tell the person installing; pip shows it with -v and on failure."""
    print(f"rmsgd: {message}", file=sys.stderr, flush=True)


class BuildExtensions(build_ext):
    """Compiles each source for each instruction set it needs, all cores at work."""

    def build_extension(self, ext):
        try:
            self._build_cpu(ext)
        except Exception as error:  # whatever the compiler's absence or failure looks like
            if os.environ.get("RMSGD_REQUIRE_NATIVE"):
                raise
            say(
                f"the compiled core was not built ({error}). The package works without it, slower: "
                "`rmsgd doctor` shows what runs. Install a C++17 compiler and reinstall to get it."
            )

    def _build_cpu(self, ext):
        openmp = self._openmp_flags()
        extra = os.environ.get("RMSGD_CXXFLAGS", "").split()
        jobs = [(source, isa) for source in ISA_SOURCES for isa in ISA_FLAGS]
        jobs += [(source, None) for source in SOURCES]

        def compile_one(job):
            source, isa = job
            flags = [*CXX_FLAGS, *openmp, *extra]
            macros = []
            if isa is not None:
                flags += ISA_FLAGS[isa]
                macros.append(("RMSGD_ISA", isa))
            return self.compiler.compile(
                [source],
                output_dir=str(Path(self.build_temp) / (isa or "common")),
                macros=macros,
                include_dirs=ext.include_dirs,
                extra_postargs=flags,
                depends=[str(header) for header in ROOT.glob("csrc/**/*.h")],
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [name for names in pool.map(compile_one, jobs) for name in names]
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, target, extra_postargs=[*openmp, *extra], target_lang="c++")

    def _openmp_flags(self):
        """What this compiler wants for OpenMP: nothing where it has none (one thread then)."""
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder) / "probe.cpp"
            probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
            try:
                objects = self.compiler.compile([str(probe)], output_dir=folder, extra_postargs=["-fopenmp"])
                self.compiler.link_executable(
                    objects, str(Path(folder) / "probe"), extra_postargs=["-fopenmp"]
                )
            except Exception:
                say("this compiler has no OpenMP: the CPU kernels will use one thread")
                return []
        return ["-fopenmp"]

    def get_source_files(self):
        return [*ISA_SOURCES, *SOURCES]


class BuildPython(build_py):
    """Ships csrc/ as rmsgd/_csrc, so that the CUDA kernels can be built at run time."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree(ROOT / "csrc", Path(self.build_lib) / "rmsgd" / "_csrc", dirs_exist_ok=True)


def cpu_extension():
    import pybind11

    return Extension("rmsgd._cpu", [], include_dirs=["csrc", pybind11.get_include()], language="c++")


if __name__ == "__main__":
    setup(
        ext_modules=[cpu_extension()],
        cmdclass={"build_ext": BuildExtensions, "build_py": BuildPython},
    )
