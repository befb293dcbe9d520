"""CIFAR-10 and CIFAR-100 from the archives that its authors publish, packed or unpacked.

The binary form consists of plain records. The Python form is a pickle, which is read by an unpickler that
knows arrays and nothing else, so that none of its code runs.
"""

import hashlib
import io
import pickle
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench.data import unpickle
from bench.data.dataset import DataSet, Request
from bench.data.sets import images
from bench.data.source import Augmentation, DatasetError
from bench.data.split import Images, Parts

PIXELS = 3 * 32 * 32
WHERE = "https://www.cs.toronto.edu/~kriz/cifar.html"


@dataclass(frozen=True)
class Form:
    """One of CIFAR's data sets.

    Attributes:
        classes: the number of classes.
        labels: the number of label bytes of a binary record, the last of which counts.
        key: the key of the labels in the Python form.
        binary, python: (training files, test file) of the two forms.
        archives: from an archive's name to its MD5, as published beside it.
        counts: the numbers of training and test images.

    """

    classes: int
    labels: int
    key: bytes
    binary: tuple[tuple[str, ...], str]
    python: tuple[tuple[str, ...], str]
    archives: dict[str, str]
    counts: tuple[int, int] = (50_000, 10_000)

    @property
    def layout(self) -> str:
        packed = " or ".join(f"{name} (MD5 {digest})" for name, digest in self.archives.items())
        return f"{packed} from {WHERE}, or the folder that it unpacks to; or {images.LAYOUT}"


FORMS = {
    "cifar10": Form(
        10,
        1,
        b"labels",
        (tuple(f"data_batch_{index}.bin" for index in range(1, 6)), "test_batch.bin"),
        (tuple(f"data_batch_{index}" for index in range(1, 6)), "test_batch"),
        {
            "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
            "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
        },
    ),
    "cifar100": Form(
        100,
        2,
        b"fine_labels",
        (("train.bin",), "test.bin"),
        (("train",), "test"),
        {
            "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
            "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
        },
    ),
}


def read(request: Request, name: str) -> Parts:
    """The images of one of `FORMS`.

    Args:
        request: a request whose path holds an archive, the files of one, the folder that one unpacks to, or
            the images in class folders as `bench.data.sets.images` reads them.
        name: a key of `FORMS`.

    Raises:
        DatasetError: the path holds none of these, or they are damaged or incomplete.

    """
    form, folder = FORMS[name], request.path
    in_class_folders = images.is_archive(folder) or (folder / "train").is_dir()
    parts = images.read(request) if in_class_folders else _read(folder, form)
    if parts[2] != form.classes:
        raise DatasetError(f"{folder} holds {parts[2]} classes of images, and {name} has {form.classes}")
    for what, (pixels, targets), expected in zip(("training", "test"), parts[:2], form.counts, strict=True):
        if request.complete and not in_class_folders and len(pixels) != expected:
            raise DatasetError(f"{folder} has {len(pixels)} {what} images instead of {expected}")
        if targets.min() < 0 or targets.max() >= form.classes:
            raise DatasetError(f"{folder}: a {what} label is {int(targets.max())}, of {form.classes} classes")
    train, test, classes = parts
    return images.first(train, request.limit), images.first(test, request.limit), classes


def _read(folder: Path, form: Form) -> Parts:
    content, names, decode = _find(folder, form)
    train_files, test_file = names
    train = [decode(content(file), form, file) for file in train_files]
    pixels, targets = (torch.cat(tensors) for tensors in zip(*train, strict=True))
    return (pixels, targets), decode(content(test_file), form, test_file), form.classes


Names = tuple[Sequence[str], str]
Content = Callable[[str], bytes]
Decode = Callable[[bytes, Form, str], Images]


def _find(folder: Path, form: Form) -> tuple[Content, Names, Decode]:
    """A function that reads a file by name, the names of the files, and a function that decodes one."""
    if not folder.is_dir():
        raise DatasetError(f"{folder} is not a folder")
    kinds: tuple[tuple[Names, Decode], ...] = (
        (form.binary, _binary),
        (form.python, _python),
    )
    inside = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    for names, decode in kinds:
        for place in inside:
            if all((place / file).is_file() for file in (*names[0], names[1])):
                return lambda file, place=place: (place / file).read_bytes(), names, decode
    for names, _ in kinds:
        absent = [file for file in (*names[0], names[1]) if not (folder / file).is_file()]
        if len(absent) <= len(names[0]) and (folder / names[1]).is_file():
            raise DatasetError(f"{folder / absent[0]} is missing")
    for (names, decode), archive in zip(kinds, form.archives, strict=True):
        if (folder / archive).is_file():
            return _archived(folder / archive, form.archives[archive]), names, decode
    raise DatasetError(f"{folder} holds neither the binary nor the Python form of the images")


def _archived(path: Path, digest: str) -> Content:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != digest:
        raise DatasetError(f"{path} is damaged or another file: its MD5 is {found}")
    wanted: dict[str, bytes] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content is not None:
                wanted[Path(member.name).name] = content.read()

    def read_member(name: str) -> bytes:
        if name not in wanted:
            raise DatasetError(f"{path} has no {name}")
        return wanted[name]

    return read_member


def _binary(content: bytes, form: Form, name: str) -> Images:
    """Records of label bytes, the last of which counts, and 3x32x32 pixels."""
    record, size = form.labels + PIXELS, len(content)
    if size == 0 or size % record:
        raise DatasetError(f"{name} is not a CIFAR file: {size} bytes are not records of {record}")
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, record)
    pixels = torch.from_numpy(records[:, form.labels :].reshape(-1, 3, 32, 32).copy())
    return pixels, torch.from_numpy(records[:, form.labels - 1].astype(np.int64))


# The names in the pickles of arrays, with the module names of old and new NumPy.
ARRAYS: unpickle.Allowed = {
    **{
        (module, "_reconstruct"): unpickle.maker(np.empty(0))
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
    },
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
}


def _python(content: bytes, form: Form, name: str) -> Images:
    try:
        loaded = unpickle.load(io.BytesIO(content), ARRAYS, encoding="bytes")
        pixels, labels = np.asarray(loaded[b"data"]), np.asarray(loaded[form.key], dtype=np.int64)
    except (pickle.UnpicklingError, KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"{name} is not read: {error}") from error
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), PIXELS):
        raise DatasetError(f"{name} holds {pixels.dtype} of shape {pixels.shape}, not uint8 (n, {PIXELS})")
    return torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy()), torch.from_numpy(labels)


def _recognised(form: Form) -> Callable[[Path], bool]:
    """A test whether a folder holds files of the binary form, of which some may be missing."""

    def recognised(path: Path) -> bool:
        train, test = form.binary
        return (path / test).is_file() and any((path / name).is_file() for name in train)

    return recognised


def _sizes(form: Form) -> Callable[[Path], tuple[int, int]]:
    def sizes(path: Path) -> tuple[int, int]:
        train, test = (
            sum((path / name).stat().st_size // (form.labels + PIXELS) for name in names)
            for names in (form.binary[0], form.binary[1:])
        )
        return train, test

    return sizes


DATASETS = {
    name: DataSet(
        partial(read, name=name),
        layout=form.layout,
        recognises=_recognised(form),
        sizes=_sizes(form),
        augmentation=Augmentation(pad=4, flip=True),
    )
    for name, form in FORMS.items()
}
