"""A kernel of one instruction set never runs on a CPU that lacks it, however little the compiler inlines."""

import platform
import shutil
import subprocess

import pytest
from emulated import COMPILER, ROOT

AVX512 = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="one instruction set here")
@pytest.mark.parametrize(
    "source",
    [
        "sgd/step_cpu",
        "spectrum/gram_cpu",
        "spectrum/deflate_cpu",
        "spectrum/band_cpu",
        "spectrum/bulges_cpu",
        "spectrum/tridiagonal_cpu",
        "spectrum/eigenvalues_cpu",
    ],
)
def test_all_that_a_kernel_shares_with_other_sources_is_in_its_own_namespace(tmp_path, source):
    # The linker keeps one copy of an inline function in several sources. It must not be the AVX-512 copy.
    if COMPILER is None or shutil.which("nm") is None:
        pytest.skip("no compiler")
    target = tmp_path / "kernel.o"
    # Without optimisation, as under sanitizers, no function is inlined unless it must be.
    command = [COMPILER, "-std=c++17", "-O0", "-fPIC", "-Wno-psabi", "-DRMSGD_ISA=avx512", *AVX512]
    subprocess.run([*command, f"-I{ROOT}/csrc", "-c", f"{ROOT}/csrc/{source}.cpp", "-o", target], check=True)
    listed = subprocess.run(
        ["nm", "-C", "--defined-only", target], capture_output=True, text=True, check=True
    )
    shared = [line.split(" ", 2)[1:] for line in listed.stdout.splitlines()]
    shared = [name for kind, name in shared if kind.isupper() or kind in "vwu"]
    assert shared
    assert [name for name in shared if "rmsgd::avx512::" not in name] == []
