"""A zip of class folders is read as it is and decoded once; anything else is refused with one line."""

import io
import multiprocessing
import os
import signal
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench import atomic, data
from bench.__main__ import main
from bench.data import registry
from bench.data.dataset import Request
from bench.data.sets import images
from bench.data.source import DatasetError
from bench.models import Architecture

SIZE = (4, 4)
CLASSES = ("cat", "dog")


def read(path, size, cache):
    return images.read(Request(Architecture(None, (3, *size)), path, cache))


def jpeg(value, size=SIZE):
    content = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(content, "JPEG", quality=95)
    return content.getvalue()


def names(train=3, test=2, classes=CLASSES, root=""):
    """Names in the form of CIFAR-10's archive, the test set first."""
    return [
        f"{root}{split}/{label}/{index:04}.jpg"
        for split, count in (("test", test), ("train", train))
        for label in classes
        for index in range(count)
    ]


def write(path, members=None, **options):
    """An archive whose images are grey, a different grey for each of the first 25."""
    members = names(**options) if members is None else members
    with zipfile.ZipFile(path, "w") as file:
        for index, name in enumerate(members):
            file.writestr(name, jpeg(10 * index % 250))
    return path


def greys(images):
    return images.float().mean((1, 2, 3)).round().tolist()


def test_the_classes_of_an_archive_take_turns_in_the_order_of_their_names(tmp_path):
    (train, targets), (test, test_targets), classes = read(write(tmp_path / "a.zip"), SIZE, tmp_path)
    assert classes == 2
    assert targets.tolist() == [0, 1, 0, 1, 0, 1]
    assert test_targets.tolist() == [0, 1, 0, 1]
    assert train.dtype == torch.uint8
    assert train.shape == (6, 3, 4, 4)
    # The four images of the test set are the first of the archive, then three cats and three dogs.
    assert greys(test) == [0, 20, 10, 30]
    assert greys(train) == [40, 70, 50, 80, 60, 90]


@pytest.mark.parametrize("options", [{"root": "cifar10/"}, {"classes": ("a", "b", "c")}])
def test_a_folder_around_the_splits_and_any_number_of_classes_will_do(options, tmp_path):
    train, _, classes = read(write(tmp_path / "a.zip", **options), SIZE, None)
    assert classes == len(options.get("classes", CLASSES))
    assert len(train[0]) == 3 * classes


def test_the_test_set_of_an_archive_with_a_validation_set_too_is_the_test_set(tmp_path):
    path = write(tmp_path / "a.zip", [*names(), "val/cat/0.jpg"])
    assert len(read(path, SIZE, None)[1][0]) == 4


def test_what_a_packer_leaves_in_an_archive_is_no_image(tmp_path):
    path = write(tmp_path / "a.zip")
    with zipfile.ZipFile(path, "a") as file:
        for name in ("README.md", "train/", "__MACOSX/train/cat/._0000.jpg", "train/cat/.thumb.jpg"):
            file.writestr(name, b"")
    assert len(read(path, SIZE, None)[0][0]) == 6


def test_images_of_other_sizes_are_brought_to_the_one_that_the_network_reads(tmp_path):
    path = write(tmp_path / "a.zip")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("train/dog/9999.jpg", jpeg(200, (30, 20)))
    assert read(path, (8, 6), None)[0][0].shape == (7, 3, 8, 6)


def test_an_archive_is_decoded_once_and_anew_when_its_content_changes(tmp_path, monkeypatch):
    path = write(tmp_path / "a.zip")
    first = read(path, SIZE, tmp_path / "kept")
    with monkeypatch.context() as without:
        without.setattr(images, "_image", None)
        again = read(path, SIZE, tmp_path / "kept")
    assert torch.equal(first[0][0], again[0][0])
    write(path, train=4)
    assert len(read(path, SIZE, tmp_path / "kept")[0][0]) == 8


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_decoded_file_that_is_damaged_is_made_again(damage, tmp_path):
    path = write(tmp_path / "a.zip")
    whole = read(path, SIZE, tmp_path / "kept")[0][0].clone()
    (kept,) = (tmp_path / "kept").glob("*.safetensors")
    kept.write_bytes(kept.read_bytes()[:-5] if damage == "cut" else b"something else")
    assert torch.equal(read(path, SIZE, tmp_path / "kept")[0][0], whole)


def _read(path, cache, dies):
    if dies:
        atomic.os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
    read(Path(path), SIZE, Path(cache))


def test_a_process_that_is_killed_while_it_decodes_leaves_nothing_that_is_taken_for_whole(tmp_path):
    path = write(tmp_path / "a.zip")
    process = multiprocessing.get_context("fork").Process(target=_read, args=(path, tmp_path / "kept", True))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not list((tmp_path / "kept").glob("*.safetensors"))
    assert len(read(path, SIZE, tmp_path / "kept")[0][0]) == 6


def test_processes_that_share_a_folder_decode_an_archive_once(tmp_path, monkeypatch):
    path, decoded = write(tmp_path / "a.zip"), images._unpacked

    def noted(*arguments):
        (tmp_path / f"decoded-by-{os.getpid()}").touch()
        return decoded(*arguments)

    monkeypatch.setattr(images, "_unpacked", noted)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_read, args=(path, tmp_path / "kept", False)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(list(tmp_path.glob("decoded-by-*"))) == 1


def cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def changed(path):
    """Change a pixel, so that the checksum is wrong."""
    content = bytearray(path.read_bytes())
    content[content.index(b"\xff\xd8") + 200] ^= 255
    path.write_bytes(content)


def text_for_image(path):
    write(path)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("train/cat/9999.jpg", b"no image")


WRONG = {
    "cut": (cut, "is not a zip archive, or is cut"),
    "changed": (changed, "0000.jpg cannot be unpacked: Bad CRC"),
    "text": (lambda path: path.write_text("text"), "is not a zip archive, or is cut"),
    "an image that is none": (text_for_image, "train/cat/9999.jpg is not an image"),
    "no image": (lambda path: write(path, []), "holds no image, but no train/CLASS/IMAGE"),
    "no test set": (lambda path: write(path, test=0), "holds train, but no val/CLASS/IMAGE"),
    "no classes": (lambda path: write(path, ["train/0.jpg", "test/0.jpg"]), "train/0.jpg, which is not in"),
    "images beside the classes": (
        lambda path: write(path, [*names(), "train/0.jpg"]),
        "train/0.jpg, which is not in",
    ),
    "a class that is not trained": (
        lambda path: write(path, [*names(), "test/bird/0.jpg"]),
        "test has the class bird, which train has not",
    ),
    "two data sets": (
        lambda path: write(path, [*names(root="a/"), *names(root="b/")]),
        "more than one data set: one in a, another in b",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_archive_that_is_wrong_cut_or_mixed_is_answered_with_one_line(wrong, tmp_path, capsys):
    path = write(tmp_path / "a.zip")
    make, message = WRONG[wrong]
    make(path)
    with pytest.raises(DatasetError, match=message) as raised:
        read(path, SIZE, tmp_path / "kept")
    assert "\n" not in str(raised.value)
    capsys.readouterr()
    arguments = ["train", "--data", str(path), "--model", "resnet18", "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_train_reads_an_archive(tmp_path):
    path = write(tmp_path / "a.zip")
    dataset = data.load(str(path), "resnet18", cache=tmp_path / "kept")
    assert dataset.sample == (3, 32, 32)
    assert dataset.classes == 2
    assert len(data.load(str(path), "resnet18", samples=4, cache=tmp_path / "kept").train) == 4


def test_the_study_takes_an_archive_for_cifar_10_if_it_has_ten_classes(tmp_path):
    ten = write(tmp_path / "ten.zip", classes=tuple("abcdefghij"))
    source = registry.source("cifar10", ten, "resnet18", torch.device("cpu"), tmp_path / "kept")
    assert source.classes == 10
    assert source.batches(6) == 5
    two = write(tmp_path / "two.zip")
    with pytest.raises(DatasetError, match="holds 2 classes"):
        registry.source("cifar10", two, "resnet18", torch.device("cpu"), tmp_path / "kept")


def test_an_archive_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(DatasetError, match="is missing"):
        data.load(str(tmp_path / "nothing.zip"), "resnet18")
