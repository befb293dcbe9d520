"""Results are the same, bit for bit, for any number of threads, and forks and exits do not hang or crash."""

import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn

import rmsgd
from rmsgd.layers import unfoldings

_cpu = pytest.importorskip("rmsgd._cpu", reason="the compiled core was not built")

SHAPES = [(40, 30, 3, 3), (64, 48), (30, 90), (16, 16, 1, 1), (3, 64), (50, 20, 3, 3)]


def described(weights):
    """The weights' unfoldings in the form that ``measure`` takes."""
    return [
        (
            w.data_ptr(),
            str(w.dtype).removeprefix("torch."),
            [w.shape[d] for d in u.small],
            [w.stride(d) for d in u.small],
            [w.shape[d] for d in u.large],
            [w.stride(d) for d in u.large],
        )
        for w in weights
        for u in unfoldings(w.shape)
    ]


def on_threads(*works):
    """Run all of them at once, and return what each returned or raised."""
    results = [None] * len(works)

    def run(i, work):
        try:
            results[i] = work()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_spectra_are_the_same_bits_on_any_number_of_threads(dtype):
    weights = [torch.randn(shape).to(dtype) for shape in SHAPES]
    matrices = described(weights)
    expected = _cpu.measure(matrices, 1)
    for threads in (2, 3, 8, 40):
        assert np.array_equal(_cpu.measure(matrices, threads), expected)


def test_the_positions_of_kernels_have_the_same_bits_on_any_number_of_threads():
    # The last two kernels have no room to be packed at the same time.
    shapes = [(64, 64, 3, 3), (40, 30, 5, 5), (30, 40, 3, 3), (2, 70_000, 3, 3), (2, 70_000, 3, 3)]
    kernels = [torch.randn(shape) for shape in shapes]
    slices = [piece for kernel in kernels for piece in kernel.flatten(2).permute(2, 0, 1)]
    matrices = described(slices)
    expected = _cpu.spectra(matrices, "bulk", 1)[1]
    for threads in (2, 3, 8, 40):
        assert np.array_equal(_cpu.spectra(matrices, "bulk", threads)[1], expected)


def test_a_matrix_that_all_threads_share_gives_the_same_bits():
    low = torch.randn(1030, 3) @ torch.randn(3, 1040)
    weights = [low + torch.randn(1030, 1040), torch.randn(20, 30)]
    matrices = described(weights)
    assert np.array_equal(_cpu.measure(matrices, 3), _cpu.measure(matrices, 1))


def test_several_python_threads_measure_at_once():
    weights = [torch.randn(shape) for shape in SHAPES]
    matrices = described(weights)
    expected = _cpu.measure(matrices, 1)
    for table in on_threads(*[lambda: _cpu.measure(matrices, 2)] * 4):
        assert np.array_equal(table, expected)


def trained(seed, steps=6):
    """The weights after some steps and epoch ends on random gradients."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(s, generator=generator)) for s in (*SHAPES, (70_000,))]
    optimizer = rmsgd.RMSGD(parameters, lr=0.03, rule="paper")
    for step in range(steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        if step % 2:
            optimizer.epoch_step()
    return [p.detach() for p in parameters]


@pytest.mark.skipif(sys.platform != "linux", reason="the threads of a process are counted by Linux")
def test_a_step_with_less_work_than_threads_leaves_torchs_threads_alone():
    there = subprocess.run([sys.executable, "-c", SMALL_STEPS], capture_output=True, text=True, check=True)
    assert json.loads(there.stdout) == []


SMALL_STEPS = """
import json, os, torch, rmsgd
def threads():
    return set(os.listdir("/proc/self/task"))
torch.set_num_threads(6)
large = torch.zeros(1 << 20)
small = torch.nn.Parameter(torch.randn(200, 200))  # work for three threads
small.grad = torch.randn(200, 200)
optimizer = rmsgd.RMSGD([small])
optimizer.step(), optimizer.epoch_step(), large.add_(1)
before = threads()
for _ in range(3):
    optimizer.step(), optimizer.epoch_step(), large.add_(1)
print(json.dumps(sorted(threads() - before)))
"""


def test_optimizers_in_several_threads_do_not_disturb_each_other():
    expected = [trained(seed) for seed in range(3)]
    for ours, theirs in zip(on_threads(*[lambda s=s: trained(s) for s in range(3)]), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


NUMBA = """
import json, numba, torch, rmsgd
torch.set_num_threads(1)
given, set_num_threads = [], numba.set_num_threads
numba.set_num_threads = lambda count: given.append(count) or set_num_threads(count)
parameter = torch.nn.Parameter(torch.randn(8, 8))
optimizer = rmsgd.RMSGD([parameter])
parameter.grad = torch.ones(8, 8)
optimizer.step()
print(json.dumps([given, numba.get_num_threads(), torch.get_num_threads()]))
"""


def test_numba_steps_on_as_many_threads_as_torch_has_and_leaves_both_settings():
    numba = pytest.importorskip("numba")
    most = numba.config.NUMBA_NUM_THREADS
    command, environment = [sys.executable, "-c", NUMBA], {**os.environ, "RMSGD_BACKEND": "numba"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[1, most], most, 1]


def test_threads_that_wait_do_not_spin_in_the_tests():
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
