"""Calls the compiled core's step and spectra without torch, so that `callgrind` can run it.

It is run as `python kernels.py PATH_OF_CPU_EXTENSION`. The work is small on purpose, since callgrind takes 50
times as long.
"""

import importlib.util
import sys

import numpy as np


def main(path: str) -> None:
    """Take three steps of 42 tensors and measure six matrices three times, on one thread."""
    spec = importlib.util.spec_from_file_location("rmsgd._cpu", path)
    assert spec is not None
    assert spec.loader is not None
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    random = np.random.default_rng(0)
    sizes = [64] * 36 + [4608, 9216, 16384, 27, 1, 1000]
    weights, gradients, velocities = (
        [random.standard_normal(n, dtype=np.float32) for n in sizes] for _ in range(3)
    )
    rates, fresh = np.full(len(sizes), 0.03), np.zeros(len(sizes), dtype=bool)
    plan = core.StepPlan(
        [w.ctypes.data for w in weights],
        [v.ctypes.data for v in velocities],
        ["float32"] * len(sizes),
        sizes,
        [0] * len(sizes),
        range(len(sizes)),
        rates,
        fresh,
    )
    for _ in range(3):
        plan.step([g.ctypes.data for g in gradients], [(1.0, 0.9, 0.0, 1e-4, False, False, True)])
    shapes = [(8, 72), (16, 144), (24, 216), (32, 288), (64, 576), (96, 160)]
    matrices = []
    for rows, columns in shapes:
        signal = np.outer(random.standard_normal(rows), random.standard_normal(columns))
        matrices.append((random.standard_normal((rows, columns)) + signal).astype(np.float32))
    described = [(m.ctypes.data, "float32", [m.shape[0]], [m.shape[1]], [m.shape[1]], [1]) for m in matrices]
    for _ in range(3):
        core.measure(described)


if __name__ == "__main__":
    main(sys.argv[1])
