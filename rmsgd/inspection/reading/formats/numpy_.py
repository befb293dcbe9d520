"""NumPy's files: .npz, a zip archive of arrays, and .npy, a single one."""

import io
import math
import warnings
from functools import partial
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from torch import Tensor

from rmsgd.inspection.reading.archives import Archive
from rmsgd.inspection.reading.file_format import Beginning, FileFormat, OpenFile, read_range
from rmsgd.inspection.reading.stored import (
    CheckpointError,
    NotMeasurableError,
    StoredTensor,
    as_tensor,
    not_there,
)
from rmsgd.inspection.reading.torch_pickles import ReadBytes

_HEADER_BYTES = 1 << 16


def _is_archive(file: Beginning) -> bool:
    return bool(file.members) and all(name.endswith(".npy") for name in file.members)


def _is_array(file: Beginning) -> bool:
    return file.bytes.startswith(b"\x93NUMPY")


def _open_archive(path: Path) -> OpenFile:
    archive = Archive(path)
    tree = {}
    for name in archive.members:
        shown = name.removesuffix(".npy")
        tree[shown] = _array(shown, archive.size(name), partial(archive.read_range, name))
    return OpenFile(tree)


def _open_array(path: Path) -> OpenFile:
    return OpenFile({"array": _array("array", path.stat().st_size, partial(read_range, path))})


def _array(name: str, size: int, read: ReadBytes) -> StoredTensor:
    """The array of an .npy file. It has no numbers if its header is of another version or names objects."""
    header = io.BytesIO(read(0, min(size, _HEADER_BYTES)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy warns of headers that Python 2 wrote
        version = npy.read_magic(header)
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read_header(header)
    start, count = header.tell(), math.prod(shape) * dtype.itemsize
    if dtype.hasobject:
        return StoredTensor(name, shape, not_there, "an array of Python objects")
    if min(shape, default=0) < 0:
        raise CheckpointError(f"{name} has the impossible shape {shape}")

    def read_tensor() -> Tensor:
        if start + count > size:
            raise CheckpointError("the array is cut short")
        flat = np.frombuffer(read(start, count), dtype)
        tensor = as_tensor(flat.reshape(shape, order="F" if fortran else "C"))
        return tensor.permute(-1, -2, *range(tensor.ndim - 2)) if kernel else tensor

    kernel = name.rpartition("/")[2] == "kernel" and len(shape) in (4, 5)
    # Flax and Keras keep a convolution's channels last: (*k, i, o).
    shown = (shape[-1], shape[-2], *shape[:-2]) if kernel else shape
    try:
        dtype_of_torch = as_tensor(np.empty(0, dtype)).dtype if dtype.kind in "fiub" else None
    except NotMeasurableError as reason:
        return StoredTensor(name, shown, not_there, str(reason))
    return StoredTensor(name, shown, read_tensor, dtype=dtype_of_torch)


FORMATS = [
    FileFormat("a NumPy archive", _is_archive, _open_archive, suffixes=(".npz",)),
    FileFormat("a NumPy array", _is_array, _open_array, suffixes=(".npy",)),
]
