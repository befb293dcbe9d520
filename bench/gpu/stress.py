"""`python -m bench.gpu.stress`: 200 epoch ends under load, which must give the same bits.

A sanitizer of shared memory does not see a race in global memory. Here such a race shows as a different bit.
"""

import sys

import torch

from bench import models
from bench.weights import make_trained_like
from rmsgd.backends import backend_for
from rmsgd.layers import unfoldings

TIMES = 200
NETWORK = "resnet18"
DEFICIENT = (300, 400)
"""A matrix of rank 3, which needs fp64 and an SVD."""
LOAD = 2048
"""The rows of the square matrices that another stream multiplies meanwhile."""
DEVICE = torch.device("cuda")


def main() -> int:
    """Returns 0 if all tables equal the first one, else 1, and prints which differ."""
    torch.manual_seed(0)
    network = models.build(NETWORK)
    make_trained_like(network)
    weights = [p.detach() for p in network.to(DEVICE).parameters() if p.ndim > 1]
    rows, columns = DEFICIENT
    weights += [torch.randn(rows, 3, device=DEVICE) @ torch.randn(3, columns, device=DEVICE)]
    matrices = [(w, u) for w in weights for u in unfoldings(w.shape)]
    backend = backend_for(DEVICE)
    expected = backend.measure(matrices)
    load, other = torch.randn(LOAD, LOAD, device=DEVICE), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    different = []
    for turn in range(TIMES):
        with torch.cuda.stream(other):
            for _ in range(turn % 8):  # the load varies
                load = torch.tanh(load @ load)
        table = backend.measure(matrices)
        if not torch.equal(table.nan_to_num(-1.0), expected.nan_to_num(-1.0)):
            different.append(turn)
    print(f"{len(matrices)} matrices, {TIMES} times: {len(different)} tables differ {different[:10]}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
