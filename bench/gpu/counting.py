"""The time of an epoch end on GPUs that are not here, counted from the tables for its launches."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import ceil, log2
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench import models
from bench.gpu import before
from bench.gpu.cards import CARDS, Card
from bench.models.transformer import Block
from rmsgd.backends.cuda import CudaBackend
from rmsgd.backends.cuda_devices import LAUNCH
from rmsgd.backends.cuda_spectra import LARGEST, SpectraPlan
from rmsgd.layers import Unfolding, unfoldings

REGISTERS = {
    "rmsgd_gram": 128,
    "rmsgd_tridiagonal": 128,
    "rmsgd_tridiagonal_double": 128,
    "rmsgd_svd": 128,
}
"""The most registers of a thread. A test compares the compiled kernels with it."""

TILE = 64
FFMA_SHARE = {1: 0.66, 2: 0.75}
"""The share of multiply-adds among the instructions of the Gram kernel's loop, by the tiles of a block.

A test compares the compiled kernels with it.
"""
FINGERPRINT = 10
"""The instructions of an element's part in the fingerprint."""
INSTRUCTIONS = 128
"""Per cycle and multiprocessor, of all its threads."""
STURM_STEP = 45
"""Cycles from one pivot of a Sturm sequence to the next: a reciprocal, a product, two sums, a comparison."""
BEFORE_LOOKING = 3
"""Counts that a block takes before it looks for its values: what is zero, the grid, how many are needed."""
DIVISIONS = 16
"""Per cycle and multiprocessor."""
EVBMF_VALUE = 500
"""The cycles for one more value in the search for the free energy's minimum."""
NEEDED = 0.5
"""The share of the eigenvalues that EVBMF needs: fewer than 1 / (1 + L / M) of them can be kept."""


def _vit_huge() -> nn.Module:
    blocks = [Block(1280) for _ in range(32)]
    return nn.Sequential(nn.Conv2d(3, 1280, 14, 14), *blocks, nn.Linear(1280, 1000))


def _one_billion() -> nn.Module:
    return nn.Sequential(*(Block(2048, bias=False) for _ in range(24)), nn.Linear(2048, 32_000, bias=False))


_BUILT = ("resnet18", "resnet34", "resnet50", "resnet101", "mobilenetv2", "vit-b16")
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **{name: partial(models.build, name) for name in _BUILT},
    "vit-h14": _vit_huge,
    "transformer-1b": _one_billion,
}


class CountedKernels:
    """See ``rmsgd.backends.kernels.Kernels``. It answers for a card, and cannot launch."""

    def __init__(self, card: Card) -> None:
        self.card = card

    def attributes(self, device: int) -> Sequence[int]:
        """The card's."""
        return self.card.attributes

    def resident_blocks(self, name: str, device: int, threads: int, shared_bytes: int) -> int:
        """The number that follows from the kernel's registers and the card's limits."""
        return self.card.resident(threads, REGISTERS[name], shared_bytes)

    def launch(self, *arguments: Any, **options: Any) -> None:
        """Raise RuntimeError: there is no GPU."""
        raise RuntimeError("a counted card launches nothing")


class Stage(NamedTuple):
    """The seconds of a part of the epoch end, and the limit that takes most of them."""

    seconds: float
    limit: str


def weights_of(network: str) -> list[tuple[Tensor, Unfolding]]:
    """The matrices that an epoch end measures, without values."""
    with torch.device("meta"):
        weights = [p for p in NETWORKS[network]().parameters() if p.ndim > 1]
    return [(w, u) for w in weights for u in unfoldings(w.shape)]


def plans_of(matrices: Sequence[tuple[Tensor, Unfolding]], card: Card) -> list[SpectraPlan]:
    """The tables by which the backend would launch kernels for these matrices on a card."""
    backend = CudaBackend("counted", CountedKernels(card), "no GPU")
    return backend.plans([m for m in matrices if m[1].L <= LARGEST])


def _gram(plan: SpectraPlan, card: Card) -> Stage:
    """The time of the tiles on the multiprocessors, or of reading the weights, if that is longer.

    The parts of tiles are written and read again.
    """
    blocks = plan.gram_blocks()
    cycles = [
        block.columns
        * TILE
        * (
            block.tiles * TILE / (card.lanes * FFMA_SHARE[block.tiles])
            + block.takes_fingerprint * FINGERPRINT / INSTRUCTIONS
        )
        for block in blocks
    ]
    from_l2 = sum((block.tiles + 1 + block.takes_fingerprint) * TILE * block.columns * 4 for block in blocks)
    products = max(
        Stage(before.last_end(cycles, card.attributes.multiprocessors) / card.device.clock, "arithmetic"),
        Stage(from_l2 / card.device.l2_rate, "L2"),
    )
    partial = plan.partial_bytes()
    rate = card.device.l2_rate if partial <= card.device.l2_bytes else card.device.dram_rate
    return Stage(products.seconds + 2 * partial / rate, products.limit)


def _reduction(plan: SpectraPlan) -> Stage:
    waves = plan.rounds[0].waves
    return Stage(sum(wave.seconds for wave in waves), max(waves, key=lambda wave: wave.seconds).limit)


def _sturm(plan: SpectraPlan, card: Card) -> Stage:
    """The time of one chain of pivots per look at a bracket, or of all divisions, if that is longer."""
    threads, part = plan.STURM_THREADS, plan.STURM_PART
    looks = ceil(26 / log2(1 + threads // part))
    chain = max(plan.rows) * (BEFORE_LOOKING + looks) * STURM_STEP
    divisions = sum(
        n * threads * (BEFORE_LOOKING * ceil(n / part) + looks * ceil(NEEDED * n / part)) for n in plan.rows
    )
    search = EVBMF_VALUE * NEEDED * max(plan.rows)
    share = divisions / DIVISIONS / card.attributes.multiprocessors
    limit = "chain" if chain > share else "divisions"
    return Stage((max(chain, share) + search) / card.device.clock, limit)


def _idle(plan: SpectraPlan) -> float:
    """The seconds of the launches for fp64 and SVD, whose blocks usually find nothing to do."""
    return LAUNCH * (1 + sum(3 + len(round_.waves) for round_ in plan.rounds[1:]))


def count(network: str, card: Card) -> dict[str, Any]:
    """The row of a network on a card, in milliseconds."""
    matrices = weights_of(network)
    plans = plans_of(matrices, card)
    stages = {"fingerprint": [Stage(0.0, "counted with gram")]}
    stages["gram"] = [_gram(plan, card) for plan in plans]
    stages["reduction"] = [_reduction(plan) for plan in plans]
    stages["sturm_evbmf"] = [_sturm(plan, card) for plan in plans]
    stages["idle"] = [Stage(_idle(plan), "launches") for plan in plans]
    row = _row(network, card, "after", stages)
    row["batches"] = len(plans)
    row["waves"] = sum(len(plan.rounds[0].waves) for plan in plans)
    row["workspace_mib"] = max(plan.workspace_bytes for plan in plans) / 2**20
    row["host"] = sum(u.L > LARGEST for _, u in matrices)
    return row


def count_before(network: str, card: Card) -> dict[str, Any]:
    """The row of a network on a card in the design before this one, with the same constants."""
    matrices = weights_of(network)
    small = [(w, u) for w, u in matrices if u.L <= before.LARGEST]
    read = sum(u.L * u.M * weight.element_size() for weight, u in small)
    rows = sorted((u.L for _, u in small), reverse=True)
    capacity = card.resident(512, 64, card.attributes.shared_multiprocessor // 2 - 1024)
    reduction = before.reduction(rows, capacity, card.device) if rows else (0.0, "none")
    sturm = before.sturm_cycles(rows, NEEDED) / card.device.clock
    search = EVBMF_VALUE * NEEDED * max(rows, default=0) / card.device.clock
    stages = {
        "fingerprint": [Stage(read / card.device.dram_rate, "DRAM")],
        "gram": [Stage(*before.gram([(u.L, u.M) for _, u in small], card.lanes, card.device))],
        "reduction": [Stage(*reduction)],
        "sturm_evbmf": [Stage(sturm + search, "chain")],
        "idle": [Stage(before.IDLE_LAUNCHES * LAUNCH, "launches")],
    }
    row = {**_row(network, card, "before", stages), "host": len(matrices) - len(small)}
    if row["host"]:
        row["dominated_by"] = "host: torch.linalg.eigvalsh, not counted"
    return row


def _row(network: str, card: Card, design: str, stages: dict[str, list[Stage]]) -> dict[str, Any]:
    seconds = {name: sum(stage.seconds for stage in found) for name, found in stages.items()}
    longest = max(seconds, key=lambda name: seconds[name])
    limit = max(stages[longest]).limit
    return {
        "device": card.name,
        "network": network,
        "design": design,
        **{f"{name}_ms": 1e3 * value for name, value in seconds.items()},
        "total_ms": 1e3 * sum(seconds.values()),
        "dominated_by": f"{longest}: {limit}",
    }


def counted() -> Iterator[dict[str, Any]]:
    """The rows of every network on every card, in the design before and in this one."""
    for network in NETWORKS:
        for card in CARDS:
            yield count_before(network, card)
            yield count(network, card)
