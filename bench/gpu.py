"""`python -m bench gpu --out DIR`: build, GPU tests and every measurement of the CUDA kernels, in 8 minutes.

Device times are taken with the queue filled: the GPU is kept busy until the host has queued all that
is timed, so that Python's own time is left out. Cases that are compared are timed in turn.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench import measure, models, peers
from bench.weights import make_trained_like

SCHEMA = "rmsgd-bench-gpu/1"
ROOT = Path(__file__).parents[1]
BUDGET_S = 460
STEP_NETWORKS = ("resnet50", "resnet101", "vit-b16")
STEP_CASES = ("rmsgd", "sgd-fused", "sgd-foreach", "sgd-per-layer")
EPOCH_NETWORKS = ("resnet18", "resnet50", "vit-b16")
RELEASE_NETWORKS = ("resnet18", "resnet50")
EIGENVALUE_SIZES = (32, 64, 128, 256, 512, 768, 1024)
EPOCH_TIME_ARGUMENTS = ("--model", "resnet18", "--device", "cuda", "--batch", "128", "--rounds", "8")


def main(arguments: Sequence[str]) -> int:
    """Runs the command.

    Returns:
        0 when everything ran and every GPU test passed, 1 otherwise, 2 where there is no GPU.

    """
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(".out/gpu"), help="folder (default: %(default)s)")
    parser.add_argument("--no-build", action="store_true", help="use the kernels that are there")
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    options = parser.parse_args(arguments)
    console = Console()
    if not torch.cuda.is_available():
        Console(stderr=True).print(
            "bench gpu: torch finds no CUDA device here, so there is nothing to measure"
        )
        return 2
    deadline = time.monotonic() + BUDGET_S
    result: dict[str, Any] = {"schema": SCHEMA, "machine": measure.machine(), "skipped": []}
    sections: list[tuple[str, Callable[[], Any]]] = [
        ("copy_bytes_per_second", copy_bandwidth),
        ("step", step),
        ("epoch_end", epoch_end),
        ("eigenvalues", eigenvalues),
        ("epoch_time", lambda: epoch_time(options.out, deadline)),
    ]
    if not options.no_tests:
        sections.insert(0, ("tests", lambda: gpu_tests(options.out, deadline)))
    if not options.no_build:
        sections.insert(0, ("build", build))
    for name, run in sections:
        if time.monotonic() > deadline:
            result["skipped"].append(name)
            continue
        started = time.monotonic()
        console.print(f"{name} ...")
        try:
            result[name] = run()
        except Exception as error:  # one section's failure leaves the others' figures
            result[name] = {"error": f"{type(error).__name__}: {error}"}
        console.print(f"{name}: {time.monotonic() - started:.0f} s")
        measure.write_json(options.out / "gpu.json", result)
    console.print(*tables(result))
    failed = [
        name for name, _ in sections if isinstance(result.get(name), dict) and result[name].get("error")
    ]
    for name in failed:
        console.print(f"{name}: {result[name]['error']}")
    return 1 if failed or result["skipped"] else 0


# -- build and tests ---------------------------------------------------------------------------------


def build() -> dict[str, Any]:
    """Builds rmsgd._cuda for this GPU, or for what RMSGD_CUDA_ARCHS names."""
    major, minor = torch.cuda.get_device_capability()
    environment = {"RMSGD_CUDA_ARCHS": f"{major}{minor}", **os.environ}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    from rmsgd import backends

    used = backends.backend_for(torch.device("cuda"))
    return {
        "seconds": time.monotonic() - started,
        "architectures": environment["RMSGD_CUDA_ARCHS"],
        "backend": used.name,
        "description": used.description,
        "error": done.stderr[-1000:] if done.returncode else None,
    }


def gpu_tests(out: Path, deadline: float) -> dict[str, Any]:
    """Runs the tests marked gpu; their output goes to `gpu-tests.txt`."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider"]
    limit = max(60.0, deadline - time.monotonic() - 200)
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu-tests.txt"
    with log.open("w") as stream:
        try:
            status = subprocess.run(
                [*command, "-rA", "--no-header", "tests/test_gpu.py"],
                cwd=ROOT,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=limit,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            status = -1
    text = log.read_text()
    counts = {word: len(re.findall(rf"^{word} ", text, re.M)) for word in ("PASSED", "FAILED", "ERROR")}
    failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.M)
    error = None if status == 0 else "stopped for lack of time" if status == -1 else "tests failed"
    return {**counts, "failures": failures, "error": error}


# -- clocks ------------------------------------------------------------------------------------------


def device_seconds(call: Callable[[], object], calls: int) -> float:
    """Seconds of device time per call, the queue filled before the first one begins."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / calls


def interleaved_device_seconds(
    cases: Mapping[str, Callable[[], object]], rounds: int, calls: int
) -> dict[str, list[float]]:
    """Case to device seconds per call and round, the cases in turn."""
    for call in cases.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, call in cases.items():
            seconds[name].append(device_seconds(call, calls))
    return seconds


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a device copy of 1 GiB."""
    source = torch.empty(2**28, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    times = interleaved_device_seconds({"copy": lambda: target.copy_(source)}, 7, 5)["copy"]
    return 2 * source.nbytes / measure.median(times).median


# -- measurements ------------------------------------------------------------------------------------


def step() -> list[dict[str, Any]]:
    """The step of whole networks: device time and host time against torch's SGD, bandwidth."""
    rows = []
    for network in STEP_NETWORKS:
        optimizers = {}
        for case in STEP_CASES:
            model = models.build(network).cuda()
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizers[case] = peers.make(case, model.named_parameters())
        cases = {case: optimizer.step for case, optimizer in optimizers.items()}
        seconds = interleaved_device_seconds(cases, 7, 5)
        wall = measure.interleave(cases, 7, 0.02, warmup=3, synchronise=torch.cuda.synchronize)
        parameters = sum(p.numel() for p in model.parameters())
        ours = measure.median(seconds["rmsgd"]).median
        rows.append(
            {
                "network": network,
                "parameters": parameters,
                "device_seconds": {case: measure.median(times)._asdict() for case, times in seconds.items()},
                "wall_seconds": {case: measure.median(times)._asdict() for case, times in wall.items()},
                "bytes_per_second": 20 * parameters / ours,
                "device_ratio_to": {
                    case: measure.ratio(seconds["rmsgd"], seconds[case])._asdict() for case in STEP_CASES[1:]
                },
                "wall_ratio_to": {
                    case: measure.ratio(wall["rmsgd"], wall[case])._asdict() for case in STEP_CASES[1:]
                },
            }
        )
        del optimizers, cases
        torch.cuda.empty_cache()
    return rows


def epoch_end() -> list[dict[str, Any]]:
    """The epoch end of initial and of trained-like weights: device time, host time, memory, rmsgd 1.0.2."""
    rows = []
    for network, trained in ((name, t) for name in (*EPOCH_NETWORKS, "resnet101") for t in (False, True)):
        model = models.build(network)
        if trained:
            make_trained_like(model)
        model.cuda()
        optimizer = peers.make("rmsgd", model.named_parameters())
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()

        def end(optimizer: Any = optimizer) -> None:
            optimizer.epoch_step()
            optimizer.step()  # waits for the rates

        seconds = interleaved_device_seconds({"end": end, "step": optimizer.step}, 5, 2)
        torch.cuda.synchronize()
        started = time.perf_counter()
        optimizer.epoch_step()
        host = time.perf_counter() - started
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        optimizer.epoch_step()
        torch.cuda.synchronize()
        device = measure.median(seconds["end"]).median - measure.median(seconds["step"]).median
        row = {
            "network": network,
            "weights": "trained-like" if trained else "initial",
            "device_seconds": device,
            "host_seconds": host,
            "extra_bytes": torch.cuda.max_memory_allocated() - before,
            "stages": stages(model),
        }
        if network in RELEASE_NETWORKS and not trained:
            row |= release_epoch_end(model, device)
        rows.append(row)
        del model, optimizer
        torch.cuda.empty_cache()
    return rows


def stages(model: nn.Module) -> dict[str, int]:
    """How many matrices each stage of the accuracy guard decided."""
    from rmsgd.backends import backend_for
    from rmsgd.backends.base import STAGE
    from rmsgd.layers import unfoldings

    matrices = [(p, u) for p in model.parameters() if p.ndim > 1 for u in unfoldings(p.shape)]
    taken = backend_for(torch.device("cuda")).measure(matrices)[:, STAGE].tolist()
    return {name: taken.count(stage) for stage, name in enumerate(("fp32 Gram", "fp64 Gram", "SVD"))}


def release_epoch_end(model: nn.Module, ours: float) -> dict[str, Any]:
    """One epoch end of rmsgd 1.0.2 on the same card: it waits for the host, so the clock is the host's."""
    try:
        optimizer = peers.make("rmsgd-1.0.2", model.named_parameters())
    except peers.PeerUnavailableError as error:
        return {"rmsgd_1_0_2": str(error)}
    torch.cuda.synchronize()
    started = time.perf_counter()
    optimizer.epoch_step()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return {"rmsgd_1_0_2_seconds": seconds, "times_faster": seconds / ours}


def eigenvalues(count: int = 16) -> list[dict[str, Any]]:
    """`count` square matrices of one size: ours (Gram to metrics) against Gram and the vendor's routines."""
    from rmsgd.backends import backend_for
    from rmsgd.layers import unfoldings

    backend = backend_for(torch.device("cuda"))
    rows = []
    for n in EIGENVALUE_SIZES:
        weights = torch.randn(count, n, 2 * n, device="cuda")
        matrices = [(w, u) for w in weights for u in unfoldings(w.shape)]

        def torchs(weights: Tensor = weights) -> None:
            torch.linalg.eigvalsh(weights @ weights.mT)

        cases = {"ours": lambda matrices=matrices: backend.measure(matrices), "torch eigvalsh": torchs}
        cases |= dict(cupys(weights))
        wall = measure.interleave(cases, 5, 0.0, warmup=2, synchronise=torch.cuda.synchronize)
        rows.append(
            {
                "n": n,
                "count": count,
                "seconds": {case: measure.median(times)._asdict() for case, times in wall.items()},
                "ratio": {
                    case: measure.ratio(wall["ours"], wall[case])._asdict()
                    for case in cases
                    if case != "ours"
                },
            }
        )
    return rows


def cupys(weights: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """CuPy's batched eigenvalues (cuSOLVER syevjBatched), where CuPy is there."""
    try:
        import cupy
    except ImportError:
        return
    gram = cupy.from_dlpack((weights @ weights.mT).contiguous())
    yield "cupy eigvalsh", lambda: cupy.linalg.eigvalsh(gram)


def epoch_time(out: Path, deadline: float) -> dict[str, Any]:
    """`bench epoch-time` of ResNet18 with RMSGD, SGD and SAM, in one interleaved run."""
    command = [sys.executable, "-m", "bench", "epoch-time", *EPOCH_TIME_ARGUMENTS]
    done = subprocess.run(
        [*command, "--optimizers", "rmsgd,sgd,sam", "--out", str(out / "epoch-time")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=max(30.0, deadline + 20 - time.monotonic()),
        check=False,
    )
    return {"output": done.stdout, "error": done.stderr[-1000:] if done.returncode else None}


# -- tables ------------------------------------------------------------------------------------------


def tables(result: Mapping[str, Any]) -> list[Table]:
    """What was measured, for the terminal."""
    found = []
    bandwidth = result.get("copy_bytes_per_second")
    rows = result.get("step")
    if isinstance(rows, list):
        title = "step, device time" + (f" (copy: {bandwidth / 1e9:.0f} GB/s)" if bandwidth else "")
        table = Table("network", "us", "GB/s", *(f"/ {case}" for case in STEP_CASES[1:]), title=title)
        for row in rows:
            table.add_row(
                row["network"],
                f"{row['device_seconds']['rmsgd']['median'] * 1e6:.0f}",
                f"{row['bytes_per_second'] / 1e9:.0f}",
                *(f"{row['device_ratio_to'][case]['median']:.3f}" for case in STEP_CASES[1:]),
            )
        found.append(table)
    rows = result.get("epoch_end")
    if isinstance(rows, list):
        table = Table(
            "network", "weights", "device ms", "host ms", "MiB", "x 1.0.2", "stages", title="epoch end"
        )
        for row in rows:
            table.add_row(
                row["network"],
                row["weights"],
                f"{row['device_seconds'] * 1e3:.2f}",
                f"{row['host_seconds'] * 1e3:.2f}",
                f"{row['extra_bytes'] / 2**20:.0f}",
                f"{row['times_faster']:.0f}" if "times_faster" in row else "",
                " / ".join(map(str, row["stages"].values())),
            )
        found.append(table)
    rows = result.get("eigenvalues")
    if isinstance(rows, list):
        cases = list(rows[0]["seconds"])
        table = Table("n", *(f"{case}, ms" for case in cases), title=f"{rows[0]['count']} matrices n x 2 n")
        for row in rows:
            table.add_row(str(row["n"]), *(f"{row['seconds'][case]['median'] * 1e3:.2f}" for case in cases))
        found.append(table)
    for table in found:
        table.box = SIMPLE_HEAD
    return found
