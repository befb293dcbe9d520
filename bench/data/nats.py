"""NATS-Bench's trained networks: their weights, and the accuracies that its authors measured.

Dong et al. (TPAMI 2021) publish one `INDEX.pickle.pbz2` per architecture. These pickles are read by an
unpickler that knows tensors and numbers and nothing else.
"""

import bz2
import io
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from bench.data import unpickle
from bench.data.sets.cifar import ARRAYS
from bench.data.source import DatasetError

LAYOUT = (
    "000000.pickle.pbz2, 000001.pickle.pbz2, ... of NATS-sss-v1_0-50262-full (size search space), from "
    "https://github.com/D-X-Y/NATS-Bench"
)


@dataclass(frozen=True)
class Trained:
    """One architecture, trained once.

    Attributes:
        index: the architecture's index.
        epochs: the number of epochs that it was trained for: 1, 12 or 90.
        seed: the seed of the training.
        weights: from name to tensor.
        train_accuracy, test_accuracy: the accuracies at the end, in [0, 1].

    """

    index: int
    epochs: int
    seed: int
    weights: dict[str, Tensor]
    train_accuracy: float
    test_accuracy: float


def files(folder: Path) -> list[Path]:
    """The architectures' files, in order; raises DatasetError where there is none."""
    found = sorted(path for path in folder.glob("*.pickle.pbz2") if path.name.split(".")[0].isdecimal())
    if not found:
        raise DatasetError(f"{folder} holds no architecture of NATS-Bench. Expected: {LAYOUT}")
    return found


def read(path: Path, dataset: str = "cifar10") -> Iterator[Trained]:
    """All networks of one file that were trained on `dataset` ("cifar10", "cifar100", "ImageNet16-120").

    Raises:
        DatasetError: the file is damaged, holds code, or lacks weights, as the "-simple" archives do.

    """
    try:
        with bz2.open(path, "rb") as file:
            content = unpickle.load(io.BytesIO(file.read()), _ALLOWED)
        test = "ori-test" if dataset == "cifar10" else "x-test"
        for epochs, results in content.items():
            for (name, seed), result in results["all_results"].items():
                if name != dataset:
                    continue
                if not result["net_state_dict"]:
                    raise DatasetError(f"{path} has no weights: the -full archive is needed, not -simple")
                last = result["epochs"] - 1
                yield Trained(
                    int(path.name.split(".")[0]),
                    int(epochs),
                    int(seed),
                    result["net_state_dict"],
                    float(result["train_acc1es"][last]) / 100,
                    float(result["eval_acc1es"][f"{test}@{last}"]) / 100,
                )
    except DatasetError:
        raise
    except (
        OSError,
        EOFError,
        pickle.UnpicklingError,
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
    ) as error:
        raise DatasetError(f"{path} is not read: {type(error).__name__}: {error}") from error


def _storage(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


_ALLOWED: unpickle.Allowed = {
    **ARRAYS,
    **{
        (module, "scalar"): unpickle.maker(np.float64(0))
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
    },
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch.storage", "_load_from_bytes"): _storage,
}
