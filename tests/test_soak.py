"""A long run leaves nothing behind and does not drift; forks, workers, threads and exits do no harm."""

import gc
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from clock import PATIENCE
from torch import nn

import rmsgd
from rmsgd import reference
from rmsgd.backends.base import RateGroup
from rmsgd.layers import as_matrix, unfoldings
from rmsgd.rules import RULES

ROOT = Path(__file__).parents[1]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
PAPER = RULES["paper"]
SHAPES = [(12, 6, 3, 3), (12,), (16, 12), (16,)]


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files():
    return len(os.listdir("/proc/self/fd"))


class Run:
    """RMSGD on gradients that change, and the same run by the formulas of ``reference`` in float64."""

    def __init__(self, dtype=torch.float64):
        self.generator = torch.Generator().manual_seed(1)
        self.parameters = [
            nn.Parameter(torch.randn(s, generator=self.generator, dtype=torch.float64).to(dtype))
            for s in SHAPES
        ]
        self.options = {"lr": 0.02, "beta": 0.98, "momentum": 0.9, "weight_decay": 1e-3, "rule": "paper"}
        self.optimizer = rmsgd.RMSGD(self.parameters, **self.options)
        self.weights = [p.detach().double().numpy().copy() for p in self.parameters]
        self.velocities = [np.zeros(s) for s in SHAPES]
        self.rates = [0.02] * len(SHAPES)
        self.ranks = [0.0] * len(SHAPES)
        self.fresh = True

    def steps(self, count):
        for _ in range(count):
            # Targets change, so that weights stay bounded, whatever the number of steps.
            for k, p in enumerate(self.parameters):
                pull = torch.randn(p.shape, generator=self.generator, dtype=torch.float64)
                p.grad = (0.1 * p.detach().double() + pull).to(p.dtype)
                self.weights[k], self.velocities[k] = reference.momentum_update(
                    self.weights[k],
                    0.1 * self.weights[k] + pull.numpy(),
                    self.velocities[k],
                    self.rates[k],
                    0.9,
                    0.0,
                    1e-3,
                    False,
                    False,
                    self.fresh,
                    True,
                )
            self.fresh = False
            self.optimizer.step()

    def epoch_end(self):
        self.optimizer.epoch_step()
        self.optimizer.report()
        for k, shape in enumerate(SHAPES):
            if len(shape) == 1:
                self.rates[k] = self.rates[k - 1]  # it follows the layer before it
                continue
            weight, s = torch.from_numpy(self.weights[k]), 0.0
            for u, share in zip(unfoldings(shape), PAPER.mode_weights(shape, 0.02), strict=True):
                gamma = reference.singular_values(as_matrix(weight, u).numpy())
                s += share * reference.measure_singular_values(gamma, u.L, u.M)[2]
            gain = s - self.ranks[k]
            group = RateGroup(
                *(0.02, 0.98, 1.0, 1.0, 1e-10, 0.0, 0.0, math.inf),
                *(PAPER.column, False, PAPER.number, False),
            )
            self.rates[k] = max(PAPER.next_rate(group, self.rates[k], gain, False), 1e-10)
            self.ranks[k] = s

    def drift(self):
        """The largest difference of a weight or a rate from the reference's, relative to its layer's size."""
        ours = [p.detach().double().numpy() for p in self.parameters]
        of_weights = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(ours, self.weights, strict=True)]
        found = self.optimizer.learning_rates().values()
        of_rates = [abs(a - b) / b for a, b in zip(found, self.rates, strict=True)]
        return max(*of_weights, *of_rates)


@linux_only
@pytest.mark.parametrize(
    ("epochs", "steps"), [(20, 20), pytest.param(1000, 100, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_steps_and_epoch_ends_leave_nothing_behind_and_do_not_drift(epochs, steps):
    run = Run()
    for _ in range(5):  # permanent caches and buffers fill up
        run.steps(steps)
        run.epoch_end()
    gc.collect()
    memory, files, objects = resident_bytes(), open_files(), len(gc.get_objects())
    for _ in range(epochs):
        run.steps(steps)
        run.epoch_end()
    gc.collect()
    assert open_files() <= files
    assert len(gc.get_objects()) - objects < 100
    assert resident_bytes() - memory < 16 << 20
    assert run.drift() < 1e-9


@linux_only
def test_optimizers_that_come_and_go_leave_nothing_behind():
    def one():
        parameters = [nn.Parameter(torch.randn(64, 64)) for _ in range(4)]
        optimizer = rmsgd.RMSGD(parameters)
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.epoch_step()
        rmsgd.probe({"w": parameters[0].detach()})

    for _ in range(20):
        one()
    gc.collect()
    memory = resident_bytes()
    for _ in range(150):
        one()
    gc.collect()
    assert resident_bytes() - memory < 16 << 20


# -- processes -----------------------------------------------------------------------------------

PRELUDE = """
import os, sys, threading, torch, rmsgd
from torch import nn

torch.set_num_threads(4)

SHAPES = [(30, 20, 3, 3), (150, 120), (20_000,), (20_000,), (64, 64)]

def work(seed=0, epochs=2):
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]
    optimizer = rmsgd.RMSGD(parameters, lr=0.1)
    for _ in range(epochs):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        optimizer.epoch_step()
    return float(sum(p.detach().double().sum() for p in parameters))
"""


def run_script(body, code=0, **environment):
    """Run Python code after PRELUDE in a process of its own, which must end by itself with that code."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", PRELUDE + textwrap.dedent(body)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == code, (done.returncode, done.stderr[-2000:])
    assert "Fatal" not in done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_goes_on_where_the_parent_used_threads():
    # The core alone: many of torch's own operations hang in such a child unless it asks for one thread.
    run_script("""
        from rmsgd import _cpu
        parameters = [nn.Parameter(torch.randn(100, 200)) for _ in range(6)]
        optimizer = rmsgd.RMSGD(parameters)
        for p in parameters:
            p.grad = torch.ones(100, 200)
        matrices = [(p.data_ptr(), "float32", [100], [200], [200], [1]) for p in parameters]
        optimizer.step()
        expected = _cpu.measure(matrices, 4)
        child = os.fork()
        if child == 0:
            same = (_cpu.measure(matrices, 4) == expected).all()
            optimizer.step()
            os._exit(0 if same and (_cpu.measure(matrices, 4) != expected).any() else 3)
        _, status = os.waitpid(child, 0)
        assert status == 0, status
        optimizer.step()
        _cpu.measure(matrices, 4)
    """)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader_may_use_it_too(method, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        PRELUDE
        + textwrap.dedent(f"""
            class Data(torch.utils.data.Dataset):
                def __len__(self):
                    return 4
                def __getitem__(self, i):
                    rank = rmsgd.evbmf(torch.eye(8)).rank
                    return torch.full((3,), float(rank) + work(epochs=1))

            if __name__ == "__main__":
                expected = work(epochs=1)
                loader = torch.utils.data.DataLoader(
                    Data(), num_workers=2, multiprocessing_context="{method}", timeout={PATIENCE}
                )
                assert [float(x[0, 0]) for x in loader] == [float(torch.tensor(expected))] * 4
                print("done")
        """)
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.stdout == "done\n", done.stderr[-2000:]


def test_the_first_use_may_be_in_a_thread():
    out = run_script("""
        results = []
        threads = [threading.Thread(target=lambda: results.append(work())) for _ in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        print(len(set(results)), len(results))
    """)
    assert out.split() == ["1", "4"]


@pytest.mark.parametrize("task", ["step", "measure"])
def test_the_interpreter_may_end_while_a_thread_is_in_the_core(task):
    # In the core alone: a thread that is in one of torch's own operations at the end aborts the process.
    run_script(f"""
        import time
        import numpy as np
        from rmsgd import _cpu
        big, gradient = torch.randn(1200, 1200), torch.ones(1200, 1200)
        plan = _cpu.StepPlan(
            [big.data_ptr()], [0], ["float32"], [big.numel()], [0], [0], np.ones(1), np.ones(1, np.bool_)
        )
        group = (1.0, 0.0, 0.0, 0.0, False, False, False)
        tasks = {{
            "step": lambda: plan.step([gradient.data_ptr()], [group]),
            "measure": lambda: _cpu.measure([(big.data_ptr(), "float32", [1200], [1200], [1200], [1])]),
        }}

        def forever():
            while True:
                tasks["{task}"]()

        threading.Thread(target=forever, daemon=True).start()
        time.sleep(0.3)
    """)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no signals here")
def test_a_killed_run_ends_at_once():
    run_script(
        """
        import signal, time
        def stop():
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGTERM)
        threading.Thread(target=stop, daemon=True).start()
        work(epochs=10**6)
    """,
        code=-signal.SIGTERM,
    )
