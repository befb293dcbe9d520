"""The memory of parameters: in a form that kernels take, apart from each other, and not moved since."""

import math
import sys
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from rmsgd.backends.base import is_aligned
from rmsgd.optim.distributed import is_dtensor, local

try:
    from rmsgd import _cpu
except ImportError:  # installed without a compiler
    _cpu = None  # type: ignore[assignment]


class Layouts:
    """Address, dtype, sizes and strides of some tensors; for a DTensor, those of this rank's part.

    Every step checks them, so the compiled core does it where it can: 160 tensors cost Python 60 us, and the
    core 10.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._compiled: _cpu.Layouts | None = None
        if _cpu is not None and not any(map(is_dtensor, tensors)):
            with suppress(ValueError):  # an older torch, or a tensor without memory
                self._compiled = _cpu.Layouts(Tensor, self._tensors)
        if self._compiled is None:
            self._known = self._now()

    def hold(self) -> bool:
        """Whether none of them has changed."""
        if self._compiled is not None:
            return self._compiled.hold(self._tensors)
        return self._known == self._now()

    def _now(self) -> list[tuple[int, torch.dtype, torch.Size, tuple[int, ...]]]:
        return [(p.data_ptr(), p.dtype, p.shape, p.stride()) for p in map(local, self._tensors)]


def has_memory(tensor: Tensor) -> bool:
    """Whether the elements of a tensor of any shape lie at an address; a subclass may compute them."""
    if tensor.numel() == 0 or tensor.is_meta or is_dtensor(tensor) or is_fake(tensor):
        return True
    try:
        return tensor.data_ptr() != 0
    except RuntimeError:
        return False


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor is one of FakeTensorMode, which has a shape and a device but no values."""
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    return fake is not None and isinstance(tensor, fake.FakeTensor)


def bytes_spanned(tensor: Tensor) -> int:
    """The bytes from the first element of a tensor of any shape with elements to the end of its last one."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def extent(tensor: Tensor) -> tuple[int, int]:
    """The first address of a tensor of any shape with elements, and the one behind its last, in bytes."""
    return tensor.data_ptr(), tensor.data_ptr() + bytes_spanned(tensor)


def dense_forms(parameters: Sequence[Tensor]) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """The parameters in a form that kernels take, and (parameter, copy) for each with gaps or misaligned."""
    dense, copies = [], []
    for p in parameters:
        like = torch.empty_like(p, memory_format=torch.preserve_format)
        as_it_is = like.stride() == p.stride() and is_aligned(p)
        if not as_it_is:
            copies.append((p, like))
        dense.append(p if as_it_is else like)
    return dense, copies


def check_apart(parameters: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raise RuntimeError, with names, for parameters that share memory, since all are stepped at once."""
    extents = [(*extent(p), i) for i, p in enumerate(parameters) if p.numel() and not p.is_meta]
    clusters: list[list[int]] = []  # parameters whose extents overlap
    reach = 0
    for begin, end, i in sorted(extents):
        if begin >= reach:
            clusters.append([])
        clusters[-1].append(i)
        reach = max(reach, end)
    for cluster in clusters:
        pair = _first_to_share([parameters[i] for i in cluster]) if len(cluster) > 1 else None
        if pair is not None:
            first, second = (names[i] for i in sorted(cluster[k] for k in pair))
            raise RuntimeError(
                f"{first} and {second} share memory: give RMSGD one of them, or tie the "
                "modules by one Parameter (a.weight = b.weight)"
            )


def _first_to_share(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """Two tensors with a byte in common; the columns of a matrix have none, though their extents overlap."""
    first = min(t.data_ptr() for t in tensors)
    unit = math.gcd(*(n for t in tensors for n in (t.data_ptr() - first, t.element_size())))
    owner = torch.zeros((max(extent(t)[1] for t in tensors) - first) // unit, dtype=torch.int32, device="cpu")
    for k, t in enumerate(tensors):
        of_element = t.element_size() // unit
        strides = [stride * of_element for stride in t.stride()]
        mine = owner.as_strided((*t.shape, of_element), (*strides, 1), (t.data_ptr() - first) // unit)
        if mine.any():
            return int(mine.max()) - 1, k
        mine.fill_(k + 1)
    return None
