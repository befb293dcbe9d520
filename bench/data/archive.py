"""A zip archive of class folders, `train/CLASS/IMAGE` and `test/CLASS/IMAGE`, decoded once and kept."""

import hashlib
import io
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path, PurePosixPath

import numpy as np
import safetensors.torch
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bench import atomic
from bench.data.image_folder import SUFFIXES, Images
from bench.data.source import DatasetError
from bench.locks import locked

LAYOUT = "a zip archive of train/CLASS/IMAGE and test/CLASS/IMAGE or val/CLASS/IMAGE"
FORMAT = "1"
"""Of the decoded file: another number, and an archive is decoded anew."""

Files = dict[str, list[list[str]]]
"""Split ("train", "test") to the images of every class, in the order of their names."""


def read(path: Path, size: tuple[int, int], cache: Path | None) -> tuple[Images, Images, int]:
    """Training images, test images and the number of classes.

    The classes of a split take turns (the first image of every class, then the second, ...), so that any
    first part of it has about as many images of each.

    Args:
        path: the archive.
        size: (height, width) that the images are brought to.
        cache: folder for the decoded images, one file per archive and size, named after the archive's
            content. Processes that share it decode an archive once, and one that is killed leaves no
            file that another would take for whole. None decodes every time.

    Raises:
        DatasetError: the file is no zip archive or is cut, its folders are not those of `LAYOUT`, a class
            of the test set is not in the training set, or an image cannot be decoded.
        OSError: the archive cannot be read, or the decoded images cannot be written.

    """
    if not path.is_file():
        raise DatasetError(f"{path} is missing" if not path.exists() else f"{path} is not a file")
    if cache is None:
        with tempfile.TemporaryDirectory() as folder:
            return read(path, size, Path(folder))
    decoded = cache / f"{path.stem}-{_digest(path)[:16]}-{size[0]}x{size[1]}.safetensors"
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache, wait=True, name=f".{decoded.name}.lock"):
        found = _load(decoded)
        if found is None:
            atomic.write(decoded, _decoded(path, size))
            found = _load(decoded)
    if found is None:
        raise DatasetError(f"{decoded} is not what was just written there: is the disk sound?")
    return found


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load(path: Path) -> tuple[Images, Images, int] | None:
    """The decoded images; None where there is no such file, or none that this version wrote."""
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                return None
            train, test = (
                (file.get_tensor(f"{split}.images"), file.get_tensor(f"{split}.targets"))
                for split in ("train", "test")
            )
            return train, test, int(about["classes"])
    except (FileNotFoundError, SafetensorError):
        return None


def _decoded(path: Path, size: tuple[int, int]) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            labels, files = _listed(path, archive.namelist())
            total = sum(len(names) for split in files.values() for names in split)
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
                task = progress.add_task(f"decoding {path.name}", total=total)
                tensors: dict[str, Tensor] = {}
                for split, of_class in files.items():
                    order = _in_turn(of_class)
                    images = torch.empty(len(order), 3, *size, dtype=torch.uint8)
                    for index, (name, _) in enumerate(order):
                        images[index] = torch.from_numpy(_image(path, archive, name, size))
                        progress.advance(task)
                    tensors[f"{split}.images"] = images
                    tensors[f"{split}.targets"] = torch.tensor([target for _, target in order])
    except zipfile.BadZipFile as error:  # a cut archive has lost its table of contents
        raise DatasetError(f"{path} is no zip archive, or is cut: {error}") from error
    return safetensors.torch.save(tensors, {"format": FORMAT, "classes": str(len(labels))})


def _listed(path: Path, names: Sequence[str]) -> tuple[list[str], Files]:
    """The classes, and the images of each split by class."""
    found: dict[str, dict[str, list[str]]] = {}
    roots = set()
    for name in names:
        parts = PurePosixPath(name).parts
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
        if name.endswith("/") or hidden or PurePosixPath(name).suffix.lower() not in SUFFIXES:
            continue
        if len(parts) < 3 or parts[-3] not in ("train", "test", "val"):
            raise DatasetError(f"{path} holds the image {name}, which is not in {LAYOUT}")
        roots.add(parts[:-3])
        found.setdefault(parts[-3], {}).setdefault(parts[-2], []).append(name)
    if len(roots) > 1:
        first, second = ("/".join(root) or "the top" for root in sorted(roots)[:2])
        raise DatasetError(f"{path} holds more than one data set: one in {first}, another in {second}")
    if {"test", "val"} <= found.keys():
        raise DatasetError(f"{path} has both test and val: which to judge by is not known")
    held_out = "test" if "test" in found else "val"
    for split in ("train", held_out):
        if split not in found:
            there = " and ".join(sorted(found)) or "no image"
            raise DatasetError(f"{path} holds {there}, but no {split}/CLASS/IMAGE")
    labels = sorted(found["train"])
    if unknown := found[held_out].keys() - set(labels):
        raise DatasetError(f"{path}: {held_out} has the class {min(unknown)}, which train has not")
    return labels, {
        name: [sorted(found[split].get(label, ())) for label in labels]
        for name, split in (("train", "train"), ("test", held_out))
    }


def _in_turn(of_class: Sequence[Sequence[str]]) -> list[tuple[str, int]]:
    """Images with their class: the first of every class, then the second, ..."""
    return [
        (name, target)
        for names in zip_longest(*of_class)
        for target, name in enumerate(names)
        if name is not None
    ]


def _image(path: Path, archive: zipfile.ZipFile, name: str, size: tuple[int, int]) -> np.ndarray:
    """An image as uint8 (3, height, width)."""
    from PIL import Image, UnidentifiedImageError

    try:
        content = archive.read(name)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        # Another content than the archive's checksum says, a method that Python lacks, or a password.
        raise DatasetError(f"{path}: {name} cannot be unpacked: {error}") from error
    try:
        with Image.open(io.BytesIO(content)) as image:
            pixels = image.convert("RGB")
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{path}: {name} is not an image that can be read: {error}") from error
    if pixels.size != (size[1], size[0]):
        pixels = pixels.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.array(pixels).transpose(2, 0, 1)
