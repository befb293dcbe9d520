"""Jobs of several processes on this machine, over gloo, that run functions of the tests."""

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from clock import PATIENCE
from forked import context

from rmsgd.backends import backend_for

SHARDS_ON_CPU = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="fully_shard of this torch runs on GPUs only"
)


def _work(rank: int, size: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    # torchrun sets these for trainers. Nothing connects to the port, since the group exists already.
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE)
    )
    while (order := pipe.recv()) is not None:
        function, arguments = order
        torch.manual_seed(0)
        try:
            pipe.send((function(*arguments), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
    dist.destroy_process_group()


class Job:
    """Ranks that wait for functions to run on all of them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        pipes = [context.Pipe() for _ in range(size)]
        self._pipes = [ours for ours, _ in pipes]
        store = str(Path(self._folder.name) / "store")
        self._processes = [
            context.Process(target=_work, args=(rank, size, store, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return the results of the function on each rank, or raise what any of them raised."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(PATIENCE):
                raise TimeoutError(f"rank {rank} of {self.size} does not answer")
            answers.append(pipe.recv())
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(answers) if error is not None]
        if errors:
            raise RuntimeError("\n".join(errors))
        return [result for result, _ in answers]

    def close(self) -> None:
        """End the job."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()


class Counting:
    """Counts the matrices that this rank's backend is given."""

    def __init__(self):
        self.count = 0
        self._backend = backend_for(torch.device("cpu"))
        self._measure = self._backend.measure

    def __enter__(self):
        def measure(matrices):
            self.count += len(matrices)
            return self._measure(matrices)

        self._backend.measure = measure
        return self

    def __exit__(self, *_):
        del self._backend.measure
