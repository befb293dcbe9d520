"""The epoch end of a job of several processes, of which one factorises each matrix.

Nothing here is called, and no collective is issued, unless parameters are DTensors or the optimizer was given
a process group. Every rank then has the same table of metrics, bit for bit, since each row is computed by one
rank and added to the zeros of the others.
"""

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from rmsgd.backends.base import FIELDS


class Work(Protocol):
    """What is to be measured of a tensor, such as an unfolding of it."""

    @property
    def cost(self) -> int:
        """The time that it takes, in any unit."""


Matrix: TypeAlias = tuple[Tensor, Work]
Measure: TypeAlias = Callable[[Sequence[Any]], Tensor]


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor of any shape is spread over a device mesh."""
    module = sys.modules.get("torch.distributed.tensor")  # without it there are no DTensors
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor of any shape, which shares its memory."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined, no-any-return]


def local_gradient(grad: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a gradient, spread as its parameter is (a collective where it is not)."""
    if not is_dtensor(grad):
        return grad
    spread: Any = grad
    if spread.placements != parameter.placements:  # type: ignore[attr-defined]
        spread = spread.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    return local(spread)


def split(costs: Sequence[int], ranks: int) -> list[int]:
    """The rank of each matrix: the costliest comes first, and each goes to the rank with the least so far."""
    owners, load = [0] * len(costs), [0] * ranks
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[i] = load.index(min(load))
        load[owners[i]] += costs[i]
    return owners


@dataclass(frozen=True)
class Ranks:
    """The ranks that share work: a process group, or a device mesh as the groups along its dimensions."""

    groups: tuple[Any, ...]
    size: int
    index: int

    @classmethod
    def of_group(cls, group: Any) -> "Ranks":
        """The ranks of a process group.

        Raises:
            ValueError: it is none, or one that this process does not belong to, for which torch has a number.
        """
        if not isinstance(group, dist.ProcessGroup):
            raise ValueError(
                "process_group must be a process group that this process belongs to, such as "
                f"torch.distributed.group.WORLD, got {group!r}"
            )
        return cls((group,), dist.get_world_size(group), dist.get_rank(group))

    @classmethod
    def of_mesh(cls, mesh: Any) -> "Ranks":
        """The ranks of a device mesh that this process belongs to."""
        index = 0
        for size, at in zip(mesh.shape, mesh.get_coordinate(), strict=True):
            index = index * size + at
        return cls(tuple(mesh.get_group(d) for d in range(mesh.ndim)), mesh.size(), index)

    def reduce(self, tensor: Tensor, op: Any) -> Tensor:
        """A tensor of the same shape on all ranks, reduced over them in place."""
        for group in self.groups:
            dist.all_reduce(tensor, op=op, group=group)
        return tensor

    def gather(self, thing: Any) -> list[Any]:
        """Every rank's object, in the order of their indices."""
        things = [thing]
        for group in reversed(self.groups):
            parts: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(parts, things, group=group)
            things = [one for part in parts for one in part]
        return things

    def check_agreement(self, lines: Sequence[str], device: torch.device) -> None:
        """Raise RuntimeError on every rank if the lines are not the same on all, naming the first.

        The ranks exchange a digest. The lines themselves are sent only when they differ.
        """
        digest = int.from_bytes(hashlib.sha256("\n".join(lines).encode()).digest()[:7], "big")
        extremes = self.reduce(torch.tensor([digest, -digest], device=device), dist.ReduceOp.MAX).tolist()
        if extremes[0] == -extremes[1]:
            return
        everyone = self.gather(list(lines))
        for rank, theirs in enumerate(everyone):
            for i in range(max(len(theirs), len(everyone[0]))):
                a, b = (lines[i] if i < len(lines) else "nothing" for lines in (everyone[0], theirs))
                if a != b:
                    raise RuntimeError(f"the ranks disagree: rank 0 has {a}; rank {rank} has {b}")


class SharedMeasurement:
    """Measures matrices together with the other ranks that hold them.

    Args:
        matrices: the matrices, the same ones in the same order on every rank.
        process_group: the ranks that hold copies of the plain tensors; None if each measures them all.
        columns: the number of columns of the table that is measured.
    """

    def __init__(self, matrices: Sequence[Matrix], process_group: Any, columns: int = FIELDS) -> None:
        self._matrices = matrices
        self._columns = columns
        shared: dict[Any, list[int]] = {}
        self._ranks: dict[Any, Ranks] = {}
        for i, (weight, _) in enumerate(matrices):
            mesh = weight.device_mesh if is_dtensor(weight) else None  # type: ignore[attr-defined]
            shared.setdefault(mesh, []).append(i)
            if mesh is not None and mesh not in self._ranks:
                self._ranks[mesh] = Ranks.of_mesh(mesh)
        if process_group is not None:
            self._ranks[None] = Ranks.of_group(process_group)
        self._shared = shared

    def check_agreement(self, lines: Sequence[str], device: torch.device) -> None:
        """Raise RuntimeError on every rank if these lines are not the same on all of them."""
        for ranks in self._ranks.values():
            ranks.check_agreement(lines, device)

    def __call__(self, measure: Measure) -> Tensor:
        """The table of all matrices; ``measure`` makes that of those of this rank."""
        if not self._matrices:
            return measure([])
        parts = [self._measure(measure, mesh, mine) for mesh, mine in self._shared.items()]
        table = torch.empty(len(self._matrices), self._columns, dtype=torch.float64, device=parts[0].device)
        for part, rows in zip(parts, self._shared.values(), strict=True):
            table[rows] = part
        return table

    def _measure(self, measure: Measure, mesh: Any, rows: Sequence[int]) -> Tensor:
        matrices = [self._matrices[i] for i in rows]
        ranks = self._ranks.get(mesh)
        if ranks is None:
            return measure(matrices)
        owners = split([work.cost for _, work in matrices], ranks.size)
        mine = [i for i, owner in enumerate(owners) if owner == ranks.index]
        device = local(matrices[0][0]).device
        table = torch.zeros(len(matrices), self._columns, dtype=torch.float64, device=device)
        if mesh is not None:
            matrices = _gather(matrices, mine)
        if mine:
            table[mine] = measure([matrices[i] for i in mine])
        return ranks.reduce(table, dist.ReduceOp.SUM)


def _gather(matrices: Sequence[Matrix], mine: Sequence[int]) -> list[Matrix]:
    """The matrices of this rank as whole tensors. All ranks take part in gathering every one.

    A tensor is gathered once for all of its unfoldings, and ranks that do not measure it free it at once.
    """
    result = list(matrices)
    wanted = set(mine)
    previous: Tensor | None = None
    whole: Tensor | None = None
    for i, (weight, work) in enumerate(matrices):
        if weight is not previous:
            previous, whole = weight, weight.full_tensor()  # type: ignore[attr-defined]
        if i in wanted:
            assert whole is not None
            result[i] = (whole, work)
    return result
