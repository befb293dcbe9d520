"""Results on a GPU are the same, whichever of its streams runs first."""

import bisect
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
import rehearsal
import streams
import torch
from clock import PATIENCE
from emulated import ROOT, EmulatedKernels
from matrices import low_rank
from pretended_cuda import Memory, Ranges, in_this_thread
from pretended_streams import ORDERS
from torch.nn import Parameter

import rmsgd
from rmsgd import backends
from rmsgd.backends import cuda
from rmsgd.backends.streams import Streams
from rmsgd.layers import unfoldings

# -- streams themselves ------------------------------------------------------------------------------


def test_each_thread_has_a_caller_of_its_own(gpu_folder):
    with rehearsal.rehearsed(gpu_folder):
        beside, met, seen = Streams(torch.device("cuda", 0)), threading.Barrier(2), {}

        def epoch_end(name):
            mine = torch.cuda.Stream()
            with torch.cuda.stream(mine), beside.side_stream():
                met.wait()
                seen[name] = beside.caller() == mine.cuda_stream
                met.wait()

        threads = [threading.Thread(target=epoch_end, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == {"a": True, "b": True}


# -- the pretended GPU -------------------------------------------------------------------------------


def test_work_that_does_not_wait_for_another_stream_comes_too_early_in_some_order(gpu_folder):
    def doubled_aside(wait, order):
        with rehearsal.rehearsed(gpu_folder, order):
            x = torch.ones(3).pin_memory().to("cuda", non_blocking=True)
            side = torch.cuda.Stream()
            if wait:
                side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                y = x * 2
            torch.cuda.current_stream().wait_stream(side)
            return y.tolist()

    assert all(doubled_aside(True, order) == [2.0] * 3 for order in ORDERS)
    assert any(doubled_aside(False, order) != [2.0] * 3 for order in ORDERS)


def test_memory_that_is_freed_too_early_is_overwritten_in_some_order(gpu_folder):
    def read_late(keep, order):
        with rehearsal.rehearsed(gpu_folder, order):
            x = torch.ones(3, device="cuda")
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                y = x + 1
            if keep:
                x.record_stream(side)
            del x
            torch.cuda.current_stream().wait_stream(side)
            return y.tolist()

    assert all(read_late(True, order) == [2.0] * 3 for order in ORDERS)
    assert any(read_late(False, order) != [2.0] * 3 for order in ORDERS)


def test_a_graph_replays_kernels_on_what_lies_in_memory_then(gpu_folder):
    with rehearsal.rehearsed(gpu_folder):
        x, y = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y.add_(x)
        assert y.tolist() == [0.0] * 3
        for value in (1.0, 2.0):
            x.fill_(value)
            graph.replay()
        assert y.tolist() == [3.0] * 3


def test_the_host_must_not_wait_where_waiting_is_an_error(gpu_folder):
    with rehearsal.rehearsed(gpu_folder):
        x = torch.ones(3, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        x.add_(1)
        for wait in (x.tolist, x.cpu, x.sum().item, lambda: torch.ones(3).cuda()):
            with pytest.raises(RuntimeError, match="synchronizing"):
                wait()


def test_tensors_of_several_devices_do_not_meet(gpu_folder):
    with rehearsal.rehearsed(gpu_folder):
        here, there, beyond = torch.ones(3), torch.ones(3, device="cuda"), torch.ones(3, device="cuda:1")
        for other in (here, beyond):
            with pytest.raises(RuntimeError, match="same device"):
                there.mul_(other)
        assert (there * torch.tensor(2.0))[torch.tensor([0, 2])].tolist() == [2.0, 2.0]


# -- rmsgd on it -------------------------------------------------------------------------------------


def trained(device):
    """Parameters and rates after two epochs of scaled gradients, with a learning rate that is a tensor."""
    torch.manual_seed(0)
    weights = (low_rank(20, 30, 3, 0.1), torch.randn(20), torch.randn(8, 4, 3, 3), torch.randn(0, 5))
    parameters = [Parameter(w.double().to(device)) for w in weights]
    optimizer = rmsgd.RMSGD(parameters, lr=torch.tensor(0.03, device=device), initial_rank="measure")
    optimizer.grad_scale = torch.tensor([4.0], device=device)
    optimizer.found_inf = torch.tensor([0.0], device=device)
    for _ in range(2):
        for p in parameters:
            p.grad = torch.randn(p.shape, dtype=p.dtype).to(device)
        optimizer.step()
        optimizer.epoch_step()
    return [p.detach().cpu() for p in parameters], optimizer.learning_rates()


def test_torch_operations_on_a_gpu_do_what_they_do_on_a_cpu(gpu_folder, monkeypatch):
    monkeypatch.setenv("RMSGD_BACKEND", "torch")
    parameters, rates = trained("cpu")
    with rehearsal.rehearsed(gpu_folder):
        on_gpu, rates_on_gpu = trained("cuda")
    torch.testing.assert_close(on_gpu, parameters, rtol=0, atol=1e-14)
    assert rates_on_gpu == pytest.approx(rates, rel=1e-14)


def test_torch_operations_refuse_to_be_captured_in_a_graph(gpu_folder, monkeypatch):
    monkeypatch.setenv("RMSGD_BACKEND", "torch")
    with rehearsal.rehearsed(gpu_folder):
        p = Parameter(torch.ones(4, 4, device="cuda"))
        p.grad = torch.ones_like(p)
        optimizer = rmsgd.RMSGD([p])
        with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="CUDA graph"):
            optimizer.step()


@pytest.mark.parametrize("backend", ["cuda", "torch"])
def test_an_epoch_end_is_no_part_of_a_graph_and_changes_nothing_there(gpu_folder, monkeypatch, backend):
    monkeypatch.setenv("RMSGD_BACKEND", backend)
    with rehearsal.rehearsed(gpu_folder):
        p = Parameter(low_rank(20, 30, 3, 0.1).cuda())
        optimizer = rmsgd.RMSGD([p], lr=0.03, rule="paper")
        before = optimizer.state_dict()["state"][0]["rate"], optimizer.state[p]["epoch"]
        with (
            torch.cuda.graph(torch.cuda.CUDAGraph()),
            pytest.raises(RuntimeError, match=r"epoch_step\(\) cannot be captured .* capture step\(\) alone"),
        ):
            optimizer.epoch_step()
        assert (optimizer.state_dict()["state"][0]["rate"], optimizer.state[p]["epoch"]) == before
        optimizer.epoch_step()
        assert optimizer.learning_rates() != {"0.0": 0.03}


def test_a_first_step_that_measures_is_no_part_of_a_graph_and_the_second_is(gpu_folder):
    with rehearsal.rehearsed(gpu_folder):
        weight = low_rank(20, 30, 3, 0.1)
        p = Parameter(weight.cuda())
        p.grad = torch.ones_like(p)
        optimizer = rmsgd.RMSGD([p], lr=0.5, momentum=0.0)
        with (
            torch.cuda.graph(torch.cuda.CUDAGraph()),
            pytest.raises(RuntimeError, match="take one step before the capture, or use initial_rank='zero'"),
        ):
            optimizer.step()
        assert torch.equal(p.cpu(), weight)
        optimizer.step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        graph.replay()
        torch.testing.assert_close(p.cpu(), weight - 1.0)


def test_weights_are_not_measured_while_a_graph_is_captured(gpu_folder):
    with rehearsal.rehearsed(gpu_folder):
        weight = low_rank(20, 30, 3, 0.1).cuda()
        matrices = [(weight, u) for u in unfoldings(weight.shape)]
        backend = backends.backend_for(weight.device)
        with (
            torch.cuda.graph(torch.cuda.CUDAGraph()),
            pytest.raises(RuntimeError, match="the measurement of weights cannot be captured"),
        ):
            backend.measure(matrices)


def test_profilers_see_every_stage_by_its_name(gpu_folder):
    with rehearsal.rehearsed(gpu_folder):
        optimizer = rmsgd.RMSGD([p := Parameter(torch.randn(20, 30).cuda())], rule="paper")
        p.grad = torch.randn_like(p)
        Ranges.names.clear()
        optimizer.step()
        assert Ranges.names == ["rmsgd: step"]
        optimizer.epoch_step()
        stages = [name.removeprefix("rmsgd: ") for name in Ranges.names[1:]]
    assert stages[:4] == ["Gram matrices", "tridiagonal forms", "eigenvalues", "EVBMF"]
    assert stages[-2:] == ["SVD", "learning rates"]


def touched_by(arguments):
    """The devices whose memory a launch's arguments point to, and the tables there that they point to."""
    begins = sorted(Memory.live)
    devices, pending, seen = set(), [arguments.view(np.uint64)], set()
    while pending:
        for word in map(int, pending.pop()):
            at = bisect.bisect_right(begins, word) - 1
            memory = Memory.live.get(begins[at]) if at >= 0 else None
            if memory is None or word >= begins[at] + memory.base.nbytes:
                continue
            devices.add(memory.stream.device.index)
            if begins[at] not in seen and memory.base.dtype == torch.uint8 and memory.base.nbytes % 8 == 0:
                seen.add(begins[at])
                pending.append(memory.base.numpy().view(np.uint64))
    return devices


@pytest.mark.parametrize("order", ["launched", "random"])
def test_two_threads_train_on_streams_of_their_own_of_two_gpus_and_no_host_waits(
    gpu_folder, monkeypatch, order
):
    launched, plain = [], EmulatedKernels.launch

    def launch(kernels, name, device, blocks, threads, shared, stream, arguments, cooperative=False):
        launched.append((device, touched_by(arguments)))
        plain(kernels, name, device, blocks, threads, shared, stream, arguments, cooperative)

    def network(seed, device):
        """An optimizer after its first epoch, when its tables are there, and its weights."""
        generator = torch.Generator().manual_seed(seed)
        shapes = ((20, 30), (12, 5, 3, 3), (20,))
        weights = [Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]
        for p in weights:
            p.grad = torch.randn(p.shape, generator=generator).to(device)
        optimizer = rmsgd.RMSGD(weights, lr=0.03, rule="paper")
        optimizer.step()
        optimizer.epoch_step()
        return optimizer, weights

    def train(networks, met):
        """Take turns between networks on both devices, each on a stream of its own."""
        with in_this_thread():
            streams_ = [torch.cuda.Stream(device) for device in range(len(networks))]
            met.wait()
            for _ in range(2):
                for device, (optimizer, _) in enumerate(networks):
                    with torch.cuda.stream(streams_[device]):
                        optimizer.step()
                        optimizer.epoch_step()
                        optimizer.step()

    def results(together, order):
        with rehearsal.rehearsed(gpu_folder, order):
            networks = [[network(10 * thread + d, f"cuda:{d}") for d in range(2)] for thread in range(2)]
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if together else "default")
            at_once = 2 if together else 1
            met = threading.Barrier(at_once, timeout=PATIENCE)
            with ThreadPoolExecutor(at_once) as pool:
                for done in [pool.submit(train, mine, met) for mine in networks]:
                    done.result()
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
            return [
                (optimizer.learning_rates(), [p.tolist() for p in weights])
                for mine in networks
                for optimizer, weights in mine
            ]

    expected = results(together=False, order="at once")
    monkeypatch.setattr(EmulatedKernels, "launch", launch)
    assert results(together=True, order=order) == expected
    assert {device for device, _ in launched} == {0, 1}
    assert all(touched == {device} for device, touched in launched)


@pytest.fixture(scope="module")
def one_after_the_other(gpu_folder):
    return streams.train(gpu_folder, "at once")


@pytest.mark.parametrize("order", ORDERS)
def test_epoch_ends_beside_training_give_the_same_bits_in_any_order(gpu_folder, one_after_the_other, order):
    assert streams.same(streams.train(gpu_folder, order), one_after_the_other)


def test_a_backend_is_tried_out_on_the_device_of_its_parameters(gpu_folder, monkeypatch):
    tried = []
    with rehearsal.rehearsed(gpu_folder):
        resident_blocks = sys.modules["rmsgd._cuda"].resident_blocks
        monkeypatch.setattr(
            sys.modules["rmsgd._cuda"],
            "resident_blocks",
            lambda name, device, *rest: tried.append(device) or resident_blocks(name, device, *rest),
        )
        p = Parameter(torch.ones(4, 6, device="cuda:1"))
        p.grad = torch.ones_like(p)
        rmsgd.RMSGD([p]).step()
        assert torch.cuda.current_device() == 0
    assert set(tried) == {1}


def measured_aside(gpu_folder, order, measure):
    """The result of ``measure(backend, weights)`` for three weights, one per stage of the accuracy guard."""
    torch.manual_seed(0)
    weights = [low_rank(20, 30, 3, noise) for noise in (0.5, 1e-3, 0.0)]
    with rehearsal.rehearsed(gpu_folder, order):
        device = torch.device("cuda", 0)
        backend = backends.backend_for(device)
        on_gpu = [w.pin_memory().to(device, non_blocking=True) for w in weights]
        with backend.side_stream(device):
            tables = measure(backend, on_gpu)
            del on_gpu
        backend.wait_side_stream(device)
        return [table.tolist() for table in tables]


def together(backend, weights):
    return [backend.measure([(w, u) for w in weights for u in unfoldings(w.shape)])]


def one_by_one(backend, weights):
    """Measure weights one by one, as the ranks of several meshes do."""
    return [backend.measure([(w, u)]) for w in weights for u in unfoldings(w.shape)]


def one_plan_at_a_time(backend, weights):
    """Drop each plan before its last kernel has run, as where many networks are measured in turn."""
    with mock.patch.object(cuda, "_KEPT_PLANS", 1):
        return one_by_one(backend, weights)


def gathered(backend, weights):
    """Make whole weights on the stream that measures them, as the ranks of FSDP do."""
    return together(backend, [w + 0 for w in weights])


def under_deterministic_algorithms(backend, weights):
    torch.use_deterministic_algorithms(True)
    try:
        return together(backend, weights)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "measure", [together, one_by_one, one_plan_at_a_time, gathered, under_deterministic_algorithms]
)
def test_memory_of_the_stream_beside_is_used_when_it_is_done_with_it(gpu_folder, order, measure):
    """This is the workspace and the weights, which may be dropped before they are read again."""
    expected = measured_aside(gpu_folder, "at once", together)
    found = measured_aside(gpu_folder, order, measure)
    assert [row for table in found for row in table] == expected[0]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_layer_that_changes_before_it_is_measured_keeps_its_rate_and_says_so(gpu_folder, order, dtype):
    quick, fp64, svd = (low_rank(20, 30, 3, noise) for noise in (0.5, 1e-3, 0.0))
    with rehearsal.rehearsed(gpu_folder, order):
        parameters = [Parameter(w.cuda()) for w in (quick, fp64.to(dtype), svd.to(dtype))]

        def end_an_epoch(change):
            optimizer = rmsgd.RMSGD(parameters, lr=0.03, rule="paper")
            optimizer.epoch_step()
            with torch.no_grad():
                for p in parameters if change else ():
                    p[0, 0] += 1e-6
            return list(optimizer.learning_rates().values()), optimizer.report().layers

        expected, layers = end_an_epoch(change=False)
        assert all(layer.skipped is None for layer in layers)
        rates, layers = end_an_epoch(change=True)
    skipped = [layer.skipped for layer in layers]
    assert skipped[0] is None
    assert set(skipped) <= {None, "changed before it was measured"}
    assert rates == [0.03 if why else rate for why, rate in zip(skipped, expected, strict=True)]
    if order == "others last":
        assert all(skipped[1:])


@pytest.mark.parametrize("order", ORDERS)
def test_an_epoch_end_before_the_first_step_has_measured_the_first_rank(gpu_folder, order):
    with rehearsal.rehearsed(gpu_folder, order):
        p = Parameter(low_rank(20, 30, 3, 0.5).cuda())
        optimizer = rmsgd.RMSGD([p], lr=0.03, beta=0.9, rule="paper", initial_rank="measure")
        optimizer.epoch_step()
        with torch.no_grad():
            p.copy_(low_rank(20, 30, 6, 0.1).pin_memory(), non_blocking=True)
        p.grad = torch.zeros_like(p)
        optimizer.step()
        assert optimizer.learning_rates() == {"0.0": pytest.approx(0.9 * 0.03)}


def run(command, **environment):
    """A Python process that can import what the tests do."""
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("without", streams.WITHOUT)
def test_no_wait_is_there_in_vain(gpu_folder, without):
    done = run(["tests/streams.py", gpu_folder, without])
    assert done.stdout == f"without {without}\n", done.stderr
    assert done.returncode != 0, "every order of streams gave the right bits"


@pytest.mark.parametrize(
    "order", ["random", *(pytest.param(o, marks=pytest.mark.slow) for o in ORDERS if o != "random")]
)
def test_the_tests_for_gpus_pass_in_rehearsal(gpu_folder, order):
    pytest_ = ["-m", "pytest", "-p", "rehearsal", "-p", "no:cacheprovider", "-m", "gpu", "-rfE"]
    where = {"RMSGD_REHEARSAL": f"{gpu_folder}:{order}", "RMSGD_TEST_BACKENDS": "cuda"}
    done = run([*pytest_, "tests/test_gpu.py"], **where)
    assert done.returncode == 0, done.stdout[-4000:]
