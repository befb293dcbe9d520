"""The data of a run: batches that depend on seed, epoch and position alone, so that a run can be resumed."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from bench.data.augment import crop_and_flip, cutout
from bench.data.split import Split
from bench.errors import UsageError

Batch = tuple[Tensor, Tensor]
EVALUATED = 512


class DatasetError(UsageError):
    """A data set is missing or not what it should be. The message says what is expected, and from where."""


@dataclass(frozen=True)
class Augmentation:
    """How training images vary: most pixels to move by, whether to mirror, side of a hole (0: none)."""

    pad: int = 0
    flip: bool = False
    hole: int = 0


class Source(Protocol):
    """A data set in the form that runs read.

    Attributes:
        classes: number of logits.
        sample: (channels, height, width).
        several: whether an image has several labels; targets are then (n, classes) of zeros and ones.

    """

    classes: int
    sample: tuple[int, ...]
    several: bool

    def batches(self, size: int) -> int:
        """The number of batches of one size in an epoch; what is left over is not used in that epoch."""

    def epoch(self, size: int, seed: int, epoch: int, skip: int) -> Iterator[Batch]:
        """Augmented training batches, without the first `skip`, in an order drawn from seed and epoch."""

    def test(self) -> Iterator[Batch]:
        """The test set."""

    def train_sample(self) -> Iterator[Batch]:
        """Training images without variation, as many as the test set has, always the same ones."""

    def varied(self, augment: bool, cutout: bool) -> "Source":
        """The same data, not augmented unless `augment`, with holes of half the image's side if `cutout`."""

    def with_holdout(self) -> "Source":
        """The training set alone, of which a fifth (always the same) stands in for the test set."""

    def limited(self, train: int | None, test: int | None, holdout: bool) -> "Source":
        """The same data with `train` training images and `test` test images, always the same ones; None: all.

        With `holdout`, `test` other training images stand in for the test set.
        """


def mix(*parts: int) -> int:
    """One seed made of several numbers."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % (1 << 63)
    return seed


def chosen(have: int, wanted: int | None, what: str) -> list[int]:
    """`wanted` of `have` images in an order that is always the same; raises UsageError if there are fewer."""
    if wanted is not None and not 1 <= wanted <= have:
        raise UsageError(f"{wanted} {what} images are wanted, and there are {have}")
    return torch.randperm(have, generator=torch.Generator().manual_seed(0))[:wanted].tolist()


def limited_parts(
    have: tuple[int, int], train: int | None, test: int | None, holdout: bool
) -> tuple[list[int], list[int]]:
    """The indices of the training images of `Source.limited`, and of the images that judge a run.

    Args:
        have: how many training and test images there are.
        train, test, holdout: see `Source.limited`.

    Returns:
        The indices; those of the judging images are of the training set if `holdout`, else of the test set.

    Raises:
        UsageError: there are too few images.

    """
    if not holdout:
        return chosen(have[0], train, "training"), chosen(have[1], test, "test")
    held = have[0] // 5 if test is None else test
    kept = have[0] - held if train is None else train
    order = chosen(have[0], kept + held, "training and held-out")
    return order[:kept], order[kept:]


def whole_batches(count: int, size: int) -> int:
    """How many batches of `size` there are in `count` samples; raises UsageError if there is none."""
    if not 1 <= size <= count:
        raise UsageError(f"batch must be between 1 and the {count} training samples, got {size}")
    return count // size


class InMemory:
    """A data set that is on the device already, as a `Source`.

    Args:
        train, test: images as uint8, which are normalised batch by batch with the mean and deviation of the
            training set's channels, or as floats, which are used as they are.
        classes: number of logits.
        augmentation: how the training images vary.
        several: see `Source`.

    """

    def __init__(
        self, train: Split, test: Split, classes: int, augmentation: Augmentation, several: bool = False
    ) -> None:
        self.classes, self.several = classes, several
        self.sample = tuple(train.inputs.shape[1:])
        self._train, self._test, self._augmentation = train, test, augmentation
        self._device = train.inputs.device
        self._mean, self._deviation = _moments(train.inputs)

    def varied(self, augment: bool, cutout: bool) -> "InMemory":
        chosen = self._augmentation if augment else Augmentation()
        if cutout:
            chosen = replace(chosen, hole=self.sample[1] // 2)
        return InMemory(self._train, self._test, self.classes, chosen, self.several)

    def with_holdout(self) -> "InMemory":
        order = torch.randperm(len(self._train), generator=torch.Generator().manual_seed(0))
        cut = len(order) // 5
        held, kept = (part.to(self._device) for part in (order[:cut], order[cut:]))
        parts = [Split(self._train.inputs[part], self._train.targets[part]) for part in (kept, held)]
        return InMemory(parts[0], parts[1], self.classes, self._augmentation, self.several)

    def limited(self, train: int | None, test: int | None, holdout: bool) -> "InMemory":
        kept, judged = limited_parts((len(self._train), len(self._test)), train, test, holdout)
        source = self._train if holdout else self._test
        parts = [
            Split(split.inputs[part], split.targets[part])
            for split, part in ((self._train, kept), (source, judged))
        ]
        return InMemory(parts[0], parts[1], self.classes, self._augmentation, self.several)

    def batches(self, size: int) -> int:
        return whole_batches(len(self._train), size)

    def epoch(self, size: int, seed: int, epoch: int, skip: int) -> Iterator[Batch]:
        generator = torch.Generator(self._device)
        order = torch.randperm(
            len(self._train), generator=generator.manual_seed(mix(seed, epoch)), device=self._device
        )
        for index in range(skip, self.batches(size)):
            chosen = order[index * size : (index + 1) * size]
            images, targets = self._train.inputs[chosen], self._train.targets[chosen]
            yield self._augmented(images, generator.manual_seed(mix(seed, epoch, index))), targets

    def _augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        how = self._augmentation
        if how.pad or how.flip:
            images = crop_and_flip(images, how.pad, how.flip, generator)
        images = self._normalised(images)
        return cutout(images, how.hole, generator) if how.hole else images

    def test(self) -> Iterator[Batch]:
        return self._evaluated(self._test.inputs, self._test.targets)

    def train_sample(self) -> Iterator[Batch]:
        count = len(self._test)
        return self._evaluated(self._train.inputs[:count], self._train.targets[:count])

    def _evaluated(self, images: Tensor, targets: Tensor) -> Iterator[Batch]:
        for part, wanted in zip(images.split(EVALUATED), targets.split(EVALUATED), strict=True):
            yield self._normalised(part), wanted

    def _normalised(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            # This is a copy, since the hole is cut in place.
            return images.clone()
        return (images.float() - self._mean) / self._deviation


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the channels, each (1, channels, 1, 1), without a float copy of all images."""
    total = torch.zeros(images.shape[1], dtype=torch.float64, device=images.device)
    squared = torch.zeros_like(total)
    for part in images.split(1024):
        values = part.double()
        total += values.sum((0, 2, 3))
        squared += values.square().sum((0, 2, 3))
    count = images.numel() // images.shape[1]
    mean = total / count
    deviation = (squared / count - mean.square()).clamp_min(1e-12).sqrt()
    return mean.float().view(1, -1, 1, 1), deviation.float().view(1, -1, 1, 1)
