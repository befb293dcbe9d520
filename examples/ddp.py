"""Train with DistributedDataParallel over two processes, each of which factorises half of the layers.

    python examples/ddp.py

It takes about twenty seconds and starts both processes by itself, over gloo on the CPU. With
`process_group` every matrix is measured by one of the processes, and both get the same rates, bit for bit.
The script shows it: it prints the largest difference between the weights of the two processes and between
their rates, which is 0.
"""

import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import rmsgd


def train(rank: int, world: int, folder: str) -> None:
    """Run one process, with its share of the samples to train on and of the layers to factorise."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.manual_seed(0)
    x = torch.randn(1024, 32)
    y = (x @ torch.randn(32, 10)).argmax(1)
    x, y = x[rank::world], y[rank::world]

    model = DistributedDataParallel(nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 10)))
    optimizer = rmsgd.RMSGD(model.named_parameters(), lr=0.03, process_group=dist.group.WORLD)
    for epoch in range(5):
        for batch in torch.arange(len(x)).split(32):
            optimizer.zero_grad()
            loss = cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
        optimizer.epoch_step()  # on every rank
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    weights = nn.utils.parameters_to_vector(model.parameters()).detach()
    rates = torch.tensor(list(optimizer.learning_rates().values()), dtype=torch.float64)
    for what, mine in (("weights", weights), ("learning rates", rates)):
        everyone = [torch.empty_like(mine) for _ in range(world)]
        dist.all_gather(everyone, mine)
        if rank == 0:
            print(f"largest difference of {what}: {(everyone[0] - everyone[1]).abs().max().item()}")
    del model, optimizer  # threads of the wrapped model may otherwise outlive the interpreter
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train, (2, folder), nprocs=2)
