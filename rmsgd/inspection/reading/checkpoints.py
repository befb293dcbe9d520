"""Checkpoints on disk, read a tensor at a time. Nothing in them is ever executed."""

import json
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rmsgd.inspection.reading.stored import Source, StoredTensor, find_weights, stored_tensors

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")

SETTINGS = "training_args.bin"
"""What a Hugging Face Trainer calls its pickled settings: code, beside the weights of every checkpoint."""

_MOST_MISSING = 1000
"""Missing shards that are named one by one."""

RESIDENT_BYTES = 64 << 20
"""Read from mapped files before they are let go: until then, what was read counts as resident."""


class CheckpointError(ValueError):
    """A checkpoint, or a part of one, that cannot be read: one line, what and where."""


def open_checkpoint(path: str | os.PathLike[str]) -> Source:
    """The tensors of a safetensors file, a torch file, or a folder of shards.

    Formats are told by content, not by suffix. Of a folder, the shards that an index names
    ("*.index.json") are taken, else all its safetensors files, else all its torch files but a Trainer's
    settings. Torch files hold their order; safetensors files do not, and are put in natural order (layer
    2 before 10).

    What cannot be read of a folder is among the source's errors, and the rest is still there.

    Raises:
        CheckpointError: there is nothing at that path, or nothing that can be read.
    """
    files, errors = checkpoint_files(path)
    opened: list[_File] = []
    for file in files:
        try:
            opened.append(_open(file))
        except CheckpointError as error:
            errors.append(str(error))
    if errors and not opened:
        raise CheckpointError("\n".join(errors))
    return _join(opened, errors)


def checkpoint_files(path: str | os.PathLike[str]) -> tuple[list[Path], list[str]]:
    """The files that ``open_checkpoint`` reads, and which of them are missing, a line each.

    Raises:
        CheckpointError: there is nothing at that path, or nothing that could be read.
    """
    text = os.fspath(path)
    if "://" in text or text.startswith("\\\\"):
        raise CheckpointError(f"{text}: not a path on this machine; download the file first")
    try:
        here = Path(text).expanduser()
        exists = here.exists()
    except (OSError, RuntimeError) as error:  # too long a name, or nobody's home
        raise CheckpointError(f"{text}: {getattr(error, 'strerror', None) or error}") from None
    if here.name.endswith(".index.json"):
        return _of_index(here)
    if here.is_dir():
        return _of_folder(here)
    if exists:
        return [here], []
    raise CheckpointError(f"{here}: no such file or folder")


class _File(Protocol):
    """An open checkpoint file."""

    path: Path

    def tensors(self) -> Sequence[StoredTensor]: ...
    def release(self) -> None:
        """Let go of what was mapped; it is mapped anew when it is needed."""


def _join(files: Sequence[_File], errors: list[str]) -> Source:
    """The tensors of several files as one source whose resident memory stays bounded."""
    read_bytes = 0

    def read_bounded(read: Callable[[], Tensor]) -> Tensor:
        nonlocal read_bytes
        if read_bytes > RESIDENT_BYTES:
            for file in files:
                file.release()
            read_bytes = 0
        tensor = read()
        read_bytes += tensor.nbytes if tensor.layout == torch.strided else 0
        return tensor

    origin: dict[str, Path] = {}
    tensors = []
    for file in files:
        for stored in file.tensors():
            if stored.name in origin:
                if len(stored.shape) < 2:
                    continue  # no layer: a random state, which every process of a training has saved
                errors.append(
                    f"{file.path}: has {stored.name} again, after {origin[stored.name].name}: "
                    "these are not shards of one model"
                )
                break
            origin[stored.name] = file.path
            read = partial(read_bounded, stored.read)
            tensors.append(StoredTensor(stored.name, stored.shape, read, stored.skip))
    return Source(tuple(tensors), tuple(errors))


# -- folders -------------------------------------------------------------------------------------


def _of_folder(folder: Path) -> tuple[list[Path], list[str]]:
    indexes = sorted(folder.glob("*.index.json"), key=lambda p: ("safetensors" not in p.name, len(p.name)))
    if indexes:
        return _of_index(indexes[0])
    try:
        entries = sorted(folder.iterdir(), key=lambda p: natural_order(p.name))
    except OSError as error:
        raise CheckpointError(f"{folder}: {error.strerror}") from None
    files = [p for p in entries if p.suffix == ".safetensors"]
    files = files or [p for p in entries if p.suffix in TORCH_SUFFIXES and p.name != SETTINGS]
    if not files and (folder / ".metadata").exists():
        raise CheckpointError(
            f"{folder}: a distributed checkpoint; torch makes a file of it: "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} FILE"
        )
    if not files:
        suffixes = ", ".join((".safetensors", *TORCH_SUFFIXES))
        raise CheckpointError(f"{folder}: no checkpoint in this folder (none of {suffixes})")
    return files, _missing_by_number(files)


def _missing_by_number(files: Sequence[Path]) -> list[str]:
    """Shards that "-00001-of-00004" names imply and that are not there, a line each, or one for very many."""
    errors = []
    here = {p.name for p in files}
    numbered = [re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(\..*)", p.name) for p in files]
    for match in {m[1] + m[4]: m for m in numbered if m}.values():
        head, digits, of, total, tail = match.groups()
        if int(total) > len(files) + _MOST_MISSING:  # a name may say anything
            errors.append(f"{files[0].parent / match[0]}: most of its {total} shards are missing")
            continue
        names = (f"{head}{number:0{len(digits)}}{of}{total}{tail}" for number in range(1, int(total) + 1))
        errors += [f"{files[0].parent / name}: missing shard" for name in names if name not in here]
    return errors


def _of_index(index: Path) -> tuple[list[Path], list[str]]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except OSError as error:
        raise CheckpointError(f"{index}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f'{index}: not an index of shards: no "weight_map" in it') from None
    files, errors = [], []
    for name in sorted(map(str, names), key=natural_order):
        if Path(name).name != name:
            errors.append(f"{index}: names a shard outside its folder ({name})")
        elif not os.path.exists(index.parent / name):  # false too where a name is too long for a file
            errors.append(f"{index.parent / name}: missing shard (named in {index.name})")
        else:
            files.append(index.parent / name)
    return files, errors


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sorting key under which numbers inside names, however long, count as numbers."""
    parts = [(part.lstrip("0"), part.isdecimal()) for part in re.split(r"(\d+)", name)]
    return [(len(part) if number else -1, part) for part, number in parts]


# -- files ---------------------------------------------------------------------------------------


def _open(path: Path) -> _File:
    try:
        if path.is_fifo():
            raise CheckpointError(f"{path}: a pipe, and weights are read where they lie; save it to a file")
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    if not head:
        raise CheckpointError(f"{path}: empty file")
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return _SafetensorsFile(path, head)
    if head.startswith(b"PK\x03\x04"):
        return _TorchFile(path, mapped=True)
    if head.startswith(b"\x80"):
        return _TorchFile(path, mapped=False)
    raise CheckpointError(f"{path}: {_what_else(head)}, neither a safetensors nor a torch file")


def _what_else(head: bytes) -> str:
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (run git lfs pull)"
    for magic, name in ((b"\x89HDF", "an HDF5"), (b"GGUF", "a GGUF"), (b"\x93NUMPY", "a NumPy")):
        if head.startswith(magic):
            return f"{name} file"
    try:
        # A character may be cut at the end of what was read.
        head[:-4].decode("utf-8") if len(head) > 4 else head.decode("utf-8")
    except UnicodeDecodeError:
        return "an unknown format"
    return "an unknown format" if b"\0" in head else "a text file"


class _SafetensorsFile:
    def __init__(self, path: Path, head: bytes) -> None:
        self.path = path
        self._handle: Any = None
        try:
            self._map()
        except CheckpointError:
            if _what_else(head) != "an unknown format":
                raise CheckpointError(f"{path}: {_what_else(head)}, not a safetensors file") from None
            raise

    def _map(self) -> Any:
        if self._handle is None:
            import safetensors

            with _reading(self.path, "not a complete safetensors file"):
                self._handle = safetensors.safe_open(self.path, framework="pt")  # type: ignore[no-untyped-call]
        return self._handle

    def tensors(self) -> Sequence[StoredTensor]:
        handle = self._map()
        return [
            StoredTensor(name, tuple(handle.get_slice(name).get_shape()), partial(self._read, name))
            for name in sorted(handle.keys(), key=natural_order)
        ]

    def _read(self, name: str) -> Tensor:
        with _reading(self.path, f"{name} cannot be read"):
            tensor: Tensor = self._map().get_tensor(name)
        return tensor

    def release(self) -> None:
        self._handle = None


class _Inert:
    """Stands where a checkpoint names what is not a weight: it takes anything and does nothing."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


# Found in many training checkpoints beside the weights: a best accuracy, a random state, arguments.
_BESIDE_WEIGHTS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Inert, name)
    for name in (
        "argparse.Namespace",
        "numpy.dtype",
        "numpy.ndarray",
        "numpy.core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy._core.multiarray._reconstruct",
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib._local.PosixPath",
    )
]


class _TorchFile:
    """A file of ``torch.save``. One of before torch 1.6 cannot be mapped and is held in memory."""

    def __init__(self, path: Path, mapped: bool) -> None:
        self.path = path
        self._mapped = mapped
        self._weights: dict[str, Tensor] | None = None
        self._load()

    def _load(self) -> dict[str, Tensor]:
        if self._weights is None:
            with _reading(self.path, "not a complete torch file"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of pickle protocols and TorchScript: errors follow
                with torch.serialization.safe_globals(_BESIDE_WEIGHTS):
                    content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=self._mapped)
            if isinstance(content, Tensor):
                content = {"tensor": content}
            with _reading(self.path, "not a state dict"):
                self._weights = find_weights(content) if isinstance(content, Mapping) else {}
        return self._weights

    def tensors(self) -> Sequence[StoredTensor]:
        return list(stored_tensors(self._load(), self._read))

    def _read(self, name: str) -> Tensor:
        return self._load()[name]

    def release(self) -> None:
        if self._mapped:
            self._weights = None


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Turns whatever a reader raises into one line: the file, ``what`` is wrong, the reader's reason."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{path}: {_explain(error, what)}") from None


def _explain(error: Exception, what: str) -> str:
    text = re.sub(r"^\[enforce fail at [^]]*\] \. ", "", str(error).strip())
    if isinstance(error, pickle.UnpicklingError):
        code = re.search(r"GLOBAL (\S+)", text)
        if code:
            return f"refused: it holds code ({code[1]}), not only weights; save model.state_dict() instead"
        return "refused: a pickle that torch did not write"
    if "TorchScript archive" in text:
        return "refused: a TorchScript archive holds code; save model.state_dict() instead"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename else f"{what} ({error.strerror})"
    reason = text.splitlines()[0] if text else type(error).__name__
    return f"{what} ({reason.split('. ')[0]})"
