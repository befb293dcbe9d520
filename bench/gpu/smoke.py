"""`python -m bench.gpu.smoke`: a few steps and epoch ends that reach every kernel, in seconds.

It runs in a process of its own before the tests, and under compute-sanitizer in them.
"""

import sys

import torch
from torch import Tensor
from torch.nn import Parameter

ABSENT = 3
"""The exit status where the backend cannot run here."""

SHAPES = ((2, 3), (65, 70), (64, 3, 3, 3), (130, 140), (400, 450), (33,))


def weights() -> list[Tensor]:
    """Small and large weights, two of other types, and one that only an SVD can measure."""
    plain = [torch.randn(shape) for shape in SHAPES]
    typed = [torch.randn(41, 60, dtype=dtype) for dtype in (torch.half, torch.double)]
    return [*plain, *typed, torch.randn(40, 3) @ torch.randn(3, 60)]


def main() -> int:
    """Trains and prints what ran; returns 0, or `ABSENT` where the backend cannot run."""
    import rmsgd
    from rmsgd.backends import backend_for
    from rmsgd.backends.base import BackendUnavailable

    device = torch.device("cuda")
    try:
        backend = backend_for(device)
    except BackendUnavailable as error:
        print(f"absent: {error}")
        return ABSENT
    print(f"{backend.name}: {backend.description}")
    torch.manual_seed(0)
    parameters = [Parameter(w.to(device)) for w in weights()]
    optimizer = rmsgd.RMSGD(parameters, lr=0.03)
    for _ in range(2):
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()
        optimizer.epoch_step()
    rates = optimizer.learning_rates().values()
    print(f"quality {optimizer.report().quality:.4f}, rates {min(rates):.4f} to {max(rates):.4f}")
    return 0 if all(bool(p.isfinite().all()) for p in parameters) else 1


if __name__ == "__main__":
    sys.exit(main())
