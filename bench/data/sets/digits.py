"""scikit-learn's 1,797 images of 8x8 handwritten digits, which need no download."""

import torch
from torch import Tensor

from bench.data.dataset import DataSet, Request
from bench.data.source import Augmentation
from bench.data.split import Parts
from bench.errors import UnavailableError
from rmsgd.extras import install_command

# Properties of the digits 0 to 9, with which the training on several labels per image is tried.
PROPERTIES = ({1, 3, 5, 7, 9}, {2, 3, 5, 7}, {5, 6, 7, 8, 9}, {0, 3, 6, 9}, {0, 4, 6, 8, 9})


def read(request: Request) -> Parts:
    """The digits, standardised per channel; a fifth of every class, always the same, is the test set."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise UnavailableError(f"the digits need scikit-learn: {install_command('bench')}") from error

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels, labels, test_size=0.2, stratify=labels, random_state=0)
    train, test = standardised(*(torch.tensor(part).view(-1, 1, 8, 8) for part in parts[:2]))
    targets = [torch.tensor(part, dtype=torch.int64) for part in parts[2:]]
    return (train, targets[0]), (test, targets[1]), 10


def standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Images (n, channels, height, width) as float32, each channel scaled to mean 0 and deviation 1."""
    train, test = train.float(), test.float()
    mean = train.mean((0, 2, 3), keepdim=True)
    deviation = train.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
    return (train - mean) / deviation, (test - mean) / deviation


def _properties(request: Request) -> Parts:
    table = torch.tensor([[float(digit in kind) for kind in PROPERTIES] for digit in range(10)])
    train, test, _ = read(request)
    return (train[0], table[train[1]]), (test[0], table[test[1]]), len(PROPERTIES)


DATASETS = {
    "digits": DataSet(read, augmentation=Augmentation(pad=1), trains=True),
    "digits-properties": DataSet(_properties, augmentation=Augmentation(pad=1), several=True),
}
