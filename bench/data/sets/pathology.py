"""MHIST and ADP, the two pathology data sets: a table of labels beside a folder of images."""

import csv
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.data.dataset import DataSet
from bench.data.source import Augmentation, DatasetError
from bench.data.split import Parts

MHIST = (
    "annotations.csv (columns Image Name, Majority Vote Label of HP or SSA, Partition of train or test: "
    "2,175 and 977 images) and the folder images, from https://bmirds.github.io/MHIST"
)
ADP = (
    "ADP_EncodedLabels_Release1_Flat.csv (column Patch Names, then one of 0 and 1 for each label), the "
    "folder img_res_1um_bicubic, and splits/train.npy and splits/test.npy with row numbers of it, from "
    "https://www.dsp.utoronto.ca/projects/ADP"
)


def mhist(folder: Path, size: tuple[int, int]) -> Parts:
    """MHIST: 0 for hyperplastic polyps (HP), 1 for sessile serrated adenomas (SSA).

    Raises:
        DatasetError: a file, column or image is missing, or a label is neither.

    """
    rows = _table(folder / "annotations.csv", ("Image Name", "Majority Vote Label", "Partition"))
    if unknown := {row["Partition"] for row in rows} - {"train", "test"}:
        raise DatasetError(
            f"{folder / 'annotations.csv'}: a partition is {min(unknown)!r}, not train or test"
        )
    parts = []
    for split in ("train", "test"):
        mine = [row for row in rows if row["Partition"] == split]
        labels = [row["Majority Vote Label"] for row in mine]
        if not mine or not set(labels) <= {"HP", "SSA"}:
            raise DatasetError(f"{folder / 'annotations.csv'}: the {split} labels are {sorted(set(labels))}")
        targets = torch.tensor([int(label == "SSA") for label in labels])
        parts.append((_images([folder / "images" / row["Image Name"] for row in mine], size), targets))
    return parts[0], parts[1], 2


def adp(folder: Path, size: tuple[int, int]) -> Parts:
    """ADP with all labels of its table; targets are float32 (n, labels) of zeros and ones.

    Raises:
        DatasetError: a file, column or image is missing, or a label is neither 0 nor 1.

    """
    path = folder / "ADP_EncodedLabels_Release1_Flat.csv"
    rows = _table(path, ("Patch Names",))
    labels = [name for name in rows[0] if name != "Patch Names"]
    try:
        table = torch.tensor([[float(row[label]) for label in labels] for row in rows])
    except ValueError as error:
        raise DatasetError(f"{path}: {error}") from error
    if not labels or not ((table == 0) | (table == 1)).all():
        raise DatasetError(f"{path}: labels must be 0 or 1")
    parts = []
    for split in ("train", "test"):
        chosen = _rows(folder / "splits" / f"{split}.npy", len(rows))
        files = [folder / "img_res_1um_bicubic" / rows[index]["Patch Names"] for index in chosen]
        parts.append((_images(files, size), table[chosen]))
    return parts[0], parts[1], len(labels)


def _table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    if not path.is_file():
        raise DatasetError(f"{path} is missing")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or ()
            if missing := [name for name in columns if name not in names]:
                raise DatasetError(f"{path} has no column {', '.join(missing)}")
            rows = []
            for row in reader:
                # Surplus values stand under the key None, and missing ones are None.
                if None in row or None in row.values():
                    raise DatasetError(f"{path}, line {reader.line_num}: {len(names)} values are expected")
                rows.append(row)
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not text in UTF-8: {error}") from error
    except csv.Error as error:
        raise DatasetError(f"{path} is not a table of comma-separated values: {error}") from error
    if not rows:
        raise DatasetError(f"{path} has no row")
    return rows


def _rows(path: Path, count: int) -> list[int]:
    if not path.is_file():
        raise DatasetError(f"{path} is missing")
    try:
        with path.open("rb") as file:
            # This function reads only the .npy format; `np.load` also opens archives.
            chosen = np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DatasetError(f"{path} is not a plain array of numbers: {error}") from error
    if chosen.ndim != 1 or chosen.size == 0 or not np.issubdtype(chosen.dtype, np.integer):
        raise DatasetError(f"{path} must hold row numbers, got {chosen.dtype} of shape {chosen.shape}")
    if chosen.min() < 0 or chosen.max() >= count:
        wrong = chosen.min() if chosen.min() < 0 else chosen.max()
        raise DatasetError(f"{path} names row {wrong}, and the table has 0 to {count - 1}")
    return chosen.tolist()


def _images(files: Sequence[Path], size: tuple[int, int]) -> Tensor:
    """All images as one uint8 tensor (n, 3, height, width). Threads decode them, which releases the GIL."""
    images = torch.empty(len(files), 3, *size, dtype=torch.uint8)
    with ThreadPoolExecutor() as pool:
        for index, pixels in enumerate(pool.map(lambda path: read_image(path, size), files)):
            images[index] = torch.from_numpy(pixels)
    return images


def read_image(path: Path, size: tuple[int, int]) -> np.ndarray:
    """An image as uint8 (3, height, width), resized to `size`.

    Raises:
        DatasetError: the file is missing, or is no image.

    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            resized = image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BILINEAR)
            return np.asarray(resized).transpose(2, 0, 1).copy()
    except (OSError, UnidentifiedImageError) as error:
        raise DatasetError(f"{path} is not an image that can be read: {error}") from error


DATASETS = {
    "mhist": DataSet(
        lambda request: mhist(request.path, request.size),
        layout=MHIST,
        augmentation=Augmentation(pad=4, flip=True),
    ),
    "adp": DataSet(
        lambda request: adp(request.path, request.size),
        layout=ADP,
        augmentation=Augmentation(pad=4, flip=True),
        several=True,
    ),
}
