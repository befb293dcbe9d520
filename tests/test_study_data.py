"""The study reads data sets in their authors' formats, and names what is wrong with others."""

import bz2
import csv
import hashlib
import io
import os
import pickle
import signal
import sys
import tarfile
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from study_jobs import killed_measuring

from bench.__main__ import main
from bench.data import Split, nats, registry, unpickle
from bench.data.augment import crop_and_flip, cutout
from bench.data.dataset import Request
from bench.data.sets import cifar
from bench.data.sets import imagenet as imagenet_set
from bench.data.source import Augmentation, DatasetError, InMemory, mix
from bench.locks import locked
from bench.models import architecture
from bench.study import nats_study

CPU = torch.device("cpu")
COUNTS = {"cifar10": (50, 10), "cifar100": (40, 20)}


@pytest.fixture(autouse=True)
def _few_images(monkeypatch):
    for name, counts in COUNTS.items():
        monkeypatch.setitem(cifar.FORMS, name, replace(cifar.FORMS[name], counts=counts))


def read_cifar(path, name):
    return cifar.read(Request(architecture("resnet18"), path), name)


def pixels(count, seed):
    return np.random.default_rng(seed).integers(256, size=(count, 3072), dtype=np.uint8)


def parts(name):
    """For every file of a data set: its binary form, its Python form, pixels, labels."""
    form = cifar.FORMS[name]
    train, test = COUNTS[name]
    binary, python = ((*files[0], files[1]) for files in (form.binary, form.python))
    sizes = [train // (len(binary) - 1)] * (len(binary) - 1) + [test]
    for index, (first, second, count) in enumerate(zip(binary, python, sizes, strict=True)):
        yield first, second, pixels(count, index), [(7 * i + index) % form.classes for i in range(count)]


def binary_files(name):
    labels = cifar.FORMS[name].labels
    for file, _, images, targets in parts(name):
        head = np.zeros((len(images), labels), dtype=np.uint8)
        head[:, -1] = targets
        yield file, np.concatenate([head, images], axis=1).tobytes()


def python_files(name):
    key = cifar.FORMS[name].key
    for _, file, images, targets in parts(name):
        # Python 2 wrote it, whose text is bytes.
        yield file, pickle.dumps({b"data": images, key: targets, b"batch_label": b"x"}, protocol=2)


WRITERS = {"binary": binary_files, "python": python_files}


def write_folder(path, name, form):
    path.mkdir(parents=True, exist_ok=True)
    for file, content in WRITERS[form](name):
        (path / file).write_bytes(content)


def write_archive(path, name, form, monkeypatch):
    archive = next(file for file in cifar.FORMS[name].archives if form in file)
    with tarfile.open(path / archive, "w:gz") as tar:
        for file, content in WRITERS[form](name):
            entry = tarfile.TarInfo(f"cifar-batches/{file}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    digest = hashlib.md5((path / archive).read_bytes()).hexdigest()
    known = {**cifar.FORMS[name].archives, archive: digest}
    monkeypatch.setitem(cifar.FORMS, name, replace(cifar.FORMS[name], archives=known))
    return path / archive


def check_cifar(read, name):
    train, test, classes = read
    expected = list(parts(name))
    assert classes == cifar.FORMS[name].classes
    assert len(train[0]) == COUNTS[name][0]
    assert test[0].shape[1:] == (3, 32, 32)
    assert np.array_equal(test[0].numpy().reshape(-1, 3072), expected[-1][2])
    assert test[1].tolist() == expected[-1][3]
    assert train[1].tolist() == [label for *_, labels in expected[:-1] for label in labels]


# --- CIFAR


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("name", COUNTS)
def test_cifar_is_read_from_unpacked_files(name, form, tmp_path):
    write_folder(tmp_path / "cifar-unpacked", name, form)
    check_cifar(read_cifar(tmp_path, name), name)
    check_cifar(read_cifar(tmp_path / "cifar-unpacked", name), name)


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("name", COUNTS)
def test_cifar_is_read_from_the_archive_itself(name, form, tmp_path, monkeypatch):
    write_archive(tmp_path, name, form, monkeypatch)
    check_cifar(read_cifar(tmp_path, name), name)
    assert [path.suffix for path in tmp_path.iterdir()] == [".gz"]


def test_a_damaged_archive_is_told_by_its_checksum(tmp_path, monkeypatch):
    path = write_archive(tmp_path, "cifar10", "binary", monkeypatch)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DatasetError, match="its MD5 is"):
        read_cifar(tmp_path, "cifar10")


class Malicious:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_pickle_is_never_run(tmp_path):
    write_folder(tmp_path, "cifar10", "python")
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps({b"data": Malicious(tmp_path / "ran")}))
    with pytest.raises(DatasetError, match=r"data_batch_3 is not read: it names (posix|nt)\.mkdir"):
        read_cifar(tmp_path, "cifar10")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", [b"", b"\x80", b"garbage", pickle.dumps([1, 2]), pickle.dumps({b"data": 3, b"labels": [1]})]
)
def test_a_mangled_batch_is_named(content, tmp_path):
    write_folder(tmp_path, "cifar10", "python")
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(DatasetError, match="test_batch"):
        read_cifar(tmp_path, "cifar10")


def test_every_truncated_pickle_is_an_error_and_no_crash():
    content = pickle.dumps({b"data": pixels(2, 0), b"labels": [1, 2]}, protocol=2)
    for end in range(0, len(content), 97):
        with pytest.raises(pickle.UnpicklingError):
            unpickle.load(io.BytesIO(content[:end]), cifar.ARRAYS, encoding="bytes")


def test_missing_images_are_counted(tmp_path):
    write_folder(tmp_path, "cifar10", "binary")
    file = tmp_path / "data_batch_2.bin"
    file.write_bytes(file.read_bytes()[:3073])
    with pytest.raises(DatasetError, match="41 training images instead of 50"):
        read_cifar(tmp_path, "cifar10")


def test_a_record_that_is_cut_is_named(tmp_path):
    write_folder(tmp_path, "cifar10", "binary")
    file = tmp_path / "data_batch_2.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DatasetError, match=r"data_batch_2\.bin is not a CIFAR file"):
        read_cifar(tmp_path, "cifar10")


def test_a_label_out_of_range_is_an_error(tmp_path):
    write_folder(tmp_path, "cifar10", "binary")
    file = tmp_path / "test_batch.bin"
    file.write_bytes(b"\x0a" + file.read_bytes()[1:])
    with pytest.raises(DatasetError, match="label is 10, of 10 classes"):
        read_cifar(tmp_path, "cifar10")


@pytest.mark.parametrize("name", [name for name, kind in registry.DATASETS.items() if kind.layout])
def test_a_missing_data_set_is_answered_with_what_is_expected_and_from_where(name, tmp_path):
    network = "resnet18"
    for folder in (None, tmp_path, tmp_path / "none"):
        with pytest.raises(DatasetError) as caught:
            registry.source(name, folder, network, CPU)
        assert "https://" in str(caught.value) or name == "images"
        assert registry.DATASETS[name].layout in str(caught.value)


def test_a_folder_of_the_data_sets_name_is_found(tmp_path):
    write_folder(tmp_path / "cifar10", "cifar10", "binary")
    source = registry.source("cifar10", tmp_path, "resnet18", CPU)
    assert source.sample == (3, 32, 32)
    assert source.classes == 10


# --- Pathology


def write_image(path, value, size=(30, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), value, dtype=np.uint8)).save(path)


def write_mhist(folder, labels=("HP", "SSA", "HP"), splits=("train", "train", "test")):
    with (folder / "annotations.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        votes = "Number of Annotators who Selected SSA (Out of 7)"
        writer.writerow(["Image Name", "Majority Vote Label", votes, "Partition"])
        for index, (label, split) in enumerate(zip(labels, splits, strict=True)):
            write_image(folder / "images" / f"MHIST_{index}.png", 10 * index)
            writer.writerow([f"MHIST_{index}.png", label, 3, split])


def test_mhist_is_split_by_its_table(tmp_path):
    write_mhist(tmp_path)
    source = registry.source("mhist", tmp_path, "resnet18-imagenet", CPU)
    assert source.sample == (3, 224, 224)
    assert source._train.targets.tolist() == [0, 1]
    assert source._test.inputs.unique().tolist() == [20]


def test_mhist_with_a_third_label_is_refused(tmp_path):
    write_mhist(tmp_path, labels=("HP", "XX", "HP"))
    with pytest.raises(DatasetError, match="XX"):
        registry.source("mhist", tmp_path, "resnet18", CPU)


def test_an_image_that_is_missing_is_named(tmp_path):
    write_mhist(tmp_path)
    (tmp_path / "images" / "MHIST_1.png").unlink()
    with pytest.raises(DatasetError, match=r"MHIST_1\.png"):
        registry.source("mhist", tmp_path, "resnet18", CPU)


def write_adp(folder, rows=("1,0,1", "0,0,1", "1,1,0", "0,1,0"), train=(0, 2), test=(3,)):
    (folder / "splits").mkdir()
    lines = ["Patch Names,E,E.M,C"]
    for index, labels in enumerate(rows):
        write_image(folder / "img_res_1um_bicubic" / f"{index}.png", index)
        lines.append(f"{index}.png,{labels}")
    (folder / "ADP_EncodedLabels_Release1_Flat.csv").write_text("\n".join(lines) + "\n")
    np.save(folder / "splits" / "train.npy", np.array(train))
    np.save(folder / "splits" / "test.npy", np.array(test))


def test_adp_has_several_labels_an_image(tmp_path):
    write_adp(tmp_path)
    source = registry.source("adp", tmp_path, "resnet18-imagenet", CPU)
    assert source.several
    assert source.classes == 3
    assert source._train.targets.tolist() == [[1, 0, 1], [1, 1, 0]]
    assert source._test.inputs.unique().tolist() == [3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ("1,0,2", "0,0,1", "1,1,0", "0,1,0")}, "labels must be 0 or 1"),
        ({"rows": ("1,0,a", "0,0,1", "1,1,0", "0,1,0")}, "could not convert"),
        ({"rows": ("1,0", "0,0,1", "1,1,0", "0,1,0")}, "Flat.csv, line 2: 4 values are expected"),
        ({"rows": ("1,0,1", "0,0,1,1", "1,1,0", "0,1,0")}, "Flat.csv, line 3: 4 values are expected"),
        ({"rows": ()}, "Flat.csv has no row"),
        ({"test": (4,)}, "names row 4, and the table has 0 to 3"),
        ({"test": (-1, 2)}, "names row -1, and the table has 0 to 3"),
        ({"test": (0.5,)}, "must hold row numbers"),
    ],
)
def test_a_wrong_table_or_split_of_adp_is_refused(changes, message, tmp_path):
    write_adp(tmp_path, **changes)
    with pytest.raises(DatasetError, match=message):
        registry.source("adp", tmp_path, "resnet18", CPU)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", b"PK\x03\x04", b"0,1,2\n"])
def test_a_split_that_is_no_array_is_named(content, tmp_path):
    write_adp(tmp_path)
    (tmp_path / "splits" / "test.npy").write_bytes(content)
    with pytest.raises(DatasetError, match=r"test\.npy is not a plain array of numbers: .*Expected for adp"):
        registry.source("adp", tmp_path, "resnet18", CPU)


def test_an_archive_of_arrays_is_no_split(tmp_path):
    write_adp(tmp_path)
    with (tmp_path / "splits" / "test.npy").open("wb") as file:
        np.savez(file, rows=np.array([3]))
    with pytest.raises(DatasetError, match=r"test\.npy is not a plain array of numbers"):
        registry.source("adp", tmp_path, "resnet18", CPU)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no column Image Name"),
        ("Image Name,Majority Vote Label,Partition\nM\xfc.png,HP,train\n".encode("latin-1"), "UTF-8"),
        (
            b'Image Name,Majority Vote Label,Partition\n"' + b"a" * 200_000,
            "not a table of comma-separated values",
        ),
        (b"Image Name,Majority Vote Label,Partition\na.png,HP\n", "line 2: 3 values are expected"),
        (b"Image Name,Majority Vote Label,Partition\na.png,HP,valid\n", "a partition is 'valid'"),
    ],
)
def test_a_damaged_table_of_mhist_is_named(content, message, tmp_path):
    write_mhist(tmp_path)
    (tmp_path / "annotations.csv").write_bytes(content)
    with pytest.raises(DatasetError, match=rf"annotations\.csv.*{message}.*Expected for mhist"):
        registry.source("mhist", tmp_path, "resnet18", CPU)


def test_a_split_that_is_a_pickle_is_not_opened(tmp_path):
    write_adp(tmp_path)
    np.save(
        tmp_path / "splits" / "test.npy",
        np.array([Malicious(tmp_path / "ran")], dtype=object),
        allow_pickle=True,
    )
    with pytest.raises(DatasetError, match="not a plain array"):
        registry.source("adp", tmp_path, "resnet18", CPU)
    assert not (tmp_path / "ran").exists()


# --- ImageNet


@pytest.fixture
def imagenet(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for target, label in enumerate(("n01440764", "n01443537")):
            for index in range(count):
                image = np.random.default_rng(index).integers(256, size=(90, 120, 3), dtype=np.uint8)
                image[..., 0] = 200 * target
                path = tmp_path / split / label / f"{index}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path, format="JPEG", quality=95)
    (tmp_path / "train/n01440764/list.txt").write_text("no image")
    return tmp_path


def batches_of(source, **changes):
    return list(source.epoch(**{"size": 3, "seed": 0, "epoch": 0, "skip": 0, **changes}))


def test_imagenet_is_read_batch_by_batch_from_its_folders(imagenet):
    source = imagenet_set.load(imagenet, (64, 64), CPU)
    assert (source.classes, source.batches(3)) == (2, 2)
    ((images, targets),) = list(source.test())
    assert images.shape == (4, 3, 64, 64)
    assert targets.tolist() == [0, 0, 1, 1]
    red = images[:, 0].mean((1, 2))
    assert red[2:].min() > red[:2].max()


def test_streamed_batches_depend_on_seed_epoch_and_position_alone(imagenet):
    source = imagenet_set.load(imagenet, (64, 64), CPU)
    whole, rest = batches_of(source), batches_of(source, skip=1)
    assert torch.equal(whole[1][0], rest[0][0])
    assert not torch.equal(whole[0][0], batches_of(source, epoch=1)[0][0])
    assert not torch.equal(whole[0][0], batches_of(source, seed=1)[0][0])


def test_a_crop_lies_in_its_image():
    random = np.random.default_rng(0)
    for size in ((500, 375), (20, 900), (64, 64)) * 50:
        (left, top, right, bottom), _ = imagenet_set.crop(size, random)
        assert -1e-9 <= left < right <= size[0] + 1e-9
        assert -1e-9 <= top < bottom <= size[1] + 1e-9


def test_a_validation_class_that_is_not_trained_is_named(imagenet):
    (imagenet / "val" / "n99").mkdir()
    with pytest.raises(DatasetError, match="n99"):
        imagenet_set.load(imagenet, (64, 64), CPU)


def test_an_image_that_cannot_be_decoded_is_named(imagenet):
    (imagenet / "val/n01440764/0.JPEG").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"0\.JPEG"):
        list(imagenet_set.load(imagenet, (64, 64), CPU).test())


# --- NATS-Bench


def write_nats(folder, index, accuracy, weights=True):
    torch.manual_seed(index)
    trained = OrderedDict(
        {"stem.0.weight": torch.randn(16, 3, 3, 3), "classifier.weight": torch.randn(10, 16)}
    )

    def result(name, epochs, test):
        return {
            "name": "infer.shape.tiny",
            "net_state_dict": trained if weights else None,
            "train_acc1es": {i: accuracy + i for i in range(epochs)},
            "eval_acc1es": {f"{test}@{i}": np.float64(accuracy - 5 + i) for i in range(epochs)},
            "epochs": epochs,
        }

    content = {
        str(epochs).zfill(2): {
            "arch_index": index,
            "dataset_seed": {"cifar10": [777]},
            "all_results": OrderedDict(
                {
                    ("cifar10-valid", 777): result("cifar10-valid", epochs, "x-valid"),
                    ("cifar10", 777): result("cifar10", epochs, "ori-test"),
                }
            ),
        }
        for epochs in (1, 12)
    }
    with bz2.open(folder / f"{index:06d}.pickle.pbz2", "wb") as file:
        pickle.dump(content, file, protocol=4)


def test_nats_gives_weights_and_accuracies_of_the_last_epoch(tmp_path):
    write_nats(tmp_path, 3, 60.0)
    first, second = nats.read(nats.files(tmp_path)[0])
    assert (first.index, first.epochs, first.seed, second.epochs) == (3, 1, 777, 12)
    assert (first.train_accuracy, first.test_accuracy) == (0.60, 0.55)
    assert (second.train_accuracy, second.test_accuracy) == (0.71, 0.66)
    assert first.weights["stem.0.weight"].shape == (16, 3, 3, 3)


def test_code_in_a_nats_file_is_never_run(tmp_path):
    with bz2.open(tmp_path / "000000.pickle.pbz2", "wb") as file:
        pickle.dump({"12": Malicious(tmp_path / "ran")}, file)
    with pytest.raises(DatasetError, match="mkdir"):
        list(nats.read(tmp_path / "000000.pickle.pbz2"))
    assert not (tmp_path / "ran").exists()


def test_a_nats_archive_without_weights_says_which_is_needed(tmp_path):
    write_nats(tmp_path, 0, 50.0, weights=False)
    with pytest.raises(DatasetError, match="-full archive"):
        list(nats.read(nats.files(tmp_path)[0]))


def test_nats_networks_are_measured_correlated_and_drawn_and_a_second_call_goes_on(tmp_path, capsys):
    for index in range(4):
        write_nats(tmp_path, index, 50.0 + index)
    out = tmp_path / "out"
    assert main(["study", "nats", str(tmp_path), "--out", str(out), "--most", "3"]) == 0
    table = out / "nats-cifar10.csv"
    first = table.read_text()
    assert len(first.splitlines()) == 1 + 3 * 2
    table.write_text(first[:-10])  # stopped in the middle of a row
    assert main(["study", "nats", str(tmp_path), "--out", str(out)]) == 0
    assert table.read_text().startswith(first)
    assert len(table.read_text().splitlines()) == 1 + 4 * 2
    assert "ROCC" in capsys.readouterr().out
    assert (out / "nats-cifar10.png").stat().st_size > 5000


def test_without_matplotlib_the_networks_of_nats_are_measured_all_the_same(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for index in range(3):
        write_nats(tmp_path, index, 50.0 + index)
    assert main(["study", "nats", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert "ROCC" in out
    assert "no figures: figures need matplotlib" in err
    assert [path.name for path in (tmp_path / "out").glob("nats*")] == ["nats-cifar10.csv"]


def test_a_nats_study_that_is_killed_keeps_its_rows_and_goes_on(tmp_path):
    for index in range(4):
        write_nats(tmp_path, index, 50.0 + index)
    table, whole = tmp_path / "table.csv", tmp_path / "whole.csv"
    nats_study.measure(tmp_path, whole, "cifar10")
    assert killed_measuring(tmp_path, table, 2) == -signal.SIGKILL
    kept = table.read_text()
    assert kept == "".join(whole.read_text().splitlines(keepends=True)[: 1 + 2 * 2])
    # Killed before anything new was measured: nothing is lost.
    assert killed_measuring(tmp_path, table, 1) == -signal.SIGKILL
    assert table.read_text() == kept
    assert nats_study.measure(tmp_path, table, "cifar10") == nats_study.measure(tmp_path, whole, "cifar10")
    assert table.read_text() == whole.read_text()


def test_a_table_that_ends_anywhere_in_a_row_is_gone_on_with(tmp_path):
    for index in range(2):
        write_nats(tmp_path, index, 50.0 + index)
    table = tmp_path / "table.csv"
    nats_study.measure(tmp_path, table, "cifar10")
    whole = table.read_text()
    for end in range(len(whole.rstrip().rpartition("\n")[0]), len(whole)):
        table.write_text(whole[:end])
        nats_study.measure(tmp_path, table, "cifar10")
        assert table.read_text() == whole


def test_a_table_of_something_else_is_not_overwritten(tmp_path):
    write_nats(tmp_path, 0, 50.0)
    table = tmp_path / "table.csv"
    table.write_text("index,colour\n1,red\n")
    with pytest.raises(DatasetError, match=r"table\.csv is not a table of `study nats`"):
        nats_study.measure(tmp_path, table, "cifar10")
    assert table.read_text() == "index,colour\n1,red\n"


def test_two_processes_never_measure_into_one_table(tmp_path, capsys):
    write_nats(tmp_path, 0, 50.0)
    command = ["study", "nats", str(tmp_path), "--out", str(tmp_path)]
    with locked(tmp_path, name=".nats-cifar10.csv.lock"):
        assert main(command) == 1
    assert "another process is at" in capsys.readouterr().err
    with locked(tmp_path, name=".nats-cifar100.csv.lock"):
        assert main(command) == 0


def test_a_truncated_nats_file_and_an_empty_folder_are_errors(tmp_path):
    with pytest.raises(DatasetError, match="NATS-sss"):
        nats.files(tmp_path)
    write_nats(tmp_path, 0, 50.0)
    path = nats.files(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DatasetError, match="is not read"):
        list(nats.read(path))


# --- Batches


def source_of(count=20, **augmentation):
    images = torch.arange(count * 3 * 8 * 8, dtype=torch.int64).remainder(251).to(torch.uint8)
    split = Split(images.view(count, 3, 8, 8), torch.arange(count))
    return InMemory(split, Split(split.inputs[:5], split.targets[:5]), count, Augmentation(**augmentation))


def test_batches_in_memory_depend_on_seed_epoch_and_position_alone():
    source = source_of(pad=2, flip=True)
    whole, rest = batches_of(source), batches_of(source, skip=4)
    assert len(whole) == source.batches(3) == 6
    for (images, targets), (same, labels) in zip(whole[4:], rest, strict=True):
        assert torch.equal(images, same)
        assert torch.equal(targets, labels)
    seen = torch.cat([targets for _, targets in whole]).tolist()
    assert len(set(seen)) == len(seen) == 18
    assert not torch.equal(whole[0][1], batches_of(source, epoch=1)[0][1])


def test_bytes_are_normalised_by_the_training_sets_channels():
    source = source_of()
    images = torch.cat([images for images, _ in batches_of(source, size=20)])
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(1001, 750), (750, 1001), (2049, 1536)])
def test_any_crop_of_a_jpeg_of_any_size_is_decoded(tmp_path, size):
    path = tmp_path / "image.jpg"
    Image.new("RGB", size, (200, 100, 50)).save(path)
    images = imagenet_set.Images([(path, 3)] * 150, (32, 32), range(150))
    for index in range(len(images)):
        pixels, target = images[index]
        assert pixels.shape == (3, 32, 32)
        assert target == 3
        assert abs(int(pixels[0].float().mean()) - 200) < 4


def test_a_pass_over_images_leaves_torchs_random_numbers_alone(tmp_path):
    path = tmp_path / "image.png"
    Image.new("RGB", (40, 30)).save(path)
    source = imagenet_set.Streamed([(path, 0)] * 8, [(path, 0)], 1, (8, 8), torch.device("cpu"))
    before = torch.get_rng_state()
    assert len(list(source.epoch(4, seed=0, epoch=0, skip=0))) == 2
    assert torch.equal(torch.get_rng_state(), before)


def test_a_held_out_fifth_is_always_the_same_and_is_not_trained_on():
    source = source_of()
    held = [targets for _, targets in source.with_holdout().test()]
    again = [targets for _, targets in source.with_holdout().test()]
    trained = [targets for _, targets in batches_of(source.with_holdout(), size=16)]
    assert torch.equal(torch.cat(held), torch.cat(again))
    assert sorted(torch.cat(held + trained).tolist()) == list(range(20))


def test_seeds_of_different_parts_differ():
    parts = [(a, b, c) for a in range(5) for b in range(20) for c in range(20)]
    assert len({mix(*part) for part in parts}) == len(parts)
    assert len({mix(1), mix(1, 0), mix(0, 1), mix(0, 0, 1)}) == 4


# --- Augmentation


def test_a_crop_moves_every_image_by_itself_and_fills_with_zeros():
    images = torch.arange(1.0, 1 + 64).view(1, 1, 8, 8).expand(500, 1, 8, 8)
    generator = torch.Generator().manual_seed(0)
    cropped = crop_and_flip(images, 2, False, generator)
    padded = torch.nn.functional.pad(images[0, 0], (2, 2, 2, 2))
    windows = {(y, x): padded[y : y + 8, x : x + 8] for y in range(5) for x in range(5)}
    found = [
        next(place for place, window in windows.items() if torch.equal(window, image[0])) for image in cropped
    ]
    assert set(found) == set(windows)


def test_even_odds_mirror_an_image():
    images = torch.arange(8.0).view(1, 1, 1, 8).expand(2000, 1, 8, 8)
    flipped = crop_and_flip(images, 0, True, torch.Generator().manual_seed(0))
    mirrored = (flipped == images.flip(3)).all((1, 2, 3))
    assert (mirrored | (flipped == images).all((1, 2, 3))).all()
    assert 900 < int(mirrored.sum()) < 1100


def test_a_hole_is_a_square_around_a_place_anywhere_in_the_image():
    images = torch.ones(4000, 3, 12, 12)
    holed = cutout(images.clone(), 4, torch.Generator().manual_seed(0))
    assert ((holed == 0).any(1) == (holed == 0).all(1)).all()
    sizes = (holed[:, 0] == 0).sum((1, 2))
    assert sizes.max() == 16
    assert sizes.min() == 4  # a quarter of it, in a corner: centre - 2 to centre + 1
    assert (holed[:, 0] == 0).float().mean(0).min() > 0
