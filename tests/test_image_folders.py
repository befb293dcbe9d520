"""Data sets on the disk are read, and a folder that is not what it claims is refused by name."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from bench import data
from bench.data import registry, sets
from bench.data.dataset import Request
from bench.data.sets import images as image_sets
from bench.data.sets.cifar import PIXELS
from bench.models import Architecture


def write_cifar(path, names, labels, count=20):
    generator = np.random.default_rng(0)
    for name in names:
        records = generator.integers(256, size=(count, labels + PIXELS), dtype=np.uint8)
        records[:, :labels] = np.arange(count)[:, None] % 10
        records.tofile(path / name)


def write_classes(path, split, size=(40, 30)):
    for target, label in enumerate(("cat", "dog")):
        (path / split / label).mkdir(parents=True)
        for index in range(3):
            image = np.full((*size, 3), 100 * target + index, dtype=np.uint8)
            Image.fromarray(image).save(path / split / label / f"{index}.png")


def test_cifar_10_is_read_from_its_binary_files(tmp_path):
    write_cifar(tmp_path, [f"data_batch_{index}.bin" for index in range(1, 6)], 1)
    write_cifar(tmp_path, ["test_batch.bin"], 1)
    dataset = data.load(str(tmp_path), "resnet18")
    assert dataset.sample == (3, 32, 32)
    assert (len(dataset.train), len(dataset.test), dataset.classes) == (100, 20, 10)
    assert data.sizes(tmp_path) == (100, 20)
    assert dataset.test.targets[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    torch.testing.assert_close(dataset.train.inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)


def test_cifar_100_takes_the_fine_label(tmp_path):
    write_cifar(tmp_path, ["train.bin", "test.bin"], 2)
    content = np.fromfile(tmp_path / "test.bin", dtype=np.uint8).reshape(20, -1)
    content[:, 1] = 99
    content.tofile(tmp_path / "test.bin")
    dataset = data.load(str(tmp_path), "resnet18", samples=8)
    assert (len(dataset.train), dataset.classes) == (8, 100)
    assert set(dataset.test.targets.tolist()) == {99}
    assert data.sizes(tmp_path) == (20, 20)


def test_a_folder_per_class_is_resized_to_what_the_model_reads(tmp_path):
    write_classes(tmp_path, "train")
    write_classes(tmp_path, "val")
    dataset = data.load(str(tmp_path), "resnet18", samples=4)
    assert dataset.sample == (3, 32, 32)
    assert dataset.classes == 2
    assert dataset.train.targets.tolist() == [0, 1, 0, 1]
    assert data.sizes(tmp_path) == (6, 6)


def test_pixels_keep_their_places(tmp_path):
    write_classes(tmp_path, "train")
    write_classes(tmp_path, "test")
    (images, targets), _, _ = image_sets.read(Request(Architecture(None, (3, 20, 15)), tmp_path))
    assert images.shape == (6, 3, 20, 15)
    assert images[targets == 1].min() == 100


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "test_batch.bin").write_bytes(b"x" * 100), "is not a CIFAR file: 100 bytes"),
        (lambda path: (path / "data_batch_3.bin").unlink(), "data_batch_3.bin is missing"),
        (lambda path: (path / "test_batch.bin").write_bytes(b"\xff" * 3073), "a test label is 255"),
        (lambda path: (path / "test_batch.bin").unlink(), "holds no images that are known here"),
    ],
)
def test_a_cifar_folder_that_is_not_what_it_claims_is_refused(tmp_path, damage, message):
    write_cifar(tmp_path, [f"data_batch_{index}.bin" for index in range(1, 6)], 1)
    write_cifar(tmp_path, ["test_batch.bin"], 1)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        data.load(str(tmp_path), "resnet18")


def test_a_file_that_is_no_image_is_named(tmp_path):
    write_classes(tmp_path, "train")
    write_classes(tmp_path, "test")
    (tmp_path / "train" / "cat" / "1.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"cat/1\.png is not an image"):
        data.load(str(tmp_path), "resnet18")


def test_classes_without_images_are_refused(tmp_path):
    write_classes(tmp_path, "train")
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match="holds train, but no val/CLASS/IMAGE"):
        data.load(str(tmp_path), "resnet18")


def test_a_gpt_does_not_read_images(tmp_path):
    with pytest.raises(ValueError, match="gpt reads tokens"):
        data.load(str(tmp_path), "gpt")


def test_a_class_that_is_not_trained_is_refused(tmp_path):
    write_classes(tmp_path, "train")
    write_classes(tmp_path, "test")
    (tmp_path / "test" / "cat").rename(tmp_path / "test" / "bird")
    with pytest.raises(ValueError, match="test has the class bird, which train has not"):
        data.load(str(tmp_path), "resnet18")


def test_one_module_is_all_that_a_new_data_set_needs(tmp_path, monkeypatch):
    (tmp_path / "squares.py").write_text(
        "import torch\n"
        "from bench.data.dataset import DataSet\n"
        "part = (torch.zeros(8, 3, 32, 32), torch.arange(8) % 2)\n"
        "DATASETS = {'squares': DataSet(lambda request: (part, part, 2), trains=True)}\n"
    )
    monkeypatch.setattr(sets, "__path__", [*sets.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "bench.data.sets.squares", raising=False)
    known = registry._found()
    assert list(known)[:-1] == sorted(registry.DATASETS, key=list(registry.DATASETS).index)
    monkeypatch.setattr(registry, "DATASETS", known)
    monkeypatch.setattr(registry, "TRAINED", ("squares",))
    assert data.load("squares", "resnet18").classes == 2
    assert registry.source("squares", None, "resnet18", torch.device("cpu")).classes == 2
