"""Every CUDA kernel compiles for old and new GPUs, without warnings and without spilled registers."""

import ctypes
import importlib.util
import re
import subprocess
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from emulated import ROOT
from setuptools import Distribution

import setup
from bench.gpu.counting import FFMA_SHARE, REGISTERS
from rmsgd.backends import cupy_
from setup import CUDA_ARCHS, NVCC_FLAGS, find_nvcc

ARCHS = (75, 80, 90)
slow = pytest.mark.slow
OTHER_ARCHS = pytest.param(tuple(arch for arch in CUDA_ARCHS if arch not in ARCHS), id="others", marks=slow)


def kernels_of(source):
    return re.findall(r"^\s+(rmsgd_\w+)\(const __grid_constant__", (ROOT / "csrc" / source).read_text(), re.M)


# ptxas reports this about a kernel for one architecture.
REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<arch>\d+)'\n"
    r".*Function properties for (?P=kernel)\n"
    r" +(?P<frame>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers(?:(?!Compiling)[^\n])*?(?:, (?P<shared>\d+) bytes smem|\n)"
)
MOST_REGISTERS = {
    **REGISTERS,
    "rmsgd_step": 64,
    "rmsgd_step_large": 64,
    "rmsgd_sturm": 64,
    "rmsgd_sturm_double": 128,
    "rmsgd_gram_sum": 64,
}
"""With which so many threads are resident as the launches and the planner count on; other kernels: 128."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A function from a source and an architecture to the file that nvcc makes and what it says."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("nvcc")

    @cache
    def compiled(source, arch):
        cubin = folder / f"{Path(source).stem}-{arch}.cubin"
        target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        command = [nvcc, *NVCC_FLAGS, target, "--Werror", "all-warnings", "-Xptxas=-v", "-cubin"]
        command += [ROOT / "csrc" / source, "-o", cubin]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return cubin, done.stdout + done.stderr

    return compiled


@pytest.mark.parametrize("source", cupy_.SOURCES)
@pytest.mark.parametrize("archs", [pytest.param(ARCHS, id="few"), OTHER_ARCHS])
def test_nvcc_compiles_every_kernel_without_a_warning_a_spill_or_a_stack_frame(source, archs, compiled):
    said = "".join(compiled(source, arch)[1] for arch in archs)
    reports = list(REPORT.finditer(said))
    found = sorted((report["kernel"], int(report["arch"])) for report in reports)
    assert found == sorted((kernel, arch) for kernel in kernels_of(source) for arch in archs), said
    for report in reports:
        assert [report[what] for what in ("frame", "stores", "loads")] == ["0"] * 3, report[0]
        assert int(report["registers"]) <= MOST_REGISTERS.get(report["kernel"], 128), report[0]
        assert report["shared"] is None, "shared memory is what the launch asks for"


def disassembler():
    """NVIDIA's disassembler of its wheel."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec is not None else ():
        for path in sorted(Path(folder).glob("**/bin/nvdisasm")):
            path.chmod(0o755)
            return path
    pytest.skip("no disassembler: pip install nvidia-cuda-nvdisasm")


def loops_of(kernel, text):
    """The instructions of every innermost loop of a kernel."""
    body = re.split(r"\n\.text\.\w+:\n", text.partition(f"\n.text.{kernel}:\n")[2])[0]
    instructions, labels = [], {}
    for line in body.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(found[1])
    spans = [
        (labels[jump[1]], i + 1)
        for i, instruction in enumerate(instructions)
        if (jump := re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction)) and labels.get(jump[1], i + 1) <= i
    ]
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [instructions[begin:end] for begin, end in inner]


@pytest.mark.parametrize("arch", [75, pytest.param(90, marks=slow), pytest.param(120, marks=slow)])
def test_the_gram_kernel_has_the_share_of_multiply_adds_that_times_are_counted_with(arch, compiled):
    cubin, _ = compiled("spectrum/spectrum_cuda.cu", arch)
    command = [disassembler(), "-c", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    shares = {}
    for loop in loops_of("rmsgd_gram", text):
        multiply_adds = sum("FFMA" in instruction for instruction in loop)
        shares.setdefault(multiply_adds, []).append(multiply_adds / len(loop))
    for tiles, share in FFMA_SHARE.items():
        assert max(shares[128 * tiles]) >= share, "weights in fp32, columns contiguous"


def test_without_nvcc_the_cuda_kernels_are_left_out_or_an_error_where_they_are_asked_for(monkeypatch):
    monkeypatch.setattr(setup, "find_nvcc", lambda: None)
    monkeypatch.delenv("RMSGD_CUDA", raising=False)
    assert [ext.name for ext in setup.extensions()] == ["rmsgd._cpu"]
    monkeypatch.setenv("RMSGD_CUDA", "1")
    monkeypatch.setenv("RMSGD_REQUIRE_NATIVE", "1")
    _, cuda = setup.extensions()
    with pytest.raises(RuntimeError, match="no nvcc: set RMSGD_NVCC"):
        setup.BuildExtensions(Distribution()).build_extension(cuda)


NVCC = """#!/bin/sh
echo "$@" >> {said}
test "$1" = --list-gpu-arch && echo compute_75 compute_80 compute_90 compute_110 compute_103
"""


@pytest.fixture
def compiled_for(monkeypatch, tmp_path):
    """The architectures that nvcc gets under these variables where these GPUs are visible."""
    said, nvcc = tmp_path / "said", tmp_path / "nvcc"
    nvcc.write_text(NVCC.format(said=said))
    nvcc.chmod(0o755)

    def build(gpus, **environment):
        for name in ("RMSGD_CUDA", "RMSGD_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "RMSGD_REQUIRE_NATIVE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"RMSGD_NVCC": str(nvcc), **environment}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(setup, "visible_gpus", lambda: gpus)
        said.write_text("")
        command = setup.BuildExtensions(Distribution())
        command.build_temp = str(tmp_path)
        for extension in setup.extensions()[1:]:
            command.build_extension(extension)
        return sorted({int(arch) for arch in re.findall(r"code=sm_(\d+)", said.read_text())})

    return build


@pytest.mark.parametrize(
    ("gpus", "environment", "archs"),
    [
        ([], {}, []),
        ([90], {}, [90]),
        ([90, 75, 90], {}, [75, 90]),
        ([120], {}, [110]),  # newer than nvcc
        ([89], {}, [80]),
        ([61], {}, []),  # too old for the kernels
        ([], {"RMSGD_CUDA": "1"}, [75, 80, 90]),
        ([90], {"RMSGD_CUDA": "1"}, [90]),
        ([90], {"RMSGD_CUDA": "0"}, []),
        ([90], {"RMSGD_CUDA_ARCHS": "80, 75"}, [75, 80]),
        ([], {"RMSGD_CUDA_ARCHS": "90", "TORCH_CUDA_ARCH_LIST": "7.5"}, [90]),
        ([90], {"RMSGD_CUDA_ARCHS": "90", "RMSGD_CUDA": "0"}, []),
        ([], {"TORCH_CUDA_ARCH_LIST": "6.1;7.5;9.0a+PTX"}, [75, 90]),
        ([75], {"TORCH_CUDA_ARCH_LIST": "Hopper 7.5"}, [75, 90]),
        ([75], {"TORCH_CUDA_ARCH_LIST": " ", "RMSGD_CUDA_ARCHS": ""}, [75]),
    ],
)
def test_cuda_is_compiled_for_what_is_named_or_else_visible(compiled_for, gpus, environment, archs):
    assert compiled_for(gpus, **environment) == archs


def test_without_a_gpu_one_line_says_how_to_have_the_cuda_kernels(compiled_for, capfd):
    compiled_for([])
    (line,) = capfd.readouterr().err.splitlines()
    assert "RMSGD_CUDA_ARCHS=75,90 names what to compile for" in line


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        (
            "RMSGD_CUDA_ARCHS",
            "75,new",
            "RMSGD_CUDA_ARCHS='75,new': expected compute capabilities such as 75,90",
        ),
        ("TORCH_CUDA_ARCH_LIST", "5.0;Pascal", "TORCH_CUDA_ARCH_LIST='5.0;Pascal': expected"),
        ("TORCH_CUDA_ARCH_LIST", "5.0;6.1", "TORCH_CUDA_ARCH_LIST='5.0;6.1' names none of 75,80,90,103,110"),
    ],
)
def test_a_list_of_architectures_that_says_nothing_is_named(compiled_for, capfd, variable, text, message):
    assert compiled_for([90], **{variable: text}) == []
    assert message in capfd.readouterr().err
    with pytest.raises(ValueError, match="RCH"):
        compiled_for([90], RMSGD_REQUIRE_NATIVE="1", **{variable: text})


def driver(capabilities, status=0):
    """The part of libcuda that reports the GPUs."""

    def write(pointer, value):
        pointer._obj.value = value
        return 0

    return SimpleNamespace(
        cuInit=lambda flags: status,
        cuDeviceGetCount=lambda count: write(count, len(capabilities)),
        cuDeviceGetAttribute=lambda value, which, device: write(value, capabilities[device][which - 75]),
    )


def test_the_driver_says_which_gpus_are_visible(monkeypatch):
    monkeypatch.setattr(setup.ctypes, "CDLL", lambda name: driver([(7, 5), (12, 0)]))
    assert setup.visible_gpus() == [75, 120]
    monkeypatch.setattr(setup.ctypes, "CDLL", lambda name: driver([(7, 5)], status=100))
    assert setup.visible_gpus() == []


def test_without_a_driver_no_gpu_is_visible(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(setup.ctypes, "CDLL", missing)
    assert setup.visible_gpus() == []


def nvrtc_library():
    """The runtime compiler of NVIDIA's wheel, which needs no GPU."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec is not None else ():
        for path in sorted(Path(folder).glob("**/libnvrtc.so.*")):
            for part in path.parent.glob("libnvrtc-builtins.so.*"):  # it would not look beside itself
                ctypes.CDLL(str(part))
            return ctypes.CDLL(str(path))
    pytest.skip("no NVRTC: pip install nvidia-cuda-nvrtc")


@pytest.mark.parametrize("arch", [75, pytest.param(90, marks=slow)])
def test_nvrtc_compiles_the_same_sources_at_run_time(arch):
    library = nvrtc_library()
    program = ctypes.c_void_p()
    flags = [option.encode() for option in cupy_.options(cupy_.source_folder(), f"compute_{arch}")]
    assert (
        library.nvrtcCreateProgram(
            ctypes.byref(program), cupy_.program().encode(), b"rmsgd.cu", 0, None, None
        )
        == 0
    )
    status = library.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()
    library.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    library.nvrtcGetPTX(program, ptx)
    entries = re.findall(r"\.entry (\w+)\(", ptx.value.decode())
    assert sorted(entries) == sorted(name for source in cupy_.SOURCES for name in kernels_of(source))
    library.nvrtcDestroyProgram(ctypes.byref(program))


def test_no_header_of_the_kernels_includes_a_standard_header_at_run_time():
    seen, pending = set(), [ROOT / "csrc" / source for source in cupy_.SOURCES]
    while pending:
        path = pending.pop()
        if path in seen:
            continue
        seen.add(path)
        at_run_time = re.sub(r"#ifndef __CUDACC_RTC__.*?#(else|endif)", "", path.read_text(), flags=re.S)
        assert "#include <" not in at_run_time, path
        included = re.findall(r'#include "([^"]+)"', at_run_time)
        pending += [(path.parent / name).resolve() for name in included]
    assert len(seen) > 10
