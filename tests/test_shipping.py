"""Archives and wheels are complete, hold nothing else, and install with and without a compiler."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from clock import PATIENCE

import rmsgd
from setup import find_nvcc

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false", "RMSGD_CUDA": "0"}
NATIVE = sysconfig.get_config_var("EXT_SUFFIX")


def run(*command, cwd=ROOT, **environment):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def copied(folder):
    """A copy of the checkout, since other builds there would use the same folder."""
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def build(kind, folder, **environment):
    """Build an sdist or a wheel with the packages that are installed here, and return its path."""
    pytest.importorskip("build")
    pytest.importorskip("pybind11")
    copy = copied(folder / "source")
    run(sys.executable, "-m", "build", "-n", f"--{kind}", "--outdir", folder, copy, cwd=folder, **environment)
    [made] = folder.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return made


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return build("sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory):
    """A wheel made where no compiler works."""
    return build("wheel", tmp_path_factory.mktemp("pure"), **NO_COMPILER)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build("wheel", tmp_path_factory.mktemp("wheel"), RMSGD_CUDA="0", RMSGD_REQUIRE_NATIVE="1")


def python_of_clean_environment(folder):
    """The Python of a new environment that has rmsgd's dependencies, but not rmsgd."""
    venv.create(folder, with_pip=False)
    [site] = folder.glob("lib/python*/site-packages")
    dependencies = [p for p in sys.path if Path(p).name == "site-packages"]
    (site / "dependencies.pth").write_text("\n".join(dependencies))
    return folder / "bin" / "python"


def install(python, *package, **environment):
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps"]
    run(*pip, "--no-build-isolation", "--no-index", *package, **environment)


def doctor(python, folder):
    """The output of ``rmsgd doctor`` by an environment's own script, and the place that rmsgd came from."""
    environment = {"PYTHONPATH": "", "RMSGD_BACKEND": ""}
    where = run(python, "-c", "import rmsgd; print(rmsgd.__file__)", cwd=folder, **environment)
    assert str(python.parents[1]) in where
    return json.loads(run(python.parent / "rmsgd", "doctor", "--json", cwd=folder, **environment))


STEP = """
import torch, rmsgd
p = torch.nn.Parameter(torch.randn(20, 30))
optimizer = rmsgd.RMSGD([p])
p.grad = torch.ones_like(p)
optimizer.step()
optimizer.epoch_step()
print(optimizer.report().layers[0].rank)
"""


def expected_python_files():
    tracked = run("git", "ls-files", "rmsgd").split()
    return {name for name in tracked if not name.endswith(".md")}


def test_the_wheel_holds_the_package_and_nothing_else(pure_wheel):
    names = set(zipfile.ZipFile(pure_wheel).namelist())
    info = {name for name in names if ".dist-info/" in name}
    kernels = {name for name in names if name.startswith("rmsgd/_csrc/")}
    assert names - info - kernels == expected_python_files()
    assert {Path(name).suffix for name in kernels} == {".h", ".cu"}
    assert len(kernels) == len([*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cu")])
    assert {Path(name).name for name in info} >= {"METADATA", "RECORD", "LICENSE", "entry_points.txt"}


def test_the_wheel_is_typed(pure_wheel):
    names = zipfile.ZipFile(pure_wheel).namelist()
    assert {"rmsgd/py.typed", "rmsgd/_cpu.pyi", "rmsgd/_cuda.pyi"} <= set(names)


def test_the_sdist_holds_all_that_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    tracked = set(run("git", "ls-files", "rmsgd", "csrc").split())
    assert names >= tracked | {"setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md"}
    assert not [name for name in names if re.search(r"\.(so|pyc|o)$|__pycache__|^tests/", name)]


def test_the_metadata_tell_licence_pythons_and_extras(pure_wheel):
    archive = zipfile.ZipFile(pure_wheel)
    [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = message_from_bytes(archive.read(name))
    assert metadata["License"] == "MIT"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["project"]["optional-dependencies"])
    told = [c for c in metadata.get_all("Classifier") if re.search(r":: 3\.\d+$", c)]
    wheels = PROJECT["tool"]["cibuildwheel"]["build"].split()
    assert [c.split(":: 3.")[1] for c in told] == [w[3:].removeprefix("3").removesuffix("-*") for w in wheels]


def test_no_metadata_are_stated_in_a_way_that_setuptools_65_rejects():
    assert not {"license", "license-files"} & set(PROJECT["project"])  # PEP 639, of setuptools 77
    assert PROJECT["build-system"]["requires"][0] == "setuptools>=65"


def test_the_version_stands_in_one_place(sdist, pure_wheel):
    assert "version" in PROJECT["project"]["dynamic"]
    # setuptools before 69.3 keeps the hyphen in the name of a source archive.
    assert sdist.name.replace("rmsgd-", "rmsgd_") == f"rmsgd_kernels-{rmsgd.__version__}.tar.gz"
    assert pure_wheel.name.startswith(f"rmsgd_kernels-{rmsgd.__version__}-")
    assert rmsgd.__version__ in (ROOT / "CHANGELOG.md").read_text()
    assert set(re.findall(r"ref: v([\d.]+)", (ROOT / "README.md").read_text())) <= {rmsgd.__version__}


def test_an_installation_without_a_compiler_works_and_says_what_is_missing(pure_wheel, tmp_path):
    python = python_of_clean_environment(tmp_path / "venv")
    install(python, pure_wheel)
    found = doctor(python, tmp_path)
    [native] = [b for b in found["backends"] if b["name"] == "native"]
    assert not native["available"]
    assert "C++17 compiler" in native["reason"]
    assert found["used"]["cpu"] in ("numba", "torch")
    assert "C++17 compiler" in found["advice"][0]
    assert run(python, "-c", STEP, cwd=tmp_path, PYTHONPATH="", RMSGD_BACKEND="torch").strip() == "(0,)"


@pytest.mark.slow
def test_an_installed_wheel_runs_the_compiled_core(wheel, tmp_path):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if name.endswith(".so")} == {f"rmsgd/_cpu{NATIVE}"}
    python = python_of_clean_environment(tmp_path / "venv")
    install(python, wheel)
    assert doctor(python, tmp_path)["used"]["cpu"] == "native"
    assert run(python, "-c", STEP, cwd=tmp_path, PYTHONPATH="").strip() == "(0,)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compilers", "modules"),
    [
        ({"RMSGD_CUDA": "0"}, {"_cpu"}),
        ({"RMSGD_CUDA": "1", "RMSGD_CUDA_ARCHS": "90"}, {"_cpu", "_cuda"}),
        (NO_COMPILER | {"RMSGD_CUDA": "1", "RMSGD_NVCC": "/bin/false"}, set()),
    ],
    ids=["g++", "g++ and nvcc", "neither"],
)
def test_an_sdist_installs_with_and_without_compilers(sdist, tmp_path, compilers, modules):
    if "_cuda" in modules and find_nvcc() is None:
        pytest.skip("no nvcc")
    python = python_of_clean_environment(tmp_path / "venv")
    install(python, sdist, **compilers)
    built = {path.name.split(".")[0] for path in python.parents[1].glob("lib/*/site-packages/rmsgd/*.so")}
    assert built == modules
    assert (doctor(python, tmp_path)["used"]["cpu"] == "native") == ("_cpu" in modules)
    for name in modules:
        run(python, "-c", f"import rmsgd.{name}", cwd=tmp_path, PYTHONPATH="")


def test_an_editable_installation_goes_on_without_a_compiler(tmp_path):
    copy = copied(tmp_path / "source")
    python = python_of_clean_environment(tmp_path / "venv")
    install(python, "-e", copy, **NO_COMPILER)
    where = run(python, "-c", "import rmsgd; print(rmsgd.__file__)", cwd=tmp_path, PYTHONPATH="")
    assert str(copy) in where


@pytest.mark.slow
def test_the_stubs_are_those_of_the_compiled_core(tmp_path):
    pytest.importorskip("rmsgd._cpu")
    (tmp_path / "allowed").write_text("rmsgd._cpu.(Layouts|StepPlan)\n")  # their metaclass is pybind11's
    stubtest = [sys.executable, "-m", "mypy.stubtest", "rmsgd._cpu", "--allowlist", tmp_path / "allowed"]
    run(*stubtest, PYTHONPATH=str(ROOT))


USE = """
from typing import Any, assert_type
import torch
import rmsgd

model = torch.nn.Linear(3, 4)
optimizer = rmsgd.RMSGD(model.named_parameters(), lr=0.1)
schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
assert_type(optimizer.step(lambda: 0.5), float)
optimizer.step()
optimizer.epoch_step()
assert_type(optimizer.learning_rates(), dict[str, float])
assert_type(optimizer.report().layers, tuple[rmsgd.LayerMetrics, ...])
assert_type(rmsgd.probe(model).quality, float)
low_rank = rmsgd.evbmf(model.weight, vectors=True)
assert_type((low_rank.U, low_rank.rank), tuple[torch.Tensor | None, int])
rmsgd.RMSGD(model.parameters(), lr="0.1")  # type: ignore[arg-type]
"""


@pytest.mark.slow
def test_code_that_uses_it_passes_mypy_strict(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "use.py").write_text(USE)
    mypy = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "use.py"]
    run(*mypy, cwd=tmp_path, MYPYPATH=str(ROOT))


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_hash_and_no_job_is_without_a_time_limit(workflow):
    text = workflow.read_text()
    used = re.findall(r"uses: (.*)", text)
    assert used
    assert [line for line in used if not re.fullmatch(r"\S+@[0-9a-f]{40} # v[\d.]+", line)] == []
    assert text.count("\n    timeout-minutes: ") == text.count("\n    runs-on: ")
    assert "\nconcurrency:\n" in text


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_keep_no_credentials_and_run_nothing_that_a_branch_is_called(workflow):
    text = workflow.read_text()
    assert text.count("actions/checkout@") == text.count("persist-credentials: false")
    assert [line for line in text.splitlines() if "run:" in line and "${{" in line] == []


@pytest.mark.parametrize(
    "script", [*WORKFLOWS, ROOT / ".ci" / "run", ROOT / ".pre-commit-config.yaml"], ids=str
)
def test_what_ci_makes_the_makefile_has(script):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    made = set(re.findall(r"(?:run:|entry:|part \w+) make ([\w-]+)", script.read_text()))
    assert made
    assert made <= targets


def test_the_oldest_versions_are_those_that_are_promised():
    promised = [r for r in PROJECT["project"]["dependencies"] if ">=" in r]
    oldest = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    for requirement in promised:
        name, version = requirement.split(">=")
        assert any(line == f"{name}=={version}" or line.startswith(f"{name}=={version}.") for line in oldest)


def test_wheels_are_configured_for_every_python_and_machine_that_is_promised():
    configured = PROJECT["tool"]["cibuildwheel"]["build"].split()
    assert configured == ["cp311-*", "cp312-*", "cp313-*", "cp314-*"]
    release = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    assert "[ubuntu-24.04, ubuntu-24.04-arm, macos-15]" in release
