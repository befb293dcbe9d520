"""A made checkpoint of a language model of a billion parameters, and a probe of it in a process of its own.

Its weights are noise and a low-rank part, as training leaves them, with what weights of language models have
besides: a strong mean, and a few input channels that are far stronger than the others.

`python -m bench.large_checkpoint FOLDER THREADS` probes a checkpoint and prints what that took as JSON.
"""

import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.epoch_end import STAGES
from rmsgd.inspection.probing import Probing

STD = 0.02
MEAN = 2.0
"""The mean of a weight over the standard deviation of its noise."""
OUTLIERS, STRENGTH = 6, 30.0
"""How many columns are stronger than the others, and how many times."""
RANK = 64


@dataclass(frozen=True)
class Size:
    """Sizes of a model; those given here make 1.07 billion parameters in 120 matrices and an embedding."""

    blocks: int = 20
    dim: int = 2048
    tokens: int = 32_000

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The weights of a block, (outputs, inputs)."""
        square, wide = (self.dim, self.dim), (4 * self.dim, self.dim)
        names = ("query", "key", "value", "out")
        return {f"attention.{name}": square for name in names} | {"expand": wide, "reduce": wide[::-1]}


def weight(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """One weight, float32."""
    made = torch.randn(rows, columns, generator=generator).mul_(STD)
    rank = min(RANK, rows, columns)
    edge = STD * (math.sqrt(rows) + math.sqrt(columns))
    left, right = (torch.randn(n, rank, generator=generator) / math.sqrt(n) for n in (rows, columns))
    made.addmm_(left * (4.0 * edge * torch.arange(1, rank + 1) ** -0.7), right.T)
    made += MEAN * STD
    made[:, torch.randperm(columns, generator=generator)[:OUTLIERS]] *= STRENGTH
    return made


def shards(size: Size, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    """The embedding, then block after block, bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    yield {"embedding.weight": weight(size.tokens, size.dim, generator).bfloat16()}
    for block in range(size.blocks):
        yield {
            f"blocks.{block}.{name}.weight": weight(*shape, generator).bfloat16()
            for name, shape in size.shapes.items()
        }


def tenth(size: Size) -> dict[str, Tensor]:
    """A tenth of the blocks, float32, without the embedding."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"blocks.{block}.{name}.weight": weight(*shape, generator)
        for block in range(max(1, size.blocks // 10))
        for name, shape in size.shapes.items()
    }


def write(folder: Path, size: Size) -> None:
    """Write the checkpoint, a safetensors file for each shard."""
    for number, shard in enumerate(shards(size)):
        save_file(shard, folder / f"model-{number:05d}.safetensors")


def probe(folder: Path, threads: int) -> dict[str, Any]:
    """What `measured` tells of a checkpoint, in a new process: memory that was used before does not count."""
    command = [sys.executable, "-m", "bench.large_checkpoint", str(folder), str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measured(source: Any) -> dict[str, Any]:
    """Seconds of a probe, its layers and parameters, what took which Gram matrix, and the process's memory.

    `peak_mib` is the most memory that the process has had, files that it has mapped included, and
    `before_mib` the same before the probe.
    """
    before = peak_mib()
    probing = Probing(source)
    begin = time.perf_counter()
    probing.run()
    seconds = time.perf_counter() - begin
    layers = [layer for layer in probing.layers if layer.skipped is None]
    return {
        "seconds": seconds,
        "layers": len(layers),
        "parameters": sum(math.prod(layer.shape) for layer in layers),
        "stages": {name: probing.stages[stage] for stage, name in enumerate(STAGES)},
        "before_mib": before,
        "peak_mib": peak_mib(),
    }


def peak_mib() -> float:
    """The most memory that this process has had, in MiB."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
    except OSError:
        unit = 1024 if sys.platform != "darwin" else 1024**2
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    print(json.dumps(measured(Path(sys.argv[1]))))
