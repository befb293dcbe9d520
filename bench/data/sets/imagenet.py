"""ImageNet, whose images do not fit into memory: worker processes decode them while the device computes."""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.data.dataset import DataSet, Request
from bench.data.sets.images import SUFFIXES
from bench.data.source import EVALUATED, Batch, DatasetError, limited_parts, mix, whole_batches

LAYOUT = (
    "train/CLASS/IMAGE and val/CLASS/IMAGE, CLASS being one of the 1,000 WordNet ids (1,281,167 and 50,000 "
    "images), from https://image-net.org"
)
# The constants of torchvision's ImageNet weights, which are in general use.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Item = tuple[Path, int]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


def load(folder: Path, size: tuple[int, int], device: torch.device) -> "Streamed":
    """The images of `LAYOUT`, which are decoded when they are needed.

    Raises:
        DatasetError: train or val is missing or empty, or val has a class that train lacks.

    """
    if not (folder / "train").is_dir() or not (folder / "val").is_dir():
        raise DatasetError(f"{folder} has no folders train and val")
    classes = sorted(entry.name for entry in (folder / "train").iterdir() if entry.is_dir())
    if unknown := {entry.name for entry in (folder / "val").iterdir() if entry.is_dir()} - set(classes):
        raise DatasetError(f"{folder / 'val'} has the class {min(unknown)}, which train has not")
    parts = []
    for split in ("train", "val"):
        parts.append(
            [
                (path, target)
                for target, label in enumerate(classes)
                for path in sorted((folder / split / label).glob("*"))
                if path.suffix.lower() in SUFFIXES
            ]
        )
        if not parts[-1]:
            raise DatasetError(f"{folder / split} holds no image")
    return Streamed(parts[0], parts[1], len(classes), size, device)


class Streamed:
    """Images on the disk as a `bench.data.source.Source`, whose crops depend on seed, epoch and image."""

    several = False

    def __init__(
        self,
        train: Sequence[Item],
        test: Sequence[Item],
        classes: int,
        size: tuple[int, int],
        device: torch.device,
        augment: bool = True,
    ) -> None:
        self.classes, self._size = classes, size
        self.sample: tuple[int, ...] = (3, *size)
        self._train, self._test, self._device, self._augment = train, test, device, augment
        self._mean, self._deviation = (
            torch.tensor(values, device=device).view(1, 3, 1, 1) * 255 for values in (MEAN, DEVIATION)
        )

    def varied(self, augment: bool, cutout: bool) -> "Streamed":
        if cutout:
            raise ValueError("no experiment uses Cutout on ImageNet")
        return Streamed(self._train, self._test, self.classes, self._size, self._device, augment)

    def with_holdout(self) -> "Streamed":
        order = torch.randperm(len(self._train), generator=torch.Generator().manual_seed(0)).tolist()
        cut = len(order) // 5
        held, kept = ([self._train[index] for index in part] for part in (order[:cut], order[cut:]))
        return Streamed(kept, held, self.classes, self._size, self._device, self._augment)

    def limited(self, train: int | None, test: int | None, holdout: bool) -> "Streamed":
        kept, judged = limited_parts((len(self._train), len(self._test)), train, test, holdout)
        source = self._train if holdout else self._test
        parts = [self._train[index] for index in kept], [source[index] for index in judged]
        return Streamed(*parts, self.classes, self._size, self._device, self._augment)

    def batches(self, size: int) -> int:
        return whole_batches(len(self._train), size)

    def epoch(self, size: int, seed: int, epoch: int, skip: int) -> Iterator[Batch]:
        order = torch.randperm(len(self._train), generator=torch.Generator().manual_seed(mix(seed, epoch)))
        chosen = [self._train[index] for index in order[skip * size : self.batches(size) * size].tolist()]
        seeds = [mix(seed, epoch, skip * size + index) for index in range(len(chosen))]
        return self._loaded(chosen, size, seeds if self._augment else None)

    def test(self) -> Iterator[Batch]:
        return self._loaded(self._test, EVALUATED, None)

    def train_sample(self) -> Iterator[Batch]:
        stride = max(1, len(self._train) // len(self._test))
        return self._loaded(self._train[::stride][: len(self._test)], EVALUATED, None)

    def _loaded(self, items: Sequence[Item], size: int, seeds: Sequence[int] | None) -> Iterator[Batch]:
        workers = min(16, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else 4
        cuda = self._device.type == "cuda"
        loader = DataLoader(
            Images(items, self._size, seeds),
            batch_size=size,
            # A few images are decoded in less time than a process takes to start.
            num_workers=workers if len(items) >= 4096 else 0,
            pin_memory=cuda,
            # Otherwise every pass would draw from torch's own generator, and a resumed run has one pass more.
            generator=torch.Generator(),
        )
        for images, targets in loader:
            on_device = images.to(self._device, non_blocking=True)
            yield (
                (on_device.float() - self._mean) / self._deviation,
                targets.to(self._device, non_blocking=True),
            )


class Images(Dataset[tuple[Tensor, int]]):
    """Decoded images: a random crop of 8 to 100 % of the area, mirrored with probability 1/2, or the centre.

    Args:
        items: files and classes.
        size: (height, width) of the results.
        seeds: the seed of every item's crop; None takes the centre 7/8 of the image.

    """

    def __init__(self, items: Sequence[Item], size: tuple[int, ...], seeds: Sequence[int] | None) -> None:
        self._items, self._size, self._seeds = items, size, seeds

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image, UnidentifiedImageError

        path, target = self._items[index]
        height, width = self._size
        try:
            with Image.open(path) as image:
                if self._seeds is None:
                    box, mirrored = centre(image.size, width / height), False
                else:
                    box, mirrored = crop(image.size, np.random.default_rng(self._seeds[index]))
                full = image.size
                # A JPEG is decoded at no more than the size that the crop needs.
                image.draft(
                    "RGB",
                    (int(width * full[0] / (box[2] - box[0])), int(height * full[1] / (box[3] - box[1]))),
                )
                # Each side is rounded up separately.
                across, down = (now / before for now, before in zip(image.size, full, strict=True))
                right, bottom = min(box[2] * across, image.width), min(box[3] * down, image.height)
                resized = image.convert("RGB").resize(
                    (width, height),
                    Image.Resampling.BILINEAR,
                    box=(box[0] * across, box[1] * down, right, bottom),
                )
        except (OSError, UnidentifiedImageError) as error:
            raise DatasetError(f"{path} is not an image that can be read: {error}") from error
        pixels = np.asarray(resized).transpose(2, 0, 1)
        return torch.from_numpy((pixels[:, :, ::-1] if mirrored else pixels).copy()), target


def crop(size: tuple[int, int], random: np.random.Generator) -> tuple[Box, bool]:
    """A random part of an image of (width, height), and whether to mirror it.

    The part has 8 to 100 % of the area and a ratio of 3:4 to 4:3, as in Szegedy et al. (2015). Where ten
    draws do not fit, it is the centre.
    """
    width, height = size
    mirrored = bool(random.integers(2))
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = random.uniform(0, width - w), random.uniform(0, height - h)
            return (left, top, left + w, top + h), mirrored
    return centre(size, 1.0), mirrored


def centre(size: tuple[int, int], ratio: float) -> Box:
    """The middle of an image of (width, height): 7/8 of what fits a rectangle of width/height `ratio`."""
    width, height = size
    w = min(width, height * ratio) * 7 / 8
    h = w / ratio
    return ((width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2)


def _stream(request: Request, device: torch.device) -> Streamed:
    return load(request.path, request.size, device)


DATASETS = {"imagenet": DataSet(stream=_stream, layout=LAYOUT)}
