"""The epoch end on a GPU: the tables of a set of matrices, and the launches that measure them.

The structs are those of ``csrc/spectrum/gram_cuda.h`` and ``spectrum_cuda.h``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rmsgd.backends.base import FIELDS
from rmsgd.backends.cuda_devices import Attributes, device_of
from rmsgd.backends.cuda_teams import THREADS as _TRIDIAGONAL_THREADS
from rmsgd.backends.cuda_teams import Team, Wave, choose_teams, widest_team
from rmsgd.backends.cuda_teams import padded as _padded
from rmsgd.backends.kernels import TEAM_SHARED, Kernels, upload
from rmsgd.backends.streams import Streams, named_range
from rmsgd.element_types import NUMBERS
from rmsgd.layers import Unfolding

Matrix = tuple[Tensor, Unfolding]

LARGEST = 8192
"""The most rows of a matrix that these kernels measure."""

_TILE, _GRAM_DEPTH, _GRAM_CHAIN = 64, 8, 256
_COLUMNS_PER_SPLIT = 1024
_SPLIT_BLOCKS = 80
"""A matrix of few blocks is split along its columns too, into no more blocks in all than this."""
_GRAM_THREADS, _STURM_THREADS, _MEASURE_THREADS, _SVD_THREADS = 256, 256, 256, 512
_STURM_PART = 32
"""How many eigenvalues a block looks for."""
_GRID_BARRIER_BYTES = 1024
_MOST_SVD_BLOCKS = 32
"""The most blocks that a grid barrier has room for."""
_ITEMSIZES = {"": 4, "_double": 8}
"""Bytes of an element in either precision, by the ending of its kernels' names."""

_SIDE = np.dtype([("size", "i8", 4), ("stride", "i8", 4)])
_REDUCTION = np.dtype(
    [
        ("matrix", "i8"),
        ("vectors", "i8"),
        ("blocks", "i4"),
        ("near_rows", "i4"),
        ("near_slab", "i4"),
        ("unused", "i4"),
    ]
)
_MATRIX = np.dtype(
    [
        ("weight", "u8"),
        ("small", _SIDE),
        ("large", _SIDE),
        ("M", "i8"),
        ("partial", "i8"),
        ("reduction", _REDUCTION, 2),
        ("L", "i4"),
        ("dtype", "i4"),
        ("stride", "i4"),
        ("splits", "i4"),
    ]
)
_ITEM = np.dtype([("matrix", "i4"), ("row_tile", "i4"), ("column_tile", "i4"), ("split", "i4")])
_STATE = np.dtype(
    [
        ("fingerprint", "u8"),
        ("trace", "f8"),
        ("lower", "f8"),
        ("s_limit", "f8"),
        ("upper", "f8"),
        ("needed", "i4"),
        ("nonzero", "i4"),
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
            )
        ),
        ("matrices", "i4"),
        ("first", "i4"),
        ("svd_blocks", "i4"),
        ("unused", "i4"),
    ]
)


def _splits(L: int, M: int) -> int:
    return max(1, min(-(-M // _COLUMNS_PER_SPLIT), _SPLIT_BLOCKS // len(_gram_blocks(L))))


@cache
def _tiles(L: int) -> NDArray[np.int32]:
    """The tiles of the upper triangle, each with its row and column: (tiles, 2)."""
    return np.stack(np.triu_indices(-(-L // _TILE)), axis=1).astype(np.int32)


@cache
def _gram_blocks(L: int) -> NDArray[np.int32]:
    """The upper tile of each block of an fp32 product: (blocks, 2). On the diagonal it is the only one."""
    tiles = _tiles(L)
    blocks: NDArray[np.int32] = tiles[tiles[:, 0] % 2 == 0]
    return blocks


def _partial_bytes(L: int, M: int) -> int:
    """Bytes of the partial tiles of a Gram matrix in fp32."""
    splits = _splits(L, M)
    return len(_tiles(L)) * splits * _TILE * _TILE * 4 if splits > 1 else 0


def _vector_bytes(L: int, itemsize: int, team: Team) -> int:
    """Bytes of everything beside the matrix: ``ReductionVectors`` and ``spectrum_scratch``."""
    vectors = 8 + (0 if team.near_rows else 4 * team.blocks)
    scratch = 2 * (L + 2) * (8 + itemsize) + (max(L, _MEASURE_THREADS) + 2) * 4
    return vectors * _padded(L) * itemsize + -(-scratch // 16) * 16


def reduction_bytes(L: int, itemsize: int, team: Team) -> int:
    """Bytes of workspace that one matrix takes in one precision, without partial tiles."""
    return L * _padded(L) * itemsize + _vector_bytes(L, itemsize, team)


def workspace_bytes(unfolding: Unfolding) -> int:
    """Bytes of workspace that one matrix needs as one of many: its fp32 Gram matrix and what goes with it."""
    L, M = unfolding.L, unfolding.M
    return reduction_bytes(L, 4, Team(1, True, False)) + _partial_bytes(L, M)


def svd_bytes(L: int, members: int) -> int:
    """Bytes for the singular values of one matrix: ``singular_values_scratch``, gamma and counts."""
    at_a_time = L if L <= 1024 else 1024 * 1024 // L
    return (L * L + at_a_time * L + 9 * L + L) * 8 + max(L, members) * 4


def _sturm_shared(itemsize: int) -> int:
    return TEAM_SHARED + 2 * _STURM_PART * itemsize + _STURM_THREADS * 4


def _gram_shared(itemsize: int) -> int:
    """Bytes of shared memory of a block of the products: ``GramShared``."""
    left = 2 * _TILE if itemsize == 4 else _TILE
    columns = 2 * _GRAM_DEPTH * (left + 4 + _TILE + 4)
    return TEAM_SHARED + columns * itemsize + (left + _TILE + 2 * _GRAM_CHAIN) * 8


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


class GramBlock(NamedTuple):
    """A block of the fp32 products."""

    tiles: int
    """How many tiles it computes."""
    columns: int
    """The columns of the weight that it sums over."""
    takes_fingerprint: bool
    """Whether it takes the fingerprint of a tile's rows, over these columns."""


class _Round(NamedTuple):
    """Matrices that are reduced and measured together in one precision: neighbours in the order of size."""

    suffix: str
    """The suffix of the kernels' names."""
    first: int
    matrices: int
    teams: list[Team]
    waves: list[Wave]
    places: list[int]
    """Where in the workspace each matrix begins, and its vectors after it."""
    end: int
    """Where the last one ends."""


class SpectraPlan:
    """Matrices of up to ``LARGEST`` rows on one device, measured together.

    Args:
        kernels: the kernels to launch.
        matrices: weights, which must not move in memory, and their unfoldings.
    """

    def __init__(self, kernels: Kernels, matrices: Sequence[Matrix]) -> None:
        self._kernels = kernels
        self._device = matrices[0][0].device
        self._index = self._device.index or 0
        # The largest come first, so that what takes longest begins first.
        order = sorted(range(len(matrices)), key=lambda i: -matrices[i][1].L)
        chosen = [matrices[i] for i in order]
        self.rows = [u.L for _, u in chosen]
        self._columns = [u.M for _, u in chosen]
        self._splits = [_splits(u.L, u.M) for _, u in chosen]
        self.count = len(chosen)
        self._about = device_of(Attributes(*kernels.attributes(self._index)))
        resident = kernels.resident_blocks("rmsgd_svd", self._index, _SVD_THREADS, TEAM_SHARED)
        self._svd_blocks = max(1, min(_MOST_SVD_BLOCKS, resident))
        partial = [_partial_bytes(u.L, u.M) for _, u in chosen]
        single = self._round("", 0, self.count, partial)
        # In fp64 the workspace is used anew, as often as it takes.
        alone = [reduction_bytes(n, 8, widest_team(n, 8, self._about)) for n in self.rows]
        svd = svd_bytes(self.rows[0], self._svd_blocks * _SVD_THREADS)
        self.workspace_bytes = max(single.end, svd, *alone)
        self.rounds = [single, *self._double_rounds(alone)]
        self.workspace_bytes = max(self.workspace_bytes, *(round_.end for round_ in self.rounds))
        table = self._matrix_table(chosen)
        for row, place, size in zip(table, single.places, partial, strict=True):
            row["partial"] = place - size
        items, self._item_counts = _items(self.rows, self._columns, table["splits"])
        state = np.zeros(self.count, _STATE)
        state["stage"] = table["dtype"] == NUMBERS[torch.float64]
        blocks = np.concatenate([_team_blocks(round_) for round_ in self.rounds])
        parts = [-(-n // _STURM_PART) for n in self.rows]
        self._part_ends = np.concatenate([[0], np.cumsum(parts)])
        self._tables = [
            upload(part, self._device)
            for part in (table, items, state, blocks, _numbered(parts), np.array(order, np.int32))
        ]

    STURM_THREADS, STURM_PART = _STURM_THREADS, _STURM_PART

    def gram_blocks(self) -> list[GramBlock]:
        """The blocks of the fp32 products, in the order of their launch."""
        blocks = [
            GramBlock(1 if row == column else 2, -(-M // splits), row // 2 == column // 2)
            for L, M, splits in zip(self.rows, self._columns, self._splits, strict=True)
            for row, column in _gram_blocks(L).tolist()
            for _ in range(splits)
        ]
        return sorted(blocks, key=lambda block: -block.tiles * block.columns)

    def partial_bytes(self) -> int:
        """Bytes of the parts of tiles that are written, and then read to be added."""
        return sum(_partial_bytes(L, M) for L, M in zip(self.rows, self._columns, strict=True))

    def _round(self, suffix: str, first: int, count: int, before: Sequence[int]) -> _Round:
        """A round of neighbouring matrices, each with ``before`` bytes in front of it."""
        itemsize, rows = _ITEMSIZES[suffix], self.rows[first : first + count]
        kernel = f"rmsgd_tridiagonal{suffix}"

        def capacity(shared: int) -> int:
            return self._kernels.resident_blocks(kernel, self._index, _TRIDIAGONAL_THREADS, shared)

        teams = choose_teams(rows, itemsize, capacity, self._about)
        places, end = [], 0
        for n, team, more in zip(rows, teams.teams, before, strict=True):
            places.append(end + more)
            end += more + reduction_bytes(n, itemsize, team)
        return _Round(suffix, first, count, teams.teams, teams.waves, places, end)

    def _double_rounds(self, alone: Sequence[int]) -> Iterator[_Round]:
        """Rounds in fp64, each of as many matrices as there is room for."""
        first, filled = 0, 0
        for i, size in enumerate([*alone, self.workspace_bytes + 1]):
            if filled + size > self.workspace_bytes:
                yield self._round("_double", first, i - first, [0] * (i - first))
                first, filled = i, 0
            filled += size

    def _matrix_table(self, chosen: Sequence[Matrix]) -> NDArray[np.void]:
        table = np.zeros(len(chosen), _MATRIX)
        table["splits"] = self._splits
        for row, (weight, u) in zip(table, chosen, strict=True):
            row["weight"], row["dtype"] = weight.data_ptr(), NUMBERS[weight.dtype]
            for side in ("small", "large"):
                row[side]["size"], row[side]["stride"] = _side(weight, getattr(u, side))
            row["L"], row["M"], row["stride"] = u.L, u.M, _padded(u.L)
        for round_ in self.rounds:
            itemsize = _ITEMSIZES[round_.suffix]
            for i, (team, place) in enumerate(zip(round_.teams, round_.places, strict=True), round_.first):
                to, n = table[i]["reduction"][itemsize // 8], self.rows[i]
                to["matrix"], to["vectors"] = place, place + n * _padded(n) * itemsize
                to["blocks"], to["near_rows"], to["near_slab"] = team
        return table

    def measure(self, streams: Streams, table: Tensor) -> None:
        """Write the rows of these matrices into ``table`` (matrices, FIELDS), on the current stream.

        The Gram matrices are formed on the caller's stream, so that what happens to the weights
        afterwards cannot reach them. Only what the fp32 Gram matrices cannot decide is read again
        from the weights, in fp64 on the current stream.
        """
        assert table.shape[1] == FIELDS
        workspace = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=self._device)
        # This memory, and memory from the current stream's earlier work, is first used on the caller's
        # stream.
        streams.caller_waits()
        barriers = 2 * self.count + 1  # for each matrix in either precision, and for the singular values
        matrices, items, first_state, blocks, parts, row = self._tables
        with streams.caller_stream():
            barrier = torch.zeros(barriers * _GRID_BARRIER_BYTES, dtype=torch.uint8, device=self._device)
            state = first_state.clone()
        arguments = np.zeros(1, _ARGUMENTS)
        head = arguments[0]
        head["matrix"], head["row"] = matrices.data_ptr(), row.data_ptr()
        head["workspace"], head["state"] = workspace.data_ptr(), state.data_ptr()
        head["grid_barrier"], head["table"] = barrier.data_ptr(), table.data_ptr()
        head["matrices"], head["svd_blocks"] = self.count, self._svd_blocks

        def launch(
            name: str, blocks: int, threads: int, shared: int, stream: int, cooperative: bool = False
        ) -> None:
            if blocks:
                self._kernels.launch(
                    name, self._index, blocks, threads, shared, stream, arguments, cooperative
                )

        gram, sums, gram_double = self._item_counts
        head["item"] = items.data_ptr()
        with named_range("rmsgd: Gram matrices"):
            launch("rmsgd_gram", gram, _GRAM_THREADS, _gram_shared(4), streams.caller())
            head["item"] += np.uint64(gram * _ITEM.itemsize)
            launch("rmsgd_gram_sum", sums, _GRAM_THREADS, TEAM_SHARED, streams.caller())
        head["item"] += np.uint64(sums * _ITEM.itemsize)
        streams.side_waits()
        stream = streams.current()
        head["block"] = blocks.data_ptr()
        for suffix, first, count, _, waves, _, _ in self.rounds:
            itemsize, precision = _ITEMSIZES[suffix], ", fp64" if suffix else ""
            if suffix:
                with named_range(f"rmsgd: Gram matrices{precision}"):
                    tiles = int(gram_double[first : first + count].sum())
                    launch("rmsgd_gram_double", tiles, _GRAM_THREADS, _gram_shared(8), stream)
                    head["item"] += np.uint64(tiles * _ITEM.itemsize)
            with named_range(f"rmsgd: tridiagonal forms{precision}"):
                for wave in waves:
                    launch(
                        f"rmsgd_tridiagonal{suffix}",
                        wave.blocks,
                        _TRIDIAGONAL_THREADS,
                        wave.shared,
                        stream,
                        True,
                    )
                    head["block"] += np.uint64(wave.blocks * _TEAM_BLOCK.itemsize)
            with named_range(f"rmsgd: eigenvalues{precision}"), _replaced(head, "block"):
                begin, end = (int(self._part_ends[i]) for i in (first, first + count))
                head["block"] = parts.data_ptr() + begin * _TEAM_BLOCK.itemsize
                launch(f"rmsgd_sturm{suffix}", end - begin, _STURM_THREADS, _sturm_shared(itemsize), stream)
            with named_range(f"rmsgd: EVBMF{precision}"):
                head["first"] = first
                launch(f"rmsgd_measure{suffix}", count, _MEASURE_THREADS, TEAM_SHARED, stream)
        with named_range("rmsgd: SVD"):
            launch("rmsgd_svd", self._svd_blocks, _SVD_THREADS, TEAM_SHARED, stream, True)
        for tensor in (barrier, state, *self._tables):
            streams.record_stream(tensor)


@contextmanager
def _replaced(head: np.void, field: str) -> Iterator[None]:
    """A context in which a field may have another value."""
    before = head[field]
    yield
    head[field] = before


def _numbered(counts: Sequence[int]) -> NDArray[np.void]:
    """For each matrix as many blocks as asked for, numbered from 0."""
    blocks = np.zeros(sum(counts), _TEAM_BLOCK)
    blocks["matrix"] = np.repeat(np.arange(len(counts)), counts)
    blocks["block"] = np.concatenate([np.arange(count) for count in counts])
    return blocks


def _team_blocks(round_: _Round) -> NDArray[np.void]:
    blocks = _numbered([team.blocks for team in round_.teams])
    blocks["matrix"] += round_.first
    return blocks


_Items = NDArray[np.void]


def _items(
    rows: Sequence[int], widths: Sequence[int], splits: NDArray[np.int32]
) -> tuple[_Items, tuple[int, int, NDArray[np.int64]]]:
    """The blocks of the fp32 products, of the sums of their parts, and of each matrix's fp64 products.

    Args:
        rows: of the matrices.
        widths: their columns.
        splits: the parts into which their columns are cut.
    """
    tiles = [_tiles(L) for L in rows]
    products = [_gram_blocks(L) for L in rows]

    def items(chosen: Sequence[int], places: Sequence[NDArray[np.int32]], parts: Sequence[int]) -> _Items:
        blocks = []
        for i, count in zip(chosen, parts, strict=True):
            part = np.zeros((count, len(places[i])), _ITEM)
            part["matrix"] = i
            part["row_tile"], part["column_tile"] = places[i].T
            part["split"] = np.arange(count)[:, None]
            blocks.append(part.reshape(-1))
        return np.concatenate(blocks) if blocks else np.zeros(0, _ITEM)

    def longest_first(blocks: _Items) -> _Items:
        """The order in which the multiprocessors end soon after each other."""
        columns = np.asarray(widths)[blocks["matrix"]] / splits[blocks["matrix"]]
        tiles = np.where(blocks["row_tile"] == blocks["column_tile"], 1, 2)
        return blocks[np.argsort(-columns * tiles, kind="stable")]

    everything = range(len(rows))
    split = [i for i in everything if splits[i] > 1]
    kinds = (
        longest_first(items(everything, products, splits.tolist())),
        items(split, tiles, [1] * len(split)),
        items(everything, tiles, [1] * len(rows)),
    )
    return np.concatenate(kinds), (len(kinds[0]), len(kinds[1]), np.array([len(part) for part in tiles]))
