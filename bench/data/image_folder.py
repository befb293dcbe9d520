"""Image sets that are on the disk already: CIFAR's binary files, or one folder per class."""

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bench.errors import UsageError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}
LAYOUTS = (
    "data_batch_1.bin to data_batch_5.bin and test_batch.bin (CIFAR-10, binary version), "
    "train.bin and test.bin (CIFAR-100, binary version), "
    "or train/CLASS/IMAGE and test/CLASS/IMAGE or val/CLASS/IMAGE"
)
PIXELS = 3 * 32 * 32

Images = tuple[Tensor, Tensor]
"""uint8 (n, 3, height, width) and int64 (n,)."""


def read(folder: Path, size: tuple[int, int], limit: int | None) -> tuple[Images, Images, int]:
    """Training images, test images and the number of classes.

    Args:
        folder: in one of `LAYOUTS`.
        size: (height, width) that images of a folder per class are brought to.
        limit: most images to read of each split; None reads all.

    Raises:
        UsageError: the folder has none of the layouts, or its files are not what they claim.

    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    names = {entry.name for entry in folder.iterdir()}
    if "test_batch.bin" in names:
        parts = [folder / f"data_batch_{index}.bin" for index in range(1, 6)]
        train, test, classes = _cifar(parts, 1), _cifar([folder / "test_batch.bin"], 1), 10
    elif {"train.bin", "test.bin"} <= names:
        train, test, classes = _cifar([folder / "train.bin"], 2), _cifar([folder / "test.bin"], 2), 100
    elif "train" in names and names & {"test", "val"}:
        held_out = folder / ("test" if "test" in names else "val")
        labels = sorted(entry.name for entry in (folder / "train").iterdir() if entry.is_dir())
        train = _class_folders(folder / "train", labels, size, limit)
        test = _class_folders(held_out, labels, size, limit)
        classes = len(labels)
    else:
        raise UsageError(f"{folder} holds no images that are known here: expected {LAYOUTS}")
    for path, (_, targets) in (("training", train), ("test", test)):
        if targets.max() >= classes:
            raise UsageError(f"{folder}: a {path} label is {targets.max()}, of {classes} classes")
    return _first(train, limit), _first(test, limit), classes


def sizes(folder: Path) -> tuple[int, int]:
    """How many training and test images there are in a folder that `read` accepts."""

    def records(pattern: str, labels: int) -> int:
        return sum(path.stat().st_size // (labels + PIXELS) for path in folder.glob(pattern))

    def files(split: str) -> int:
        return sum(path.suffix.lower() in SUFFIXES for path in folder.glob(f"{split}/*/*"))

    train = records("data_batch_*.bin", 1) + records("train.bin", 2) + files("train")
    test = records("test_batch.bin", 1) + records("test.bin", 2)
    return train, test + files("test" if (folder / "test").is_dir() else "val")


def _first(images: Images, limit: int | None) -> Images:
    return images[0][:limit], images[1][:limit]


def _cifar(files: list[Path], labels: int) -> Images:
    images, targets = [], []
    for path in files:
        if not path.is_file():
            raise UsageError(f"{path} is missing")
        pixels, classes = decode_cifar(np.fromfile(path, dtype=np.uint8), labels, str(path))
        images.append(pixels)
        targets.append(classes)
    return torch.cat(images), torch.cat(targets)


def decode_cifar(content: npt.NDArray[np.uint8], labels: int, name: str) -> Images:
    """Records of `labels` label bytes, the last of which counts, and 3x32x32 pixels.

    Raises:
        UsageError: the bytes of the file called `name` are not whole records, or there is none.

    """
    record = labels + PIXELS
    if content.size == 0 or content.size % record:
        raise UsageError(f"{name} is no CIFAR file: {content.size} bytes are not records of {record}")
    records = content.reshape(-1, record)
    pixels = torch.from_numpy(records[:, labels:].reshape(-1, 3, 32, 32).copy())
    return pixels, torch.from_numpy(records[:, labels - 1].astype(np.int64))


def _class_folders(folder: Path, labels: list[str], size: tuple[int, int], limit: int | None) -> Images:
    from PIL import Image, UnidentifiedImageError

    pixels, targets = [], []
    for path, target in _in_turn(folder, labels, limit):
        try:
            with Image.open(path) as image:
                resized = image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BILINEAR)
        except (OSError, UnidentifiedImageError) as error:
            raise UsageError(f"{path} is not an image: {error}") from error
        pixels.append(torch.from_numpy(np.asarray(resized).transpose(2, 0, 1).copy()))
        targets.append(target)
    if not targets:
        raise UsageError(f"{folder} holds no image in a folder named after a class of train/")
    return torch.stack(pixels), torch.tensor(targets)


def _in_turn(folder: Path, labels: list[str], limit: int | None) -> Iterator[tuple[Path, int]]:
    """Images with their class: the first of every class, then the second, ... at most `limit`."""
    files = [
        sorted(path for path in (folder / label).glob("*") if path.suffix.lower() in SUFFIXES)
        for label in labels
    ]
    chosen = [
        (path, target)
        for paths in zip_longest(*files)
        for target, path in enumerate(paths)
        if path is not None
    ]
    yield from chosen[:limit]
