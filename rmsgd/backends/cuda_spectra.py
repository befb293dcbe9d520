"""The epoch end on a GPU: the tables of a set of matrices, and the launches that measure them.

The structs are those of ``csrc/spectrum/gram_cuda.h`` and ``spectrum_cuda.h``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rmsgd.backends.base import FIELDS
from rmsgd.backends.cuda_teams import Teams, choose_teams
from rmsgd.backends.kernels import DTYPES, TEAM_SHARED, Kernels, upload
from rmsgd.backends.streams import Streams, named_range
from rmsgd.layers import Unfolding

Matrix = tuple[Tensor, Unfolding]

LARGEST = 1024
"""Rows beyond which a matrix goes another way."""

_TILE = 64
_COLUMNS_PER_SPLIT = 2048
_SPLIT_TILES = 64
"""Matrices of fewer tiles than this are split along their columns too."""
_GRAM_THREADS, _TRIDIAGONAL_THREADS, _MEASURE_THREADS, _SVD_THREADS = 256, 512, 256, 512
_GRID_BARRIER_BYTES = 1024
_VECTORS = 5
"""Vectors of scratch for a reduction."""
_MOST_SVD_BLOCKS = 32
"""All that a grid barrier has room for."""

_SIDE = np.dtype([("size", "i8", 4), ("stride", "i8", 4)])
_MATRIX = np.dtype(
    [
        ("weight", "u8"),
        ("small", _SIDE),
        ("large", _SIDE),
        ("M", "i8"),
        ("matrix", "i8"),
        ("partial", "i8"),
        ("vectors", "i8"),
        ("L", "i4"),
        ("dtype", "i4"),
        ("stride", "i4"),
        ("splits", "i4"),
        ("blocks", "i4", 2),
    ]
)
_ITEM = np.dtype([("matrix", "i4"), ("row_tile", "i4"), ("column_tile", "i4"), ("split", "i4")])
_STATE = np.dtype(
    [
        ("fingerprint", "u8"),
        ("trace", "f8"),
        ("exponent", "i4"),
        ("nonzero_rows", "i4"),
        ("stage", "i4"),
        ("unused", "i4"),
    ]
)
_TEAM_BLOCK = np.dtype([("matrix", "i4"), ("block", "i4")])
_ARGUMENTS = np.dtype(
    [
        *(
            (pointer, "u8")
            for pointer in (
                "matrix",
                "item",
                "block",
                "workspace",
                "state",
                "grid_barrier",
                "table",
                "row",
                "svd_scratch",
            )
        ),
        ("matrices", "i4"),
        ("shared_bytes", "i4"),
        ("svd_blocks", "i4"),
        ("unused", "i4"),
    ]
)


def _padded(L: int) -> int:
    return (L + 3) // 4 * 4


def _splits(L: int, M: int) -> int:
    tiles = _tiles(L)
    return max(1, min(-(-M // _COLUMNS_PER_SPLIT), _SPLIT_TILES // tiles))


def _tiles(L: int) -> int:
    rows = -(-L // _TILE)
    return rows * (rows + 1) // 2


def _workspace_parts(L: int, M: int) -> tuple[int, int, int]:
    """Bytes of one matrix: the Gram matrix in fp64, partial tiles, the reduction's vectors and result."""
    stride, splits = _padded(L), _splits(L, M)
    partial = _tiles(L) * splits * _TILE * _TILE * 4 if splits > 1 else 0
    return L * stride * 8, partial, (_VECTORS + 2) * stride * 8


def workspace_bytes(unfolding: Unfolding) -> int:
    """Bytes of workspace that one matrix needs."""
    return sum(_workspace_parts(unfolding.L, unfolding.M))


def svd_scratch_bytes(L: int, members: int) -> int:
    """Bytes for the singular values of one matrix: ``singular_values_scratch``, gamma and counts."""
    return (2 * L * L + 9 * L + L) * 8 + max(L, members) * 4


def _measure_shared(L: int, itemsize: int) -> int:
    counts = max(L, 96, _MEASURE_THREADS)
    return TEAM_SHARED + 2 * (2 * L + 2) * itemsize + (L + 2) * 8 + (counts + 2) * 4


def _gram_shared(itemsize: int) -> int:
    return TEAM_SHARED + 2 * 16 * (_TILE + 4) * itemsize + (2 * _TILE + 256) * 8


def _side(weight: Tensor, dims: Sequence[int]) -> tuple[list[int], list[int]]:
    """Sizes and strides of some dimensions, contiguous neighbours joined, the innermost one last of four."""
    sizes: list[int] = []
    strides: list[int] = []
    for d in dims:
        size, stride = weight.shape[d], weight.stride(d)
        if size == 1:
            continue
        if sizes and strides[-1] == stride * size:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    empty = 4 - len(sizes)
    return [1] * empty + sizes, [0] * empty + strides


class _Reduction(NamedTuple):
    """The reduction to tridiagonal form in one precision."""

    kernel: str
    shared: int
    """Bytes of shared memory per block."""
    teams: Teams


def _team_blocks(teams: Teams) -> NDArray[np.void]:
    blocks = np.zeros(sum(teams.blocks), _TEAM_BLOCK)
    blocks["matrix"] = np.repeat(np.arange(len(teams.blocks)), teams.blocks)
    blocks["block"] = np.concatenate([np.arange(size) for size in teams.blocks])
    return blocks


class SpectraPlan:
    """Matrices of up to ``LARGEST`` rows on one device, measured together.

    Args:
        kernels: who launches.
        matrices: weights, which must stay where they are, and their unfoldings.
    """

    def __init__(self, kernels: Kernels, matrices: Sequence[Matrix]) -> None:
        self._kernels = kernels
        self._device = matrices[0][0].device
        self._index = self._device.index or 0
        # Largest first: what takes longest begins first.
        order = sorted(range(len(matrices)), key=lambda i: -matrices[i][1].L)
        chosen = [matrices[i] for i in order]
        self._rows = [u.L for _, u in chosen]
        self.count = len(chosen)
        self._reductions = (
            self._plan_reduction("rmsgd_tridiagonal", 4),
            self._plan_reduction("rmsgd_tridiagonal_double", 8),
        )
        resident = kernels.resident_blocks("rmsgd_svd", self._index, _SVD_THREADS, TEAM_SHARED)
        self._svd_blocks = max(1, min(_MOST_SVD_BLOCKS, resident))
        table, self.workspace_bytes = self._matrix_table(chosen)
        items, self._item_counts = _items(self._rows, table["splits"])
        state = np.zeros(self.count, _STATE)
        state["stage"] = table["dtype"] == DTYPES[torch.float64]
        blocks = np.concatenate([_team_blocks(reduction.teams) for reduction in self._reductions])
        self._matrices, self._items, self._state, self._blocks, self._row = (
            upload(part, self._device) for part in (table, items, state, blocks, np.array(order, np.int32))
        )

    def _plan_reduction(self, kernel: str, itemsize: int) -> _Reduction:
        # A reduction by one block keeps its vectors and its matrix in shared memory if there is room, two
        # blocks to a multiprocessor.
        most, multiprocessor = self._kernels.shared_memory(self._index)
        parts = TEAM_SHARED + 4 * _TRIDIAGONAL_THREADS * itemsize
        budget = min(most, multiprocessor // 2 - 1024) - parts
        sizes = (rows * _padded(L) * itemsize for L in self._rows for rows in (_VECTORS, _VECTORS + L))
        shared = parts + max((size for size in sizes if size <= budget), default=0)
        capacity = self._kernels.resident_blocks(kernel, self._index, _TRIDIAGONAL_THREADS, shared)
        return _Reduction(kernel, shared, choose_teams(self._rows, itemsize, max(1, capacity)))

    def _matrix_table(self, chosen: Sequence[Matrix]) -> tuple[NDArray[np.void], int]:
        table = np.zeros(len(chosen), _MATRIX)
        place = 0
        for row, (weight, u) in zip(table, chosen, strict=True):
            matrix, partial, vectors = _workspace_parts(u.L, u.M)
            row["weight"], row["dtype"] = weight.data_ptr(), DTYPES[weight.dtype]
            for side in ("small", "large"):
                row[side]["size"], row[side]["stride"] = _side(weight, getattr(u, side))
            row["L"], row["M"], row["stride"] = u.L, u.M, _padded(u.L)
            row["splits"] = _splits(u.L, u.M)
            row["matrix"], row["partial"], row["vectors"] = (
                place,
                place + matrix,
                place + matrix + partial,
            )
            place += matrix + partial + vectors
        table["blocks"] = np.stack([reduction.teams.blocks for reduction in self._reductions], axis=1)
        return table, place

    def measure(self, streams: Streams, table: Tensor) -> None:
        """Write the rows of these matrices into ``table`` (matrices, FIELDS), on the current stream.

        The Gram matrices are formed on the caller's stream, so that what happens to the weights
        afterwards cannot reach them. Only what the fp32 Gram matrices cannot decide is read again
        from the weights, in fp64 on the current stream.
        """
        assert table.shape[1] == FIELDS
        workspace = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=self._device)
        svd_bytes = svd_scratch_bytes(self._rows[0], self._svd_blocks * _SVD_THREADS)
        scratch = torch.empty(svd_bytes, dtype=torch.uint8, device=self._device)
        # Their memory, and that of what the current stream made before, is first used on the caller's.
        streams.caller_waits()
        barriers = 2 * self.count + 1  # of each matrix in either precision, and of the singular values
        with streams.caller_stream():
            barrier = torch.zeros(barriers * _GRID_BARRIER_BYTES, dtype=torch.uint8, device=self._device)
            state = self._state.clone()
        arguments = np.zeros(1, _ARGUMENTS)
        head = arguments[0]
        head["matrix"], head["item"] = self._matrices.data_ptr(), self._items.data_ptr()
        head["row"] = self._row.data_ptr()
        head["workspace"], head["svd_scratch"] = workspace.data_ptr(), scratch.data_ptr()
        head["state"], head["grid_barrier"] = state.data_ptr(), barrier.data_ptr()
        head["table"], head["matrices"] = table.data_ptr(), self.count
        head["svd_blocks"] = self._svd_blocks
        first_item = self._items.data_ptr()

        def launch(
            name: str, blocks: int, threads: int, shared: int, stream: int, cooperative: bool = False
        ) -> None:
            if blocks:
                self._kernels.launch(
                    name, self._index, blocks, threads, shared, stream, arguments, cooperative
                )

        def reduce_and_measure(double: int, stream: int) -> None:
            kernel, shared, teams = self._reductions[double]
            head["shared_bytes"] = shared
            before = sum(self._reductions[0].teams.blocks) if double else 0
            suffix, precision = ("_double", ", fp64") if double else ("", "")
            with named_range(f"rmsgd: tridiagonal forms{precision}"):
                for first, blocks in teams.waves:
                    head["block"] = self._blocks.data_ptr() + (before + first) * _TEAM_BLOCK.itemsize
                    launch(kernel, blocks, _TRIDIAGONAL_THREADS, shared, stream, True)
            with named_range(f"rmsgd: eigenvalues and EVBMF{precision}"):
                shared = _measure_shared(self._rows[0], 8 if double else 4)
                launch(f"rmsgd_measure{suffix}", self.count, _MEASURE_THREADS, shared, stream)

        gram, parts, gram_double = self._item_counts
        with named_range("rmsgd: fingerprint"):
            launch("rmsgd_fingerprint", gram, _GRAM_THREADS, TEAM_SHARED, streams.caller())
        with named_range("rmsgd: Gram matrices"):
            launch("rmsgd_gram", gram, _GRAM_THREADS, _gram_shared(4), streams.caller())
            head["item"] = first_item + gram * _ITEM.itemsize
            launch("rmsgd_gram_sum", parts, _GRAM_THREADS, TEAM_SHARED, streams.caller())
        streams.side_waits()
        stream = streams.current()
        reduce_and_measure(0, stream)
        with named_range("rmsgd: Gram matrices, fp64"):
            head["item"] = first_item + (gram + parts) * _ITEM.itemsize
            launch("rmsgd_gram_double", gram_double, _GRAM_THREADS, _gram_shared(8), stream)
        reduce_and_measure(1, stream)
        with named_range("rmsgd: SVD"):
            launch("rmsgd_svd", self._svd_blocks, _SVD_THREADS, TEAM_SHARED, stream, True)
        for tensor in (barrier, state, self._matrices, self._items, self._state, self._blocks, self._row):
            streams.record_stream(tensor)


def _items(rows: Sequence[int], splits: NDArray[np.int32]) -> tuple[NDArray[np.void], tuple[int, int, int]]:
    """The blocks of the fp32 products, of the sums of their parts, and of the fp64 products."""
    tiles = [np.stack(np.triu_indices(-(-L // _TILE)), axis=1).astype(np.int32) for L in rows]

    def items(chosen: Sequence[int], parts: Sequence[int]) -> NDArray[np.void]:
        blocks = []
        for i, count in zip(chosen, parts, strict=True):
            part = np.zeros((count, len(tiles[i])), _ITEM)
            part["matrix"] = i
            part["row_tile"], part["column_tile"] = tiles[i].T
            part["split"] = np.arange(count)[:, None]
            blocks.append(part.reshape(-1))
        return np.concatenate(blocks) if blocks else np.zeros(0, _ITEM)

    everything = range(len(rows))
    split = [i for i in everything if splits[i] > 1]
    kinds = (
        items(everything, splits.tolist()),
        items(split, [1] * len(split)),
        items(everything, [1] * len(rows)),
    )
    return np.concatenate(kinds), (len(kinds[0]), len(kinds[1]), len(kinds[2]))
