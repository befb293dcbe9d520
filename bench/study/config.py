"""One run of the study: everything that decides its result, and the folder that it is kept in."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from bench.errors import UsageError


@dataclass(frozen=True)
class RunConfig:
    """What is trained and how. Two runs with equal configurations have equal results.

    Attributes:
        network: key of `bench.models.ARCHITECTURES`.
        dataset: key of `bench.data.registry.DATASETS`.
        optimizer: key of `bench.peers.PEERS`.
        seed: the seed of initial weights, batches and augmentation.
        settings: settings that replace those of `bench.peers`, as sorted (name, value) pairs.
        batch: mini-batch size.
        epochs: passes over the training set, or with a budget the most of them.
        budget: whether to stop when the time that SGD needs for `epochs` epochs is spent.
        width: factor on the network's channel counts.
        augment: whether to crop randomly, and to flip where the data set allows it.
        cutout: whether to cut a hole of half the image's side into every training image as well.
        holdout: whether a fifth of the training set is left out of it and judges the run, for tuning.
        keep_weights: whether to keep the weights of some epochs, for figures.
        schedule: the schedule of the learning rate, a key of `bench.study.schedules.SCHEDULES`, or "own" for
            the paper's.
        measurements: epoch ends of RMSGD in the whole run, at equal distances; None: one an epoch.
        images: the number of training images, always the same ones; None: all.
        judged: the number of test images (or held-out ones) that judge the run, always the same; None: all.
        channels_last: whether to keep images and weights in that memory format.
        precision: that of the forward and backward pass: "fp32", or "bf16" by autocast.

    """

    network: str
    dataset: str
    optimizer: str
    seed: int = 0
    settings: tuple[tuple[str, Any], ...] = ()
    batch: int = 128
    epochs: int = 250
    budget: bool = False
    width: float = 1.0
    augment: bool = True
    cutout: bool = False
    holdout: bool = False
    keep_weights: bool = False
    schedule: str = "own"
    measurements: int | None = None
    images: int | None = None
    judged: int | None = None
    channels_last: bool = False
    precision: str = "fp32"

    def folder(self, root: Path) -> Path:
        """The run's folder: a name that people can read, and a digest of the whole configuration."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        changed = "".join(f"-{name}={value}" for name, value in self.settings)
        return root / f"{self.dataset}-{self.network}" / f"{self.optimizer}{changed}-seed{self.seed}-{digest}"

    def with_settings(self, changed: Mapping[str, Any]) -> "RunConfig":
        """The same run with these settings set or replaced; UsageError as `sorted_settings` raises it."""
        return replace(self, settings=sorted_settings({**dict(self.settings), **changed}))

    @property
    def lr(self) -> float:
        """The learning rate that the run sets; KeyError where it has its optimizer's own."""
        return dict(self.settings)["lr"]

    @property
    def label(self) -> str:
        """The optimizer and its unusual settings, for people."""
        changed = [f"{name} {value}" for name, value in self.settings]
        if self.measurements is not None:
            changed.append(f"{self.measurements} measurements")
        return f"{self.variant} ({', '.join(changed)})" if changed else self.variant

    @property
    def variant(self) -> str:
        """Optimizer and schedule, for which a learning rate is tuned."""
        return self.optimizer if self.schedule == "own" else f"{self.optimizer} {self.schedule}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON.

        A field of `LATER` that has its default is left out, so that the digest of a run, and its folder, is
        the same as before the field existed.
        """
        content = {**asdict(self), "settings": dict(self.settings)}
        return {key: value for key, value in content.items() if LATER.get(key, ...) != value}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "RunConfig":
        """The inverse of `to_dict`; UsageError for keys that no run has."""
        if unknown := set(content) - {field.name for field in fields(cls)}:
            raise UsageError(f"no run has {', '.join(sorted(unknown))}")
        return cls(**{**content, "settings": sorted_settings(content.get("settings", {}))})


LATER = {field.name: field.default for field in fields(RunConfig)[-6:]}
"""The fields that runs did not have from the beginning, with their defaults."""


def sorted_settings(settings: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Settings in a fixed order, so that equal settings compare equal, with lists as tuples.

    Raises:
        UsageError: a value is not a number, a text, or a list of these.

    """
    return tuple(sorted((name, _frozen(name, value)) for name, value in settings.items()))


def _frozen(name: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_frozen(name, entry) for entry in value)
    if isinstance(value, bool | int | float | str | None):
        return value
    raise UsageError(f"{name} cannot be set to {value!r}: a number, text or a list is expected")
