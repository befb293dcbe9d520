"""`python -m bench.gpu.measurements step|epoch-end|eigenvalues`: prints a row as soon as it is measured.

A row is a line of JSON. If a kernel of rmsgd fails, its row has an "error". A routine or a package that is
missing or fails is "absent" with the reason, and the rest goes on.
"""

import copy
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench import measure, models, peers
from bench.costs import STEP_BYTES
from bench.gpu.clocks import device_seconds, host_seconds, interleaved
from bench.measure import median, ratio
from bench.speed_epoch_end import stages
from bench.weights import make_trained_like
from rmsgd import backends
from rmsgd.layers import unfoldings

Row = dict[str, Any]

STEP_NETWORKS = ("resnet50", "resnet101", "vit-b16")
STEP_CASES = ("rmsgd", "sgd-fused", "sgd-foreach", "sgd-per-layer")
EPOCH_END_NETWORKS = ("resnet18", "resnet50", "vit-b16", "resnet101")
WEIGHTS = ("initial", "trained-like")
RELEASE = "rmsgd-1.0.2"
RELEASE_NETWORKS = ("resnet18", "resnet50")
EIGENVALUE_SIZES = (32, 64, 128, 256, 512, 768, 1024)
MATRICES = 16
COPIED_FLOATS = 2**28
ROUNDS = 7
PROFILED = 5
LONGEST_CASE_S = 1.0  # the most seconds for all rounds of an eigenvalue routine


def reason(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {str(error).strip()[:500]}"


def backend_name() -> str:
    """The name of the backend that is measured."""
    return backends.backend_for(torch.device("cuda")).name


def rows_of(kinds: Iterable[Row], measured: Callable[[Row], Row]) -> Iterator[Row]:
    """A row for each kind, with what was measured of it, or the error that it ended with."""
    for kind in kinds:
        try:
            yield {**kind, "backend": backend_name(), **measured(kind)}
        except Exception as error:  # one failure leaves the other rows
            yield {**kind, "error": reason(error)}
        torch.cuda.empty_cache()


# -- the step ----------------------------------------------------------------------------------------


def step() -> Iterator[Row]:
    """The step of whole networks, beside the forms of torch's SGD and a device copy."""
    kinds = ({"network": network} for network in STEP_NETWORKS)
    return rows_of(kinds, lambda kind: step_of(kind["network"]))


def step_of(network: str) -> Row:
    """Device, host and wall seconds of every case, and the bandwidth of rmsgd's step beside a copy's."""
    model = models.build(network).cuda()
    cases: dict[str, Callable[[], object]] = {}
    for case in STEP_CASES:
        own = copy.deepcopy(model)
        for p in own.parameters():
            p.grad = 1e-6 * torch.randn_like(p)
        cases[case] = peers.make(case, own.named_parameters(), lr=1e-6).step
    source = torch.ones(COPIED_FLOATS, device="cuda")
    target = torch.empty_like(source)
    times = interleaved({**cases, "copy": lambda: target.copy_(source)}, ROUNDS)
    wall = measure.interleave(cases, ROUNDS, 0.02, warmup=3, synchronise=torch.cuda.synchronize)
    device = {case: device_seconds(found) for case, found in times.items()}
    parameters = sum(p.numel() for p in model.parameters())
    bandwidth = [STEP_BYTES * parameters / seconds for seconds in device["rmsgd"]]
    copied = [2 * source.nbytes / seconds for seconds in device["copy"]]
    return {
        "parameters": parameters,
        "device_seconds": {case: median(seconds)._asdict() for case, seconds in device.items()},
        "host_seconds": {case: host_seconds(found) for case, found in times.items()},
        "queued": {case: all(t.queued for t in found) for case, found in times.items()},
        "wall_seconds": {case: median(seconds)._asdict() for case, seconds in wall.items()},
        "bytes_per_second": median(bandwidth).median,
        "copy_bytes_per_second": median(copied).median,
        "of_copy": ratio(bandwidth, copied)._asdict(),
        "device_ratio_to": {c: ratio(device["rmsgd"], device[c])._asdict() for c in STEP_CASES[1:]},
        "wall_ratio_to": {c: ratio(wall["rmsgd"], wall[c])._asdict() for c in STEP_CASES[1:]},
    }


# -- the epoch end -----------------------------------------------------------------------------------


def epoch_end() -> Iterator[Row]:
    """The epoch end on initial and on trained-like weights, then that of rmsgd 1.0.2 on the same card."""
    kinds = (
        {"network": network, "weights": weights} for network in EPOCH_END_NETWORKS for weights in WEIGHTS
    )
    yield from rows_of(kinds, lambda kind: epoch_end_of(weighted(**kind)))
    for network in RELEASE_NETWORKS:
        row = {"network": network, "weights": WEIGHTS[-1], "peer": RELEASE}
        try:
            yield {**row, "seconds": release_seconds(weighted(network, WEIGHTS[-1]))}
        except Exception as error:
            yield {**row, "absent": reason(error)}


def weighted(network: str, weights: str) -> nn.Module:
    """A network on the GPU with weights of one kind."""
    model = models.build(network)
    if weights == "trained-like":
        make_trained_like(model)
    return model.cuda()


def epoch_end_of(model: nn.Module) -> Row:
    """Device seconds of an epoch end until its rates are there, host seconds of the call, extra memory."""
    optimizer: Any = peers.make("rmsgd", model.named_parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()

    def end() -> None:
        optimizer.epoch_step()
        optimizer.step()  # waits for the rates

    times = interleaved({"end": end, "step": optimizer.step}, ROUNDS)
    own = [a - b for a, b in zip(device_seconds(times["end"]), device_seconds(times["step"]), strict=True)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.epoch_step()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    return {
        "device_seconds": median(own)._asdict(),
        "host_seconds": statistics.median(seconds_of_host(optimizer.epoch_step) for _ in range(ROUNDS)),
        "queued": all(t.queued for t in times["end"]),
        "extra_bytes": extra,
        "stages": stages(model),
    }


def seconds_of_host(call: Callable[[], object]) -> float:
    """Seconds until a call returns, with an idle device before it."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def release_seconds(model: nn.Module) -> float:
    """Seconds of an epoch end of rmsgd 1.0.2, by the host's clock, since it waits for the host.

    The epoch end of a small layer comes first, since cuSOLVER is loaded at its first use.
    """
    small = nn.Conv2d(32, 32, 3).cuda()
    for measured in (small, model):
        optimizer: Any = peers.make(RELEASE, measured.named_parameters())
        torch.cuda.synchronize()
        start = time.perf_counter()
        optimizer.epoch_step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return seconds


# -- its kernels -------------------------------------------------------------------------------------


def kernels() -> Iterator[Row]:
    """Device seconds of every kernel of an epoch end, from torch's profiler."""
    kinds = ({"network": network} for network in EPOCH_END_NETWORKS)
    return rows_of(kinds, lambda kind: kernels_of(weighted(kind["network"], WEIGHTS[-1])))


def kernels_of(model: nn.Module) -> Row:
    """Seconds and launches by name, the mean of some epoch ends, without the profiler's own cost."""
    optimizer: Any = peers.make("rmsgd", model.named_parameters())
    optimizer.epoch_step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(PROFILED):
            optimizer.epoch_step()
        torch.cuda.synchronize()
    return {"kernels": kernel_seconds(profiler.key_averages(), PROFILED)}


def kernel_seconds(averages: Any, times: int) -> dict[str, dict[str, float]]:
    """Seconds and launches of rmsgd's kernels, from a profile of `times` epoch ends, the longest first."""
    ours = [event for event in averages if event.key.startswith("rmsgd_")]
    ours.sort(key=lambda event: -event.device_time_total)
    return {
        event.key: {"seconds": event.device_time_total / 1e6 / times, "launches": event.count / times}
        for event in ours
    }


# -- eigenvalues -------------------------------------------------------------------------------------


def eigenvalues() -> Iterator[Row]:
    """Matrices n x 2 n: rmsgd (Gram matrix to metrics) beside Gram products and a vendor's eigenvalues."""
    kinds = ({"n": n, "count": MATRICES} for n in EIGENVALUE_SIZES)
    return rows_of(kinds, lambda kind: eigenvalues_of(kind["n"]))


def eigenvalues_of(n: int) -> Row:
    """Wall seconds of every installed routine, in turn, and the reasons why the others are absent."""
    weights = torch.randn(MATRICES, n, 2 * n, device="cuda")
    matrices = [(w, u) for w in weights for u in unfoldings(w.shape)]
    backend = backends.backend_for(torch.device("cuda"))
    cases: dict[str, Callable[[], object]] = {"ours": lambda: backend.measure(matrices)}
    cases["ours"]()
    absent, longest = {}, 0.0
    for name, routine in VENDOR.items():

        def call(routine: Callable[[Tensor], object] = routine) -> None:
            routine(weights @ weights.mT)

        try:
            call()  # what is done once
            longest = max(longest, measure.seconds_per_call(call, 1, torch.cuda.synchronize))
        except Exception as error:
            absent[name] = reason(error)
        else:
            cases[name] = call
    rounds = max(1, min(ROUNDS, int(LONGEST_CASE_S / max(longest, 1e-9))))
    wall = measure.interleave(cases, rounds, warmup=1, synchronise=torch.cuda.synchronize)
    return {
        "seconds": {case: median(seconds)._asdict() for case, seconds in wall.items()},
        "ratio": {case: ratio(wall["ours"], wall[case])._asdict() for case in cases if case != "ours"},
        "absent": absent,  # from a routine to the reason
    }


def torch_eigvalsh(gram: Tensor) -> None:
    """The routine of cuSOLVER that torch chooses; XsyevBatched only so, as CuPy up to 14 does not bind it."""
    torch.linalg.eigvalsh(gram)


def cupy_eigvalsh(gram: Tensor) -> None:
    """cuSOLVER's syevjBatched (Jacobi), through CuPy."""
    import cupy

    cupy.linalg.eigvalsh(cupy.from_dlpack(gram))


def jax_eigvalsh(gram: Tensor) -> None:
    """cuSOLVER's batched routine, XsyevBatched, through JAX: the fair vendor baseline."""
    jax, dlpack = (importlib.import_module(name) for name in ("jax", "jax.dlpack"))
    jax.block_until_ready(jax.numpy.linalg.eigvalsh(dlpack.from_dlpack(gram.contiguous())))


VENDOR: dict[str, Callable[[Tensor], object]] = {
    "torch eigvalsh": torch_eigvalsh,
    "cupy eigvalsh": cupy_eigvalsh,
    "jax eigvalsh": jax_eigvalsh,
}


# -- the process -------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[], Iterator[Row]]] = {
    "step": step,
    "epoch-end": epoch_end,
    "kernels": kernels,
    "eigenvalues": eigenvalues,
}
PREFIX = "row "


def parse(output: str) -> list[Row]:
    """The rows in the output of a process. A row that was cut off is left out."""
    rows = []
    for line in output.splitlines():
        if line.startswith(PREFIX):
            try:
                rows.append(json.loads(line.removeprefix(PREFIX)))
            except json.JSONDecodeError:
                continue
    return rows


def main(arguments: Sequence[str]) -> int:
    """Measures one section."""
    for row in SECTIONS[arguments[0]]():
        sys.stdout.write(f"{PREFIX}{json.dumps(measure.plain(row))}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
