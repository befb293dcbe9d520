"""Checkpoints on disk, read a tensor at a time. Nothing in them is ever executed."""

import json
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmsgd.inspection.reading.file_format import Beginning, FileFormat, OpenFile
from rmsgd.inspection.reading.formats import FORMATS
from rmsgd.inspection.reading.natural_order import natural_order
from rmsgd.inspection.reading.networks import find_network
from rmsgd.inspection.reading.printable import printable
from rmsgd.inspection.reading.stored import (
    CheckpointError,
    NotMeasurableError,
    Source,
    StoredTensor,
    mark_tied,
)

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")

CHECKPOINT_SUFFIXES = tuple(suffix for format_ in FORMATS for suffix in format_.suffixes)
"""The suffixes of files that are read."""

SETTINGS = "training_args.bin"
"""The name of a Hugging Face Trainer's pickled settings: code, beside the weights of every checkpoint."""

MODEL_SETTINGS = ("config.json", "quantize_config.json", "quant_config.json")
"""The files in a model's folder that say how its weights are packed."""

_MOST_SETTINGS = 16 << 20
_MOST_MISSING = 1000
"""The most missing shards that are named one by one."""

RESIDENT_BYTES = 64 << 20
"""Bytes to read from mapped files before they are unmapped. Until then these bytes are resident."""


def open_checkpoint(path: str | os.PathLike[str], key: str | None = None) -> Source:
    """The tensors of a checkpoint file of any known format, or of a folder of shards.

    Formats are recognised by content, not by suffix. In a folder, the shards that an index names
    ("*.index.json") are read, else all its safetensors files, else all its torch files but a Trainer's
    settings. Torch files keep their order. safetensors files have none, so their tensors are put in natural
    order (layer 2 before 10). ``networks.find_network`` chooses the network of a file.

    Files of a folder that cannot be read are among the source's errors, and the rest is read.

    Raises:
        CheckpointError: there is nothing at that path, or nothing that can be read.
    """
    files, errors = checkpoint_files(path)
    opened: list[_File] = []
    for file in files:
        try:
            opened.append(_open(file, file, key))
        except CheckpointError as error:
            errors.append(str(error))
    if errors and not opened:
        raise CheckpointError("\n".join(errors))
    return _join(opened, errors)


def checkpoint_files(path: str | os.PathLike[str]) -> tuple[list[Path], list[str]]:
    """The files that ``open_checkpoint`` reads, and a line for each that is missing.

    Raises:
        CheckpointError: there is nothing at that path, or nothing that could be read.
    """
    text = os.fspath(path)
    if not text:  # a shell's variable that is not set, and not the current folder
        raise CheckpointError("the path is empty")
    if "://" in text or text.startswith("\\\\"):
        raise CheckpointError(f"{text}: not a path on this machine; download the file first")
    try:
        here = Path(text).expanduser()
        exists = here.exists()
    except (OSError, RuntimeError) as error:  # the name is too long, or ~ has no home folder
        raise CheckpointError(f"{text}: {getattr(error, 'strerror', None) or error}") from None
    if here.name.endswith(".index.json"):
        return _of_index(here)
    if here.is_dir():
        return _of_folder(here)
    if exists:
        return [here], []
    if here.is_symlink():
        raise CheckpointError(f"{here}: a link to {printable(os.readlink(here))}, which leads to no file")
    raise CheckpointError(f"{here}: no such file or folder")


# -- files ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """An open file, with the tensors of the network that is read from it."""

    path: Path
    tensors: Sequence[StoredTensor]
    notes: tuple[str, ...]
    metadata: Mapping[str, Any]
    release: Callable[[], None]


def _open(path: Path, shown: Path, key: str | None) -> _File:
    """Open a file, which messages call ``shown``."""
    try:
        if path.is_fifo():
            raise CheckpointError(f"{shown}: a pipe, and weights are read where they lie; save it to a file")
        beginning = Beginning(path)
    except OSError as error:
        raise CheckpointError(f"{shown}: {error.strerror}") from None
    if not beginning.bytes:
        raise CheckpointError(f"{shown}: empty file")
    format_ = _format_of(beginning, shown)
    if format_.unpack is not None:
        return _unpack(path, shown, key, format_)
    if format_.open is None:
        advice = f"; {format_.advice}" if format_.advice else ""
        raise CheckpointError(f"{shown}: {format_.name}, which is not read{advice}")
    with _reading(shown, f"not a complete {_without_article(format_.name)}"):
        opened = format_.open(path)
    with _reading(shown, "not a state dict"):
        return _file(shown, opened, key)


def _format_of(beginning: Beginning, shown: Path) -> FileFormat:
    """The format of a file, by its content, else by its suffix.

    Raises:
        CheckpointError: no format fits.
    """
    for format_ in FORMATS:
        if format_.is_this(beginning):
            return format_
    what = _what_else(beginning.bytes)
    named = next((f for f in FORMATS if shown.name.lower().endswith(f.suffixes or ("/",))), None)
    if named is None or what == "a text file":
        wanted = f"not {named.name}" if named else "none of a checkpoint"
        raise CheckpointError(f"{shown}: {what}, {wanted}")
    return named


def _file(path: Path, opened: OpenFile, key: str | None) -> _File:
    tree = {"tensor": opened.tree} if isinstance(opened.tree, StoredTensor) else opened.tree
    found = find_network(tree, key)
    tensors = [
        replace(stored, read=partial(_read, path, stored)) for stored in mark_tied(found.tensors.values())
    ]
    return _File(path, tensors, found.notes, opened.metadata, opened.release)


def _read(path: Path, stored: StoredTensor) -> Tensor:
    with _reading(path, f"{stored.name} cannot be read"):
        return stored.read()


class _TemporaryFolder:
    """A folder that is deleted, without a warning, when nothing refers to this object any more."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="rmsgd-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _unpack(path: Path, shown: Path, key: str | None, format_: FileFormat) -> _File:
    """The file inside a compressed one, unpacked into a temporary file that lives as long as the tensors."""
    assert format_.unpack is not None
    if path != shown:
        raise CheckpointError(f"{shown}: {format_.name} inside another")
    temporary = _TemporaryFolder()
    inner = temporary.path / "unpacked"
    with _reading(shown, f"not a complete {_without_article(format_.name)}"), inner.open("wb") as target:
        for block in format_.unpack(path):
            target.write(block)
    opened = _open(inner, shown, key)

    def keep(read: Callable[[], Tensor], _: object = temporary) -> Tensor:
        return read()

    return replace(
        opened, tensors=[replace(x, read=partial(keep, x.read, temporary)) for x in opened.tensors]
    )


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
        for stored in file.tensors:
            if stored.name in origin:
                if len(stored.shape) < 2:
                    continue  # not a layer, but a random state, which every process of a training has saved
                errors.append(
                    f"{file.path}: has {printable(stored.name)} again, after {origin[stored.name].name}: "
                    "these are not shards of one model"
                )
                break
            origin[stored.name] = file.path
            tensors.append(replace(stored, read=partial(read_bounded, stored.read)))
    notes = dict.fromkeys(note for file in files for note in file.notes)
    settings = {key: value for file in files for key, value in file.metadata.items()}
    for folder in {file.path.parent: None for file in files}:
        settings.update(_settings_in(folder))
    return Source(tuple(tensors), tuple(errors), tuple(notes), settings)


def _settings_in(folder: Path) -> dict[str, Any]:
    """The settings in a model's folder; empty where there are none that can be read."""
    settings: dict[str, Any] = {}
    for name in MODEL_SETTINGS:
        file = folder / name
        try:
            if file.is_file() and file.stat().st_size <= _MOST_SETTINGS:
                settings[name] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
    return settings


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
        others = [p.name for p in entries if p.name.endswith(CHECKPOINT_SUFFIXES)]
        instead = f"; give the file itself ({others[0]})" if others else ""
        raise CheckpointError(f"{folder}: no checkpoint in this folder (none of {suffixes}){instead}")
    return files, _missing_by_number(files)


def _missing_by_number(files: Sequence[Path]) -> list[str]:
    """A line for each missing shard that names like "-00001-of-00004" imply, or one line for very many."""
    errors = []
    here = {p.name for p in files}
    numbered = [re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(\..*)", p.name) for p in files]
    for match in {m[1] + m[4]: m for m in numbered if m}.values():
        head, digits, of, total, tail = match.groups()
        if int(total) > len(files) + _MOST_MISSING:  # a name may contain any number
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
            errors.append(f"{index}: names a shard outside its folder ({printable(name)})")
        elif not os.path.exists(index.parent / name):  # this is also False for a name too long for a file
            errors.append(f"{index.parent / printable(name)}: missing shard (named in {index.name})")
        else:
            files.append(index.parent / name)
    return files, errors


# -- messages ------------------------------------------------------------------------------------


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Turns whatever a reader raises into one line: the file, ``what`` is wrong, and the reader's reason."""
    try:
        yield
    except NotMeasurableError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path}: {printable(_explain(error, what))}") from None


def _explain(error: Exception, what: str) -> str:
    text = str(error).strip()
    if isinstance(error, CheckpointError) and text.startswith(("refused", "no weights")):
        return text
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename else f"{what} ({error.strerror})"
    reason = text.splitlines()[0] if text else type(error).__name__
    return f"{what} ({reason if isinstance(error, CheckpointError) else reason.split('. ')[0]})"


def _without_article(name: str) -> str:
    return name.partition(" ")[2]


def _what_else(head: bytes) -> str:
    """A description of a file that no format recognises."""
    if head.startswith(b"PK\x03\x04"):
        return "a zip archive that is cut short"
    try:
        # A character may be cut at the end of what was read.
        head[:-4].decode("utf-8") if len(head) > 4 else head.decode("utf-8")
    except UnicodeDecodeError:
        return "an unknown format"
    return "an unknown format" if b"\0" in head else "a text file"
