"""Epoch ends beside training on the pretended GPU.

``python tests/streams.py FOLDER WITHOUT`` leaves one wait out, and exits with 0 if every order of streams
still gives the same bits as waiting for everything. A wrong address may end it in another way.
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pretended_streams
import torch
from matrices import low_rank
from rehearsal import rehearsed
from torch import Tensor
from torch.nn import Parameter

import rmsgd
from rmsgd import backends
from rmsgd.backends.streams import Streams

WORKSPACE_BYTES = 5_000
"""So little workspace that the matrices below are measured in several batches."""


def weights() -> list[Tensor]:
    """Matrices that each of the accuracy guard's stages decides, and parameters that are not measured."""
    torch.manual_seed(0)
    return [
        low_rank(20, 30, 3, 0.5),
        torch.randn(20),
        low_rank(12, 45, 2, 0.3).reshape(12, 5, 3, 3),
        low_rank(70, 90, 4, 1e-3),
        low_rank(16, 24, 3, 0.0),
        torch.randn(6, 4, 1, 1),
    ]


def train(folder: Path, order: str) -> tuple[list[Tensor], dict[str, float], list[tuple[Any, ...]]]:
    """Parameters, rates and measurements after some epochs, none of which the host waits for."""
    with rehearsed(folder, order):
        backends.backend_for(torch.device("cuda"))._budget = WORKSPACE_BYTES
        parameters = [Parameter(w.cuda()) for w in weights()]
        optimizer = rmsgd.RMSGD(parameters, lr=0.03, rule="paper")
        for _ in range(3):
            for _ in range(2):
                for p in parameters:
                    p.grad = torch.randn(p.shape).pin_memory().to("cuda", non_blocking=True)
                optimizer.step()
            optimizer.epoch_step()
            with torch.no_grad():
                for p in parameters[:3]:  # these the fp32 Gram matrices decide
                    p.mul_(0.9)
        optimizer.epoch_step()  # and no step in between
        layers = [(layer.rank, layer.stable_rank) for layer in optimizer.report().layers]
        return [p.detach().cpu() for p in parameters], optimizer.learning_rates(), layers


def same(found: Any, expected: Any) -> bool:
    return all(map(torch.equal, found[0], expected[0])) and found[1:] == expected[1:]


WITHOUT = {
    "wait_side_stream": lambda streams: None,
    "side_waits": lambda streams: None,
    "caller_waits": lambda streams: None,
    "record_stream": lambda streams, tensor: None,
    "caller_stream": lambda streams: nullcontext(),
}
"""From a wait, or a reference that keeps memory, to the change that leaves it out."""


def main(folder: Path, without: str) -> int:
    expected = train(folder, "at once")
    setattr(Streams, without, WITHOUT[without])
    print(f"without {without}", flush=True)  # errors from here on are due to the missing wait
    orders = reversed(pretended_streams.ORDERS)  # a random order finds most errors
    return 0 if all(same(train(folder, order), expected) for order in orders) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
