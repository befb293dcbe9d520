"""Images in class folders, `train/CLASS/IMAGE` and `test/CLASS/IMAGE`, on the disk or in a zip archive.

An archive is decoded once and kept as bytes.
"""

import hashlib
import io
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path, PurePosixPath

import numpy as np
import safetensors.torch
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open

from bench import atomic
from bench.data.dataset import DataSet, Request
from bench.data.source import Augmentation, DatasetError
from bench.data.split import Images, Parts
from bench.locks import locked

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}
LAYOUT = "train/CLASS/IMAGE and test/CLASS/IMAGE or val/CLASS/IMAGE, as folders or in a zip archive"
FORMAT = "1"
"""The version of the decoded file's format. When it changes, archives are decoded anew."""

Content = Callable[[str], bytes]
"""A function that reads the file of a name."""

Ordered = dict[str, list[tuple[str, int]]]
"""From a split ("train", "test") to its images with their classes, in the order of reading."""


def is_archive(path: Path) -> bool:
    """Whether a path is treated as a zip archive."""
    return path.suffix.lower() == ".zip" or path.is_file()


def read(request: Request) -> Parts:
    """The images of a folder or an archive.

    The classes of a split take turns (the first image of every class, then the second, ...), so that its
    first images, however many, are spread evenly over the classes.

    Raises:
        DatasetError: the path is not in `LAYOUT`, a class of the test set is not in the training set, an
            archive is damaged or cut, or an image cannot be decoded.
        OSError: the images cannot be read, or the decoded ones cannot be written.

    """
    path = request.path
    if is_archive(path):
        train, test, classes = _archive(path, request.size, request.cache)
        return first(train, request.limit), first(test, request.limit), classes
    if not path.is_dir():
        raise DatasetError(f"{path} is not a folder")
    names = [str(file.relative_to(path)) for split in SPLITS for file in sorted(path.glob(f"{split}/*/*"))]
    classes, order = _listed(path, names)
    order = {split: images[: request.limit] for split, images in order.items()}
    parts = _decoded(path, order, lambda name: (path / name).read_bytes(), request.size, bar=False)
    return parts["train"], parts["test"], classes


SPLITS = ("train", "test", "val")


def first(images: Images, limit: int | None) -> Images:
    """The first `limit` images with their classes; None: all."""
    return images[0][:limit], images[1][:limit]


def _sizes(path: Path) -> tuple[int, int]:
    if is_archive(path):
        with _opened(path) as archive:
            names = archive.namelist()
    else:
        names = [str(file.relative_to(path)) for split in SPLITS for file in path.glob(f"{split}/*/*")]
    order = _listed(path, names)[1]
    return len(order["train"]), len(order["test"])


def _recognises(path: Path) -> bool:
    held_out = any((path / name).is_dir() for name in SPLITS[1:])
    return is_archive(path) or ((path / "train").is_dir() and held_out)


# -- files and classes ---------------------------------------------------------------------------------


def _listed(path: Path, names: Sequence[str]) -> tuple[int, Ordered]:
    """The number of classes, and the images of each split with the classes taking turns."""
    found: dict[str, dict[str, list[str]]] = {}
    roots = set()
    for name in names:
        parts = PurePosixPath(name).parts
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
        if name.endswith("/") or hidden or PurePosixPath(name).suffix.lower() not in SUFFIXES:
            continue
        if len(parts) < 3 or parts[-3] not in SPLITS:
            raise DatasetError(f"{path} holds the image {name}, which is not in {LAYOUT}")
        roots.add(parts[:-3])
        found.setdefault(parts[-3], {}).setdefault(parts[-2], []).append(name)
    if len(roots) > 1:
        first, second = ("/".join(root) or "the top" for root in sorted(roots)[:2])
        raise DatasetError(f"{path} holds more than one data set: one in {first}, another in {second}")
    held_out = "test" if "test" in found else "val"
    for split in ("train", held_out):
        if split not in found:
            there = " and ".join(sorted(found)) or "no image"
            raise DatasetError(f"{path} holds {there}, but no {split}/CLASS/IMAGE")
    labels = sorted(found["train"])
    if unknown := found[held_out].keys() - set(labels):
        raise DatasetError(f"{path}: {held_out} has the class {min(unknown)}, which train has not")
    return len(labels), {
        name: _in_turn([sorted(found[split].get(label, ())) for label in labels])
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


def _decoded(
    path: Path, order: Ordered, content: Content, size: tuple[int, int], bar: bool
) -> dict[str, Images]:
    """The images of each split as bytes, with a progress bar if `bar`."""
    total = sum(map(len, order.values()))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    found = {}
    with Progress(*columns, console=Console(stderr=True), disable=not bar) as progress:
        task = progress.add_task(f"decoding {path.name}", total=total)
        for split, images in order.items():
            pixels = torch.empty(len(images), 3, *size, dtype=torch.uint8)
            for index, (name, _) in enumerate(images):
                pixels[index] = torch.from_numpy(_image(path, name, content(name), size))
                progress.advance(task)
            found[split] = (pixels, torch.tensor([target for _, target in images]))
    return found


def _image(path: Path, name: str, content: bytes, size: tuple[int, int]) -> np.ndarray:
    """An image as uint8 (3, height, width)."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as image:
            pixels = image.convert("RGB")
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{path}: {name} is not an image that can be read: {error}") from error
    if pixels.size != (size[1], size[0]):
        pixels = pixels.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.array(pixels).transpose(2, 0, 1)


# -- archives ------------------------------------------------------------------------------------------


def _archive(path: Path, size: tuple[int, int], cache: Path | None) -> Parts:
    """The images of an archive.

    The cache has one file per archive and size, which is named after the archive's content. Processes that
    share a cache decode an archive once, and one that is killed leaves no incomplete file that another would
    use.
    """
    if not path.is_file():
        raise DatasetError(f"{path} is missing" if not path.exists() else f"{path} is not a file")
    if cache is None:
        with tempfile.TemporaryDirectory() as folder:
            return _archive(path, size, Path(folder))
    kept = cache / f"{path.stem}-{_digest(path)[:16]}-{size[0]}x{size[1]}.safetensors"
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache, wait=True, name=f".{kept.name}.lock"):
        found = _load(kept)
        if found is None:
            atomic.write(kept, _unpacked(path, size))
            found = _load(kept)
    if found is None:
        raise DatasetError(f"{kept} is not what was just written there: is the disk sound?")
    return found


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load(path: Path) -> Parts | None:
    """The decoded images; None where the file is missing or of another version."""
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


def _unpacked(path: Path, size: tuple[int, int]) -> bytes:
    """The bytes of the decoded file of an archive."""
    with _opened(path) as archive:

        def content(name: str) -> bytes:
            try:
                return archive.read(name)
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
                # The content does not match its checksum, Python lacks the method, or there is a password.
                raise DatasetError(f"{path}: {name} cannot be unpacked: {error}") from error

        classes, order = _listed(path, archive.namelist())
        parts = _decoded(path, order, content, size, bar=True)
    tensors = {
        f"{split}.{what}": tensor
        for split, images in parts.items()
        for what, tensor in zip(("images", "targets"), images, strict=True)
    }
    return safetensors.torch.save(tensors, {"format": FORMAT, "classes": str(classes)})


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:  # a cut archive has lost its table of contents
        raise DatasetError(f"{path} is not a zip archive, or is cut: {error}") from error


DATASETS = {
    "images": DataSet(
        read,
        layout=LAYOUT,
        recognises=_recognises,
        sizes=_sizes,
        augmentation=Augmentation(pad=4, flip=True),
    )
}
