"""Checkpoints are read a tensor at a time, in every common form, and never executed."""

import argparse
import gzip
import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import save_file
from torch import distributed, nn

import rmsgd
from rmsgd.inspection.reading.checkpoints import open_checkpoint
from rmsgd.inspection.reading.natural_order import natural_order
from rmsgd.inspection.reading.networks import WRAPPERS, find_network
from rmsgd.inspection.reading.stored import CheckpointError


def weights():
    return {f"layers.{i}.weight": torch.randn(6, 8) for i in (0, 2, 10)}


def adam():
    """The state dict of an optimizer that has taken a step."""
    parameter = nn.Parameter(torch.randn(4, 4))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def names(report):
    return [layer.name for layer in report.layers]


class Malicious:
    """An object that would make a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


# -- forms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".anything"])
def test_a_torch_file_is_told_by_its_content(tmp_path, suffix):
    torch.save(weights(), tmp_path / f"model{suffix}")
    assert names(rmsgd.probe(tmp_path / f"model{suffix}")) == list(weights())


def test_a_file_from_before_torch_1_6_is_read(tmp_path):
    torch.save(weights(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert names(rmsgd.probe(str(tmp_path / "old.pt"))) == list(weights())


def test_a_safetensors_file_is_put_in_natural_order(tmp_path):
    save_file(weights(), tmp_path / "model.safetensors")
    assert names(rmsgd.probe(tmp_path / "model.safetensors")) == list(weights())


def test_files_and_memory_give_the_same_report(tmp_path):
    state = weights()
    torch.save(state, tmp_path / "model.pt")
    save_file(state, tmp_path / "model.safetensors")
    expected = rmsgd.probe(state)
    assert rmsgd.probe(tmp_path / "model.pt") == expected
    assert rmsgd.probe(tmp_path / "model.safetensors") == expected


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
def test_the_state_dict_inside_a_training_checkpoint_is_found(tmp_path, key):
    torch.save(
        {key: weights(), "epoch": 3, "optimizer": adam(), "ema": {"w": torch.randn(4, 4)}},
        tmp_path / "last.ckpt",
    )
    assert names(rmsgd.probe(tmp_path / "last.ckpt")) == list(weights())


def test_several_networks_are_kept_apart_and_optimizers_left_out():
    tree = {
        "generator": {"w": torch.randn(4, 4)},
        "critic": {"w": torch.randn(4, 4)},
        "optimizer": {"state": {0: {"exp_avg": torch.randn(4, 4)}}, "param_groups": []},
    }
    assert list(find_network(tree).tensors) == ["generator.w", "critic.w"]


def test_an_optimizers_file_holds_no_weights(tmp_path):
    torch.save(adam(), tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt: no weights in it"):
        rmsgd.probe(tmp_path / "optimizer.pt")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_stay_the_keys_as_stored(tmp_path, prefix):
    torch.save({f"{prefix}fc.weight": torch.randn(4, 4)}, tmp_path / "model.pt")
    assert names(rmsgd.probe(tmp_path / "model.pt")) == [f"{prefix}fc.weight"]


def test_what_training_scripts_put_beside_the_weights_is_harmless(tmp_path):
    beside = {"args": argparse.Namespace(lr=0.1), "best": np.float64(0.9), "rng": np.random.get_state()}
    torch.save({"model": weights(), **beside}, tmp_path / "last.pth")
    assert names(rmsgd.probe(tmp_path / "last.pth")) == list(weights())


# -- folders -------------------------------------------------------------------------------------


def shards(folder, save=save_file, suffix="safetensors"):
    """Two shards and their index."""
    state = weights()
    keys = list(state)
    files = [f"model-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    save({k: state[k] for k in keys[:1]}, folder / files[0])
    save({k: state[k] for k in keys[1:]}, folder / files[1])
    index = {"weight_map": {k: files[i > 0] for i, k in enumerate(keys)}}
    (folder / f"model.{suffix}.index.json").write_text(json.dumps(index))
    return files


@pytest.mark.parametrize(("save", "suffix"), [(save_file, "safetensors"), (torch.save, "bin")])
def test_a_folder_of_shards_is_one_model(tmp_path, save, suffix):
    shards(tmp_path, save, suffix)
    assert names(rmsgd.probe(tmp_path)) == list(weights())
    assert names(rmsgd.probe(tmp_path / f"model.{suffix}.index.json")) == list(weights())


def test_a_folder_without_an_index_is_read_too(tmp_path):
    shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert names(rmsgd.probe(tmp_path)) == list(weights())


@pytest.mark.parametrize("indexed", [True, False])
def test_a_missing_shard_is_named_and_the_others_are_measured(tmp_path, indexed):
    files = shards(tmp_path)
    (tmp_path / files[0]).unlink()
    if not indexed:
        (tmp_path / "model.safetensors.index.json").unlink()
    report = rmsgd.probe(tmp_path)
    assert names(report) == list(weights())[1:]
    assert len(report.errors) == 1
    assert files[0] in report.errors[0]


def test_very_many_missing_shards_are_one_line(tmp_path):
    save_file(weights(), tmp_path / "model-00001-of-99999999999.safetensors")
    report = rmsgd.probe(tmp_path)
    assert names(report) == list(weights())
    [error] = report.errors
    assert "most of its 99999999999 shards are missing" in error


def test_a_shard_whose_name_no_file_can_have_is_missing(tmp_path):
    shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"] | {"w": "x" * 5000}
    index.write_text(json.dumps({"weight_map": listed}))
    report = rmsgd.probe(tmp_path)
    assert names(report) == list(weights())
    assert len(report.errors) == 1
    assert "missing shard" in report.errors[0]


def test_one_bad_shard_leaves_the_others(tmp_path):
    files = shards(tmp_path)
    (tmp_path / files[1]).write_bytes((tmp_path / files[1]).read_bytes()[:-20])
    report = rmsgd.probe(tmp_path)
    assert names(report) == list(weights())[:1]
    assert files[1] in report.errors[0]


def test_an_index_cannot_point_outside_its_folder(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "../model.safetensors"}}')
    with pytest.raises(CheckpointError, match="outside its folder"):
        rmsgd.probe(tmp_path)


def test_a_folder_of_several_checkpoints_is_not_one_model(tmp_path):
    for epoch in (1, 2):
        torch.save(weights(), tmp_path / f"epoch_{epoch}.pt")
    report = rmsgd.probe(tmp_path)
    assert "not shards of one model" in report.errors[0]


def test_a_trainers_folder_is_its_models_layers_and_no_error(tmp_path):
    beside = {
        "optimizer.pt": adam(),
        "scheduler.pt": {"base_lrs": [0.1], "last_epoch": 3},
        "scaler.pt": {"scale": 65536.0, "growth_factor": 2.0},
        "rng_state_0.pth": {"numpy": np.random.get_state(), "cpu": torch.get_rng_state()},
        "rng_state_1.pth": {"numpy": np.random.get_state(), "cpu": torch.get_rng_state()},
        "training_args.bin": Malicious(tmp_path / "executed"),
    }
    for name, content in {"pytorch_model.bin": weights(), **beside}.items():
        torch.save(content, tmp_path / name)
    report = rmsgd.probe(tmp_path)
    assert names(report) == list(weights())
    assert report.errors == ()


# -- bad input -----------------------------------------------------------------------------------


def cut(path, save):
    save({"w": torch.randn(64, 64)}, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def holding_itself(key):
    content = {"w": torch.randn(4, 4)}
    content[key] = {"inner": content}
    return content


def shared_tenfold(keys):
    """Every level holds the next under all the keys: a small file, and 10^8 ways to its innermost mapping."""
    inner = {"step": 1}
    for _ in range(8):
        inner = dict.fromkeys(keys, inner)
    return inner


BAD = {
    "truncated.pt": lambda path: cut(path, torch.save),
    "truncated.safetensors": lambda path: cut(path, save_file),
    "text.pt": lambda path: path.write_text("epoch 1: loss 2.3\n" * 50),
    "text.safetensors": lambda path: path.write_text("epoch 1: loss 2.3\n" * 50),
    "empty.pt": lambda path: path.touch(),
    "noise.pt": lambda path: path.write_bytes(np.random.default_rng(0).bytes(4000)),
    "keras.h5": lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)),
    "pointer.safetensors": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "biases.pt": lambda path: torch.save({"bias": torch.zeros(4)}, path),
    "settings.pt": lambda path: torch.save({"lr": 0.1}, path),
    "number.pt": lambda path: torch.save(3, path),
    "list.pt": lambda path: torch.save([torch.zeros(4, 4)], path),
    "pipe.pt": os.mkfifo,
    "holds itself as the model.pt": lambda path: torch.save(holding_itself("model"), path),
    "holds itself as another.pt": lambda path: torch.save(holding_itself("other"), path),
    "sharing its wrappers.pt": lambda path: torch.save(shared_tenfold(WRAPPERS), path),
    "sharing others.pt": lambda path: torch.save(shared_tenfold("abcdefghij"), path),
    "deep.index.json": lambda path: path.write_text("[" * 100_000),
    "bomb.pt.gz": lambda path: path.write_bytes(gzip.compress(bytes(70 << 20))),
    "gzip in gzip.pt": lambda path: path.write_bytes(gzip.compress(gzip.compress(bytes(100)))),
    "cut.pt.gz": lambda path: path.write_bytes(gzip.compress(os.urandom(1000))[:-20]),
    "cut.npz": lambda path: cut(path, lambda content, file: np.savez(file, **content)),
    "version.gguf": lambda path: path.write_bytes(b"GGUF" + bytes([9, 0, 0, 0]) + bytes(100)),
    "cut.gguf": lambda path: path.write_bytes(b"GGUF" + bytes([3, 0, 0, 0]) + b"\xff" * 16),
    "cut.onnx": lambda path: path.write_bytes(b"\x08\x08\x3a\x7f"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_one_line_that_names_the_file(tmp_path, name):
    BAD[name](tmp_path / name)
    with pytest.raises(CheckpointError) as error:
        rmsgd.probe(tmp_path / name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_torch_file_that_was_cut_is_called_incomplete(tmp_path):
    cut(tmp_path / "model.pt", torch.save)
    with pytest.raises(CheckpointError, match=r"model\.pt: not a complete torch file"):
        rmsgd.probe(tmp_path / "model.pt")


def test_only_an_optimizers_or_unnamed_tensors_are_no_named_tensors_of_a_model(tmp_path):
    for content in (adam(), [torch.zeros(4, 4)]):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(CheckpointError, match="no named tensors of a model"):
            rmsgd.probe(tmp_path / "other.pt")


def test_a_distributed_checkpoint_is_answered_with_the_command_that_makes_a_file_of_it(tmp_path):
    distributed.checkpoint.save({"model": weights()}, checkpoint_id=tmp_path / "dcp")
    with pytest.raises(CheckpointError, match=r"distributed checkpoint.* dcp_to_torch") as error:
        rmsgd.probe(tmp_path / "dcp")
    command = shlex.split(str(error.value).rpartition(": ")[2].replace("FILE", str(tmp_path / "model.pt")))
    subprocess.run([sys.executable, *command[1:]], check=True)
    assert names(rmsgd.probe(tmp_path / "model.pt")) == list(weights())


@pytest.mark.parametrize(
    "path", ["https://host/model.pt", "s3://bucket/model.safetensors", "\\\\host\\model.pt"]
)
def test_a_network_path_is_refused(path):
    with pytest.raises(CheckpointError, match="not a path on this machine"):
        open_checkpoint(path)


def test_a_link_that_leads_nowhere_says_where_it_leads(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("blobs/model")
    with pytest.raises(CheckpointError, match="a link to blobs/model, which leads to no file"):
        rmsgd.probe(tmp_path / "model.safetensors")


def test_a_path_to_nothing_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        rmsgd.probe(tmp_path / "nothing.pt")


@pytest.mark.parametrize("path", ["x" * 5000, "~nobody-of-this-name/model.pt"])
def test_a_path_that_no_file_can_have_is_one_line(path):
    with pytest.raises(CheckpointError, match=r"^[^\n]+$"):
        rmsgd.probe(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_refused_and_not_executed(tmp_path, zipped):
    content = {"weight": torch.randn(4, 4), "extra": Malicious(tmp_path / "executed")}
    torch.save(content, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="refused: it holds code"):
        rmsgd.probe(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


def test_code_is_not_executed_either_where_the_environment_asks_torch_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"extra": Malicious(tmp_path / "executed")}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="refused"):
        rmsgd.probe(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


def test_an_unknown_dtype_in_a_safetensors_file_is_one_line(tmp_path):
    path = tmp_path / "future.safetensors"
    save_file({"w": torch.zeros(4, 4)}, path)
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F31"'))
    with pytest.raises(CheckpointError, match=r"future\.safetensors: .*(F31|InvalidHeader)"):
        rmsgd.probe(path)


# -- memory --------------------------------------------------------------------------------------

PEAK = """
import resource, sys
import rmsgd
rmsgd.probe({"w": __import__("torch").randn(64, 64)})  # loads what every probe needs
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = rmsgd.probe(sys.argv[1])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(len(report.measured), (after - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
@pytest.mark.parametrize("form", ["safetensors", "torch", "shards of safetensors"])
def test_a_checkpoint_of_2_gb_is_read_in_less_than_200_mb_over_the_largest_tensors_workspace(tmp_path, form):
    rows, columns, layers = 512, 16384, 64
    state = {f"layers.{i}.weight": torch.randn(rows, columns) for i in range(layers)}
    assert sum(weight.nbytes for weight in state.values()) >= 2 * 1024**3
    path = tmp_path / ("model.pt" if form == "torch" else "model.safetensors")
    if form == "torch":
        torch.save(state, path)
    elif form == "safetensors":
        save_file(state, path)
    else:
        path = tmp_path
        for part in range(4):
            shard = {k: v for i, (k, v) in enumerate(state.items()) if i % 4 == part}
            save_file(shard, tmp_path / f"model-0000{part + 1}-of-00004.safetensors")
    del state
    done = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True)
    measured, grown = map(int, done.stdout.split())
    workspace = rows * columns * 4 + 2 * rows * rows * 8  # the tensor, and its Gram matrix twice
    assert measured == layers
    assert grown < workspace + 200e6


def test_natural_order_counts_numbers_as_numbers():
    assert sorted(["b.10", "b.9", "a.11", "b"], key=natural_order) == ["a.11", "b", "b.9", "b.10"]
    assert natural_order("b.007") == natural_order("b.7")
    many = "1" * 5000  # digits, more than Python turns into a number
    assert sorted([f"b.{many}", "b.9"], key=natural_order) == ["b.9", f"b.{many}"]
