"""On a GPU the optimizer gives the CPU's results, waits for nothing, and can be captured (needs a GPU)."""

import copy
import functools
import itertools
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from matrices import low_rank as low_rank_matrix
from torch.nn import Parameter

import rmsgd
from bench import models
from bench.gpu.clocks import cycles_per_second
from bench.gpu.processes import ROOT
from bench.weights import make_trained_like
from rmsgd import backends
from rmsgd.backends.base import STAGE
from rmsgd.layers import unfoldings

pytestmark = pytest.mark.gpu

BOTH_ROUTES = [entry.name for entry in backends.ENTRIES if entry.device == "cuda"]
# RMSGD_TEST_BACKENDS names one at a time, since an illegal access spoils all later tests of its process.
ROUTES = [name for name in BOTH_ROUTES if name in os.environ.get("RMSGD_TEST_BACKENDS", name).split(",")]
NETWORKS = ("resnet18", "resnet50", "mobilenetv2", "vit-b16")
LR, BETA = 0.03, 0.98


def entry(name):
    return next(entry for entry in backends.ENTRIES if entry.name == name)


@pytest.fixture(params=ROUTES)
def route(request, monkeypatch):
    """Each way to the kernels in turn."""
    status = entry(request.param).status()
    if not status.available:
        pytest.skip(status.reason)
    monkeypatch.setenv("RMSGD_BACKEND", request.param)
    return request.param


@pytest.fixture
def quick(route):
    """The route after everything that happens once: compilation, streams, the first allocations."""
    p = Parameter(torch.randn(8, 16, device="cuda"))
    optimizer = rmsgd.RMSGD([p])
    p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.epoch_step()
    optimizer.report()
    torch.cuda.synchronize()
    return route


def low_rank(*shape, noise=0.5):
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    return low_rank_matrix(rows, columns, 4, noise).reshape(shape)


@functools.cache
def _trained_like(network):
    model = models.build(network)
    make_trained_like(model)
    return model


def trained_like(network):
    """A network on the CPU whose layers have a rank: with initial weights every rate is beta lr."""
    return copy.deepcopy(_trained_like(network))


def moved(rates):
    """Whether the weights have moved most of the rates."""
    return sum(abs(rate - BETA * LR) > 1e-4 * LR for rate in rates.values()) > len(rates) / 2


def many_tensors(dtype, count=500):
    """Tensors of all kinds of sizes, every third of them unaligned."""
    sizes = itertools.cycle([0, 1, 3, 64, 257, 4096, 10_001])
    result = []
    for i, size in zip(range(count), sizes, strict=False):
        values = torch.randn(size + 1, device="cuda").to(dtype)
        result.append(values[1:] if i % 3 == 0 else values[:-1].clone())
    return result


# -- steps -----------------------------------------------------------------------------------------

_NAMES = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")
_VALUES = ((0.0, 0.9), (0.0, 0.3), (0.0, 0.01), (False, True), (False, True))
FLAGS = [
    flags
    for flags in (dict(zip(_NAMES, values, strict=True)) for values in itertools.product(*_VALUES))
    if not flags["nesterov"] or (flags["momentum"] and not flags["dampening"])
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_steps_are_those_of_torchs_sgd(route, dtype, flags):
    ours = [Parameter(t) for t in many_tensors(dtype)]
    theirs = [Parameter(t.detach().clone()) for t in ours]
    optimizers = rmsgd.RMSGD(ours, lr=0.1, rule="release", **flags), torch.optim.SGD(theirs, lr=0.1, **flags)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rule", ["paper", "release"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_steps_are_those_of_the_cpu(route, monkeypatch, dtype, nesterov, rule):
    ours = [Parameter(t) for t in many_tensors(dtype, 60)]
    theirs = [Parameter(t.detach().cpu()) for t in ours]
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.01, "rule": rule}
    on_gpu = rmsgd.RMSGD(ours, **options)
    monkeypatch.delenv("RMSGD_BACKEND")
    on_cpu = rmsgd.RMSGD(theirs, **options)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.cpu()
        on_gpu.step()
        on_cpu.step()
    # A GPU may multiply and add in one instruction: a sum that lies near the middle between two numbers is
    # then rounded the other way, and a 16-bit weight differs by its last bit, after three steps by more.
    tolerances = {torch.float16: {"rtol": 2e-3, "atol": 1e-3}, torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-2}}
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.cpu(), b, **tolerances.get(dtype, {}))


def test_overflow_skips_the_step_on_the_device(route):
    p = Parameter(torch.ones(40, 50, device="cuda"))
    optimizer = rmsgd.RMSGD([p], lr=0.1, momentum=0.9, dampening=0.5)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    before = p.detach().clone()
    for factor in (torch.inf, 1.0):
        p.grad = scaler.scale(torch.full_like(p, factor))
        scaler.step(optimizer)
        scaler.update()
        if factor == torch.inf:
            assert torch.equal(p, before)
            assert optimizer.state_dict()["state"][0]["fresh"]
    torch.testing.assert_close(p.detach(), before - 0.1)  # the first gradient is not dampened
    assert not optimizer.state_dict()["state"][0]["fresh"]


def test_a_tensor_learning_rate_stays_on_the_device(quick):
    p = Parameter(torch.ones(64, device="cuda"))
    rate = torch.tensor(0.5, device="cuda")
    optimizer = rmsgd.RMSGD([p], lr=rate, momentum=0.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    rate.fill_(0.25)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(p.detach(), torch.full_like(p, 0.25))


def test_parameters_on_cpu_and_gpu_are_each_stepped_and_measured_where_they_are(route, monkeypatch):
    monkeypatch.delenv("RMSGD_BACKEND")
    w = low_rank(20, 30)
    parts = [Parameter(w.clone()), Parameter(w.cuda())]
    optimizer = rmsgd.RMSGD(parts, lr=0.1)
    for p in parts:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.epoch_step()
    torch.testing.assert_close(parts[0], parts[1].cpu())
    first, second = optimizer.learning_rates().values()
    assert first == pytest.approx(second, rel=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_several_gpus_work_in_one_process(route):
    w = low_rank(20, 30)
    parts = [Parameter(w.to(f"cuda:{i}")) for i in range(2)]
    optimizer = rmsgd.RMSGD(parts, lr=0.1)
    for p in parts:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.epoch_step()
    assert torch.equal(parts[0].cpu(), parts[1].cpu())
    first, second = optimizer.learning_rates().values()
    assert first == second


# -- epoch ends ------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
def test_an_epoch_end_is_that_of_the_cpu(route, monkeypatch, network):
    model = trained_like(network)
    gpu = rmsgd.RMSGD(copy.deepcopy(model).cuda().named_parameters(), lr=LR, beta=BETA, rule="paper")
    gpu.epoch_step()
    monkeypatch.delenv("RMSGD_BACKEND")
    cpu = rmsgd.RMSGD(model.named_parameters(), lr=LR, beta=BETA, rule="paper")
    cpu.epoch_step()
    assert moved(cpu.learning_rates())
    for a, b in zip(gpu.report().layers, cpu.report().layers, strict=True):
        assert (a.name, a.rank) == (b.name, b.rank)
        assert a.noise_variance == pytest.approx(b.noise_variance, rel=2e-4)
        assert a.stable_rank == pytest.approx(b.stable_rank, abs=2e-6)
        assert a.condition_number == pytest.approx(b.condition_number, abs=2e-5)
    for name, rate in cpu.learning_rates().items():
        assert gpu.learning_rates()[name] == pytest.approx(rate, abs=1e-5)


@pytest.mark.parametrize(
    ("noise", "dtype"),
    [(1e-3, torch.float32), (1e-7, torch.float32), (0.0, torch.float32), (1e-5, torch.float64)],
    ids=str,
)
@pytest.mark.parametrize("shape", [(40, 60), (200, 300), (400, 500), (700, 1500), (1030, 1100)], ids=str)
def test_hard_spectra_are_those_of_the_cpu(route, shape, noise, dtype):
    weight = low_rank(*shape, noise=noise).to(dtype)
    matrices = [(weight, u) for u in unfoldings(weight.shape)]
    on_cpu = "native" if entry("native").status().available else "reference"
    expected = entry(on_cpu).load().measure(matrices)
    found = entry(route).load().measure([(weight.cuda(), u) for _, u in matrices])
    torch.testing.assert_close(found[:, :5].cpu(), expected[:, :5], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("vectors", [False, True])
def test_probe_and_evbmf_find_on_the_gpu_what_they_find_on_the_cpu(route, monkeypatch, vectors):
    model, weight = trained_like("resnet18"), low_rank(50, 70)
    report, factors = rmsgd.probe(model, device="cuda"), rmsgd.evbmf(weight.cuda(), vectors=vectors)
    monkeypatch.delenv("RMSGD_BACKEND")
    expected, on_cpu = rmsgd.probe(model), rmsgd.evbmf(weight, vectors=vectors)
    assert [layer.rank for layer in report.layers] == [layer.rank for layer in expected.layers]
    assert report.quality == pytest.approx(expected.quality, rel=1e-5)
    assert factors.rank == on_cpu.rank > 0
    assert factors.noise_variance == pytest.approx(on_cpu.noise_variance, rel=1e-9)
    torch.testing.assert_close(factors.singular_values.cpu(), on_cpu.singular_values)
    assert factors.singular_values.is_cuda
    if vectors:
        found, known = ((f.U * f.singular_values @ f.Vh).cpu() for f in (factors, on_cpu))
        torch.testing.assert_close(found, known, rtol=1e-4, atol=1e-5)


def test_the_users_tf32_setting_changes_no_bit(quick):
    model = trained_like("resnet18").cuda()
    results = []
    for allowed in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        try:
            optimizer = rmsgd.RMSGD(model.parameters(), lr=LR, beta=BETA, rule="paper")
            optimizer.epoch_step()
            results.append(optimizer.learning_rates())
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
    assert results[0] == results[1]
    assert moved(results[0])


def test_weights_may_change_right_after_an_epoch_end(quick):
    parameters = [Parameter(low_rank(*shape).cuda()) for shape in ((64, 96), (64, 16, 3, 3), (100, 150))]
    matrices = [(p.detach(), u) for p in parameters for u in unfoldings(p.shape)]
    # What the fp32 Gram matrices do not decide is read from the weights once more.
    assert set(entry(quick).load().measure(matrices)[:, STAGE].tolist()) == {0}
    optimizer = rmsgd.RMSGD(parameters, lr=LR, beta=BETA, rule="paper")
    optimizer.epoch_step()
    expected = optimizer.learning_rates()
    assert moved(expected)
    again = rmsgd.RMSGD(parameters, lr=LR, beta=BETA, rule="paper")
    torch.cuda._sleep(int(cycles_per_second() / 10))
    again.epoch_step()
    with torch.no_grad():
        for p in parameters:
            p.zero_()
    assert again.learning_rates() == expected


def test_not_a_number_keeps_the_rate_of_its_layer_alone(route):
    good, bad = Parameter(low_rank(30, 40).cuda()), Parameter(torch.full((30, 40), torch.nan, device="cuda"))
    optimizer = rmsgd.RMSGD([("good", good), ("bad", bad)], lr=0.03, initial_rank="zero")
    optimizer.epoch_step()
    rates = optimizer.learning_rates()
    assert rates["bad"] == 0.03
    assert rates["good"] != 0.03
    assert [layer.skipped is None for layer in optimizer.report().layers] == [True, False]


def test_without_a_measured_layer_an_epoch_end_changes_nothing(route):
    p = Parameter(torch.ones(30, device="cuda"))
    optimizer = rmsgd.RMSGD([p], lr=0.03)
    optimizer.epoch_step()
    assert optimizer.learning_rates() == {"0.0": 0.03}
    assert optimizer.report().layers == ()


def test_extra_memory_for_resnet101_is_at_most_256_mib(quick):
    model = models.build("resnet101").cuda()
    optimizer = rmsgd.RMSGD(model.parameters(), lr=0.03)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.epoch_step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 256 * 2**20


# -- nothing waits ---------------------------------------------------------------------------------


def training_state(network="resnet18"):
    model = models.build(network).cuda()
    optimizer = rmsgd.RMSGD(model.named_parameters(), lr=0.03)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.epoch_step()
    torch.cuda.synchronize()
    return model, optimizer


def test_neither_a_step_nor_an_epoch_end_synchronises(quick):
    _, optimizer = training_state()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
            optimizer.epoch_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", ["step", "epoch_step"])
def test_both_return_while_the_gpu_is_busy(quick, method):
    _, optimizer = training_state()
    torch.cuda._sleep(int(cycles_per_second()))
    start = time.perf_counter()
    getattr(optimizer, method)()
    seconds = time.perf_counter() - start
    assert not torch.cuda.current_stream().query()  # it was busy all the while
    torch.cuda.synchronize()
    assert seconds < 0.05


def test_the_user_may_validate_meanwhile(quick):
    _, optimizer = training_state()
    torch.cuda._sleep(1_000_000)
    optimizer.epoch_step()
    x = torch.randn(64, 64, device="cuda")
    assert torch.equal(x @ x, x @ x)
    optimizer.step()
    assert all(rate > 0 for rate in optimizer.learning_rates().values())


def test_twenty_steps_in_a_graph_follow_rates_that_change_between_replays(quick):
    captured, eager = (
        [Parameter(low_rank(64, 96).cuda()), Parameter(torch.ones(64, device="cuda"))] for _ in "ab"
    )
    for a, b in zip(captured, eager, strict=True):
        b.data.copy_(a.data)
    optimizers = [rmsgd.RMSGD(params, lr=0.01, momentum=0.9) for params in (captured, eager)]
    gradients = [torch.randn_like(p) for p in captured]
    for params in (captured, eager):
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizers[0].step()
    torch.cuda.current_stream().wait_stream(side)
    optimizers[1].step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            optimizers[0].step()
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.epoch_step()
        graph.replay()
        for _ in range(20):
            optimizers[1].step()
        for a, b in zip(captured, eager, strict=True):
            assert torch.equal(a, b)
    assert optimizers[0].learning_rates() == optimizers[1].learning_rates()
    assert optimizers[0].learning_rates()["0.0"] != 0.01


# -- tools -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(quick, tool):
    """initcheck is left out: it skips torch's kernels, so their output would count as uninitialised."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer")
    command = [sanitizer, "--tool", tool, "--kernel-name", "kns=rmsgd_", "--report-api-errors", "no"]
    done = subprocess.run(
        [*command, "--error-exitcode", "9", sys.executable, "-m", "bench.gpu.smoke"],
        cwd=ROOT,
        # Torch's own allocator takes large segments, and what lies beyond a tensor is still inside one.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    said = done.stdout + done.stderr
    if "Device not supported" in said:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0, said[-4000:]
    assert "ERROR SUMMARY: 0 errors" in said or "RACECHECK SUMMARY: 0 hazards" in said, said[-4000:]


# The other route is loaded here, after everything that it might spoil.
@pytest.mark.skipif("cupy" not in ROUTES, reason="it is left to the tests of cupy")
def test_both_routes_give_the_same_result(monkeypatch):
    if not all(entry(name).status().available for name in BOTH_ROUTES):
        pytest.skip("only one route to the kernels is here")
    weight = low_rank(300, 400).cuda()
    matrices = [(weight, u) for u in unfoldings(weight.shape)]
    results = [entry(name).load().measure(matrices) for name in BOTH_ROUTES]
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)
