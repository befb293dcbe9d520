"""The build of the compiled core; everything declarative is in pyproject.toml.

`rmsgd._cpu` holds the hot kernels once per instruction set and chooses among them at run time. A machine
without a compiler still gets a working installation: the build prints a message, and the numba or the torch
backend runs instead.

`rmsgd._cuda` is built where nvcc is found (RMSGD_NVCC, CUDA_HOME, the PATH) and the GPUs are known: those of
RMSGD_CUDA_ARCHS ("75,90"), else of TORCH_CUDA_ARCH_LIST ("7.5;9.0"), else the visible ones. RMSGD_CUDA=0
leaves it out. RMSGD_CUDA=1 asks for it, and without a GPU compiles for every architecture, which takes many
minutes. The newest architecture is added as PTX. Where the module is missing, CuPy compiles the same kernels
at run time.
"""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
X86 = platform.machine() in ("x86_64", "AMD64")

# These are compiled once per instruction set, each time with RMSGD_ISA set to its name (see csrc/isa.h).
ISA_SOURCES = [
    "csrc/sgd/step_cpu.cpp",
    "csrc/spectrum/gram_cpu.cpp",
    "csrc/spectrum/deflate_cpu.cpp",
    "csrc/spectrum/band_cpu.cpp",
    "csrc/spectrum/bulges_cpu.cpp",
    "csrc/spectrum/tridiagonal_cpu.cpp",
    "csrc/spectrum/eigenvalues_cpu.cpp",
]
# These are compiled once, for the baseline.
SOURCES = [
    "csrc/bind_cpu.cpp",
    "csrc/bind_step.cpp",
    "csrc/bind_layouts.cpp",
    "csrc/isa.cpp",
    "csrc/parallel.cpp",
    "csrc/sgd/plan.cpp",
    "csrc/spectrum/measure_cpu.cpp",
]
ISA_FLAGS = {"baseline": []}
if X86:
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [*ISA_FLAGS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]

# These are compiled by nvcc, once per architecture.
CUDA_SOURCES = ["csrc/sgd/step_cuda.cu", "csrc/spectrum/spectrum_cuda.cu", "csrc/evbmf/rates_cuda.cu"]
CUDA_ARCHS = (75, 80, 86, 89, 90, 100, 120)
# The names that TORCH_CUDA_ARCH_LIST may hold instead of numbers.
NAMED_ARCHS = {"turing": (75,), "ampere": (80, 86), "ada": (89,), "hopper": (90,), "blackwell": (100, 120)}
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0"]

CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-pthread",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
]

# RMSGD_SANITIZE=address or thread builds the core for a sanitizer; tests/sanitize.py does, into a folder of
# its own. ThreadSanitizer does not know the threads of GNU's OpenMP: that build starts its own.
SANITIZER = os.environ.get("RMSGD_SANITIZE")
SANITIZER_FLAGS = {
    "address": ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize=vptr"],
    "thread": ["-fsanitize=thread"],
}
if SANITIZER:
    CXX_FLAGS += [*SANITIZER_FLAGS[SANITIZER], "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    CXX_FLAGS += ["-O1", "-g1"]


def say(message: str) -> None:
    """Print a message for the user; pip shows it with -v and on failure."""
    print(f"rmsgd: {message}", file=sys.stderr, flush=True)


class BuildExtensions(build_ext):
    """Compiles each source for each instruction set or GPU that it needs, on all cores."""

    def build_extension(self, ext):
        if ext.name == "rmsgd._cuda":
            self._build_cuda_or_say_why_not(ext)
            return
        try:
            self._build_cpu(ext)
        except Exception as error:  # a missing or failing compiler may raise anything
            if os.environ.get("RMSGD_REQUIRE_NATIVE"):
                raise
            say(
                f"the compiled core was not built ({error}). The package works without it, slower: "
                "`rmsgd doctor` shows what runs. Install a C++17 compiler and reinstall to get it."
            )

    def _build_cpu(self, ext):
        openmp = self._openmp_flags()
        extra = os.environ.get("RMSGD_CXXFLAGS", "").split()
        linking = [*openmp, "-pthread", *extra, *SANITIZER_FLAGS.get(SANITIZER, [])]
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
        self.compiler.link_shared_object(objects, target, extra_postargs=linking, target_lang="c++")

    def _openmp_flags(self):
        """The flags of this compiler for OpenMP, empty where it has none."""
        if SANITIZER == "thread":
            return []
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder) / "probe.cpp"
            probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
            try:
                objects = self.compiler.compile([str(probe)], output_dir=folder, extra_postargs=["-fopenmp"])
                self.compiler.link_executable(
                    objects, str(Path(folder) / "probe"), extra_postargs=["-fopenmp"]
                )
            except Exception:
                say("this compiler has no OpenMP: the CPU kernels will start threads of their own")
                return []
        return ["-fopenmp"]

    def _build_cuda_or_say_why_not(self, ext):
        try:
            self._build_cuda(ext)
        except Exception as error:
            if os.environ.get("RMSGD_REQUIRE_NATIVE"):
                raise
            say(
                f"the CUDA kernels were not built ({error}). On a GPU, CuPy compiles them at run time: "
                "install the extra cuda13 (or cuda12) as well."
            )

    def _build_cuda(self, ext):
        nvcc = find_nvcc()
        if nvcc is None:
            raise RuntimeError("no nvcc: set RMSGD_NVCC or CUDA_HOME, or put it into PATH")
        numbers = cuda_archs(supported_archs(nvcc))
        if not numbers:
            say(
                "the CUDA kernels are not compiled, since no GPU for them is visible: RMSGD_CUDA_ARCHS=75,90 "
                "names what to compile for, RMSGD_CUDA=1 means all; else CuPy compiles them at run time"
            )
            return
        archs = as_text(numbers)
        say(f"compiling the CUDA kernels for {archs} with {nvcc}; this takes some minutes")
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        include = ["-Icsrc", f"-I{nvcc.parent.parent / 'include'}"]

        def compile_one(source):
            target = folder / f"{Path(source).stem}-{archs.replace(',', '-')}.o"
            listed = target.with_suffix(".d")
            if not is_newer(target, listed):
                flags = [*NVCC_FLAGS, *gencode(numbers), *include, "-MD", "-MF", listed]
                run([nvcc, *flags, "-c", source, "-o", target])
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, CUDA_SOURCES))
        objects += self.compiler.compile(
            ["csrc/bind_cuda.cpp"],
            output_dir=str(folder),
            macros=[("RMSGD_CUDA_ARCHITECTURES", f'"{archs}"')],
            include_dirs=[*ext.include_dirs, str(nvcc.parent.parent / "include")],
            extra_postargs=[*CXX_FLAGS, "-Wno-unknown-pragmas"],
        )
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        # The runtime is static, so that the module needs only a driver and shares no symbol with torch's
        # runtime.
        libraries = [nvcc.parent.parent / "lib64", nvcc.parent.parent / "lib"]
        self.compiler.link_shared_object(
            objects,
            target,
            libraries=["cudart_static", "dl", "rt", "pthread"],
            library_dirs=[str(folder) for folder in libraries if folder.is_dir()],
            target_lang="c++",
        )
        say("compiled the CUDA kernels")

    def get_source_files(self):
        return [*ISA_SOURCES, *SOURCES]


def find_nvcc() -> Path | None:
    """The CUDA compiler, symbolic links resolved; None where there is none."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [os.environ.get("RMSGD_NVCC"), *(f"{home}/bin/nvcc" for home in homes if home)]
    for candidate in [*candidates, shutil.which("nvcc")]:
        if candidate and Path(candidate).is_file():
            return Path(candidate).resolve()
    return None


def supported_archs(nvcc: Path) -> list[int]:
    """The architectures that this nvcc and the kernels know."""
    known = map(int, re.findall(r"compute_(\d+)", run([nvcc, "--list-gpu-arch"])))
    return sorted(arch for arch in known if arch >= CUDA_ARCHS[0])


def cuda_archs(supported: list[int]) -> list[int]:
    """The architectures to compile for, in ascending order; empty where neither variables nor GPUs name any.

    Raises:
        ValueError: RMSGD_CUDA_ARCHS or TORCH_CUDA_ARCH_LIST cannot be read, or names none that is supported.

    """
    for variable in ("RMSGD_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        if text := os.environ.get(variable, "").strip():
            # torch's list may name older GPUs too, which are left out; RMSGD_CUDA_ARCHS must name supported
            # ones.
            named = parsed_archs(variable, text)
            archs = [arch for arch in named if arch in supported] if variable.startswith("TORCH") else named
            if not archs:
                raise ValueError(f"{variable}={text!r} names none of {as_text(supported)}")
            return archs
    # A GPU that nvcc does not know yet runs the code for the newest architecture before it.
    older = ([arch for arch in supported if arch <= gpu] for gpu in visible_gpus())
    if archs := sorted({known[-1] for known in older if known}):
        return archs
    return [arch for arch in CUDA_ARCHS if arch in supported] if os.environ.get("RMSGD_CUDA") == "1" else []


def parsed_archs(variable: str, text: str) -> list[int]:
    """The numbers of a list such as "75,90", "7.5;9.0a 12.0+PTX" or "Turing Hopper", in ascending order."""
    archs: set[int] = set()
    for word in re.split(r"[\s,;]+", text.strip(" ,;").lower()):
        name = word.removesuffix("+ptx")
        if name in NAMED_ARCHS:
            archs.update(NAMED_ARCHS[name])
        elif number := re.fullmatch(r"(\d+)\.?(\d)[af]?", name):
            archs.add(int(number[1] + number[2]))
        else:
            raise ValueError(
                f"{variable}={text!r}: expected compute capabilities such as 75,90, got {word!r}"
            )
    return sorted(archs)


def visible_gpus() -> list[int]:
    """Compute capabilities (75 for 7.5) of the GPUs that the driver shows to this process."""
    major_and_minor = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, value = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found = []
    for device in range(count.value):
        digits = ""
        for attribute in major_and_minor:
            driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            digits += str(value.value)
        found.append(int(digits))
    return found


def as_text(archs: list[int]) -> str:
    """The numbers in the form of RMSGD_CUDA_ARCHS."""
    return ",".join(map(str, archs))


def gencode(archs: list[int]) -> list[str]:
    """nvcc's flags for machine code of every architecture and PTX of the newest."""
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def is_newer(target: Path, listed: Path) -> bool:
    """Whether a target is newer than all files in the makefile rule that the compiler wrote."""
    if not (target.is_file() and listed.is_file()):
        return False
    files = listed.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    return all(Path(f).is_file() and Path(f).stat().st_mtime <= target.stat().st_mtime for f in files)


def run(command: list) -> str:
    """The output of a command; raises RuntimeError with the end of that output if it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise RuntimeError(f"{Path(str(command[0])).name} failed: {said[-2000:]}")
    return done.stdout


class BuildPython(build_py):
    """Ships the CUDA kernels and their headers as rmsgd/_csrc, to be built at run time."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "rmsgd" / "_csrc"
            shutil.copytree(ROOT / "csrc", target, ignore=shutil.ignore_patterns("*.cpp"), dirs_exist_ok=True)


def extensions():
    import pybind11

    names = ["rmsgd._cpu"]
    wanted = os.environ.get("RMSGD_CUDA")
    if wanted == "1" or (wanted != "0" and find_nvcc() is not None):
        names.append("rmsgd._cuda")
    include, required = ["csrc", pybind11.get_include()], bool(os.environ.get("RMSGD_REQUIRE_NATIVE"))
    return [
        # The extensions are optional: an editable installation also goes on without one that could not be
        # built.
        Extension(name, [], include_dirs=include, language="c++", optional=not required)
        for name in names
    ]


if __name__ == "__main__":
    setup(
        license="MIT",
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildExtensions, "build_py": BuildPython},
    )
