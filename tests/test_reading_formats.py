"""Every known file format is read, and a format that is not read is named."""

import gc
import gzip
import io
import json
import zipfile

import numpy as np
import pytest
import torch
from model_files import branches, constant, entry, gguf, initialiser, message, onnx, q8_0, raw, varint
from safetensors.torch import save_file
from torch import nn

import rmsgd
from rmsgd.inspection.probing import Probing
from rmsgd.inspection.reading.file_format import FileFormat, OpenFile
from rmsgd.inspection.reading.formats import FORMATS
from rmsgd.inspection.reading.stored import CheckpointError
from rmsgd.inspection.selection import Selection

WEIGHT = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))


def names(report):
    return [layer.name for layer in report.layers]


def reasons(report):
    return {layer.name: layer.skipped for layer in report.layers}


def assert_is_read(path, name="w", weight=WEIGHT, **options):
    assert torch.equal(Probing(path, Selection(**options)).weight(name), weight)


# -- NumPy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_numpy_archive_is_read(tmp_path, save):
    save(tmp_path / "m.npz", w=WEIGHT.numpy(), b=np.zeros(4, "f4"))
    assert names(rmsgd.probe(tmp_path / "m.npz")) == ["w"]
    assert_is_read(tmp_path / "m.npz")


def test_arrays_in_any_order_and_type_are_read(tmp_path):
    array = WEIGHT.numpy()
    forms = {"fortran": np.asfortranarray(array), "big": array.astype(">f4"), "double": array.astype("f8")}
    np.savez(tmp_path / "m.npz", **forms)
    probing = Probing(tmp_path / "m.npz")
    for name in forms:
        assert torch.equal(probing.weight(name).float(), WEIGHT)


def test_a_single_array_is_a_layer(tmp_path):
    np.save(tmp_path / "w.npy", WEIGHT.numpy())
    assert_is_read(tmp_path / "w.npy", "array")


def test_an_array_of_objects_is_not_unpickled(tmp_path):
    np.savez(tmp_path / "m.npz", w=WEIGHT.numpy(), odd=np.array([[{}, []]], dtype=object))
    assert reasons(rmsgd.probe(tmp_path / "m.npz")) == {"w": None, "odd": "an array of Python objects"}


def test_kernels_of_flax_and_keras_have_their_channels_first(tmp_path):
    kernel = torch.randn(3, 3, 5, 7)  # height, width, inputs, outputs
    np.savez(tmp_path / "m.npz", **{"conv/kernel": kernel.numpy(), "conv/weight": kernel.numpy()})
    assert_is_read(tmp_path / "m.npz", "conv/kernel", kernel.permute(3, 2, 0, 1))
    assert_is_read(tmp_path / "m.npz", "conv/weight", kernel)


# -- GGUF ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", [32, 64])
def test_a_gguf_file_is_read_in_plain_numbers_and_in_blocks_of_eight_bits(tmp_path, alignment):
    codes = torch.randint(-127, 128, (4, 64), dtype=torch.int8)
    scales = torch.rand(8)
    tensors = {
        "single": (0, (6, 8), raw(WEIGHT)),
        "half": (1, (6, 8), raw(WEIGHT.half())),
        "brain": (30, (6, 8), raw(WEIGHT.bfloat16())),
        "blocks": (8, (4, 64), q8_0(codes, scales)),
        "packed": (12, (4, 256), bytes(576)),
        "future": (99, (4, 256), bytes(64)),
    }
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(tensors, alignment))
    assert_is_read(path, "single")
    assert_is_read(path, "half", WEIGHT.half())
    assert_is_read(path, "brain", WEIGHT.bfloat16())
    expected = (codes.view(8, 32).double() * scales.half().double()[:, None]).view(4, 64)
    assert torch.equal(Probing(path).weight("blocks").double(), expected.float().double())
    skipped = reasons(rmsgd.probe(path))
    assert skipped["packed"].startswith("Q4_K: packed weights")
    assert skipped["future"].startswith("encoding 99")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", [float("inf"), float("nan")])
def test_a_scale_in_a_gguf_file_that_is_no_number_is_a_reason_and_no_warning(tmp_path, scale):
    codes = torch.arange(-64, 64, dtype=torch.int8)
    blocks = (8, (4, 32), q8_0(codes, torch.tensor([1.0, scale, 1.0, 1.0])))
    (tmp_path / "m.gguf").write_bytes(gguf({"w": blocks, "sound": (0, (6, 8), raw(WEIGHT))}))
    assert reasons(rmsgd.probe(tmp_path / "m.gguf")) == {"w": "NaN or infinite entries", "sound": None}


# -- bad arrays in NumPy's files -------------------------------------------------------------------


def test_an_array_whose_type_torch_lacks_is_a_reason(tmp_path):
    odd = [name for name in ("g", "datetime64[s]") if np.dtype(name) not in map(np.dtype, "fd")]
    np.savez(
        tmp_path / "m.npz", w=WEIGHT.numpy(), **{f"x{i}": np.zeros((3, 3), t) for i, t in enumerate(odd)}
    )
    found = reasons(rmsgd.probe(tmp_path / "m.npz"))
    assert found.pop("w") is None
    assert len(found) == len(odd)
    assert all("which torch does not know" in reason for reason in found.values())


def test_an_array_that_is_cut_short_could_not_be_read(tmp_path):
    np.save(tmp_path / "w.npy", WEIGHT.numpy())
    content = (tmp_path / "w.npy").read_bytes()
    (tmp_path / "w.npy").write_bytes(content[:-8])
    report = rmsgd.probe(tmp_path / "w.npy")
    assert reasons(report) == {"array": "could not be read"}
    assert "cut short" in report.errors[0]
    (tmp_path / "w.npy").write_bytes(content.replace(b"(6, 8)", b"(-6,8)"))
    with pytest.raises(CheckpointError, match=r"impossible shape \(-6, 8\)"):
        rmsgd.probe(tmp_path / "w.npy")


# -- ONNX ----------------------------------------------------------------------------------------


def test_the_initialisers_of_an_onnx_file_are_read(tmp_path):
    listed = WEIGHT.double().numpy().astype("<f4").tobytes()
    path = tmp_path / "m.onnx"
    path.write_bytes(
        onnx(
            initialiser("raw", 1, (6, 8), message(9, raw(WEIGHT))),
            initialiser("half", 10, (6, 8), message(9, raw(WEIGHT.half()))),
            initialiser("listed", 1, (6, 8), message(4, listed)),
            initialiser("short", 1, (6, 8), message(9, raw(WEIGHT)[:-4])),
            initialiser("packed", 22, (6, 8), message(9, bytes(24))),
            initialiser("one by one", 1, (6, 8), *[varint(4 << 3 | 5) + bytes(4)] * 48),
        )
    )
    assert_is_read(path, "raw")
    assert_is_read(path, "listed")
    assert_is_read(path, "half", WEIGHT.half())
    skipped = reasons(rmsgd.probe(path))
    assert "not stored as plain bytes" in skipped["short"]
    assert "not stored as plain bytes" in skipped["one by one"]
    assert "ONNX type 22" in skipped["packed"]


def test_the_weights_of_an_onnx_file_may_lie_in_nodes_and_in_branches(tmp_path):
    weight = message(9, raw(WEIGHT))
    path = tmp_path / "m.onnx"
    inner = constant("deep", 1, (6, 8), weight)
    path.write_bytes(
        onnx(
            constant("axes", 7, (2,), message(7, bytes(2))),
            constant("node", 1, (6, 8), weight),
            branches(
                initialiser("w", 1, (6, 8), weight), initialiser("w", 1, (6, 8), weight) + branches(inner)
            ),
        )
    )
    assert reasons(rmsgd.probe(path)) == {"node": None, "w": None, "w#2": None, "deep": None}
    for name in ("node", "w", "w#2", "deep"):
        assert_is_read(path, name)


def test_an_onnx_file_of_graphs_within_graphs_is_refused(tmp_path):
    graph = constant("w", 1, (6, 8), message(9, raw(WEIGHT)))
    for _ in range(100):
        graph = branches(graph)
    (tmp_path / "m.onnx").write_bytes(onnx(graph))
    with pytest.raises(CheckpointError, match="graphs within graphs"):
        rmsgd.probe(tmp_path / "m.onnx")


def test_numbers_in_a_file_beside_an_onnx_file_are_read(tmp_path):
    (tmp_path / "w.data").write_bytes(bytes(16) + raw(WEIGHT))
    where = entry("location", "w.data") + entry("offset", "16")
    (tmp_path / "m.onnx").write_bytes(onnx(initialiser("w", 1, (6, 8), where)))
    assert_is_read(tmp_path / "m.onnx")


@pytest.mark.parametrize("place", ["../secret", "/etc/passwd", "link", "missing", "folder", ""])
def test_an_onnx_file_cannot_point_outside_its_folder(tmp_path, place):
    (tmp_path / "secret").write_bytes(raw(WEIGHT))
    here = tmp_path / "here"
    (here / "folder").mkdir(parents=True)
    (here / "link").symlink_to(tmp_path / "secret")
    sound = initialiser("sound", 1, (6, 8), message(9, raw(WEIGHT)))
    (here / "m.onnx").write_bytes(onnx(sound, initialiser("w", 1, (6, 8), entry("location", place))))
    report = rmsgd.probe(here / "m.onnx")
    assert reasons(report) == {"sound": None, "w": "could not be read"}
    assert len(report.errors) == 1
    assert "m.onnx: w cannot be read" in report.errors[0]


# -- torch ---------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        self.head = nn.Linear(8, 4)
        self.register_buffer("table", torch.randn(5, 5))

    def forward(self, x):
        return self.head(self.model(x).mean((2, 3)))


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::DeprecationWarning")
@pytest.mark.parametrize("form", ["script", "trace", "frozen", "mobile"])
def test_a_torchscript_archive_is_read_without_its_code(tmp_path, form):
    block = Block().eval()
    path = tmp_path / "script.pt"
    scripted = torch.jit.script(block)
    if form == "trace":
        scripted = torch.jit.trace(block, torch.randn(1, 3, 8, 8))
    elif form == "frozen":
        scripted = torch.jit.freeze(scripted)
    if form == "mobile":
        scripted._save_for_lite_interpreter(str(path))
    else:
        scripted.save(path)
    report = rmsgd.probe(path)
    shapes = {layer.shape for layer in report.layers}
    assert {(8, 3, 3, 3), (4, 8)} <= shapes
    if form != "frozen":
        assert {"model.0.weight", "head.weight"} <= set(names(report))
        assert_is_read(path, "head.weight", block.head.weight.detach())


def test_a_views_numbers_and_not_its_whole_storage_are_read(tmp_path):
    whole = torch.randn(40, 40)
    views = {"part": whole[5:10, 3:30:2], "transposed": whole.t(), "again": whole.t()}
    for zipped in (True, False):
        torch.save(views, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
        assert_is_read(tmp_path / "m.pt", "part", views["part"])
        assert_is_read(tmp_path / "m.pt", "transposed", views["transposed"])
        assert reasons(rmsgd.probe(tmp_path / "m.pt"))["again"] == "tied: the same memory as transposed"


@pytest.mark.parametrize("name", [n for n in dir(torch) if n.startswith(("float8_e4", "float8_e5"))])
def test_floats_of_eight_bits_are_known_by_their_names(tmp_path, name):
    weight = WEIGHT.to(getattr(torch, name))
    torch.save({"w": weight, "zero": torch.zeros_like(weight)}, tmp_path / "m.pt")
    assert_is_read(tmp_path / "m.pt", weight=weight.float())
    assert reasons(rmsgd.probe(tmp_path / "m.pt")) == {"w": None, "zero": None}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_torchs_own_quantised_tensors_are_the_numbers_that_they_stand_for(tmp_path):
    scales = torch.rand(6) + 0.1
    quantised = {
        "all": torch.quantize_per_tensor(WEIGHT, 0.02, 7, torch.qint8),
        "unsigned": torch.quantize_per_tensor(WEIGHT, 0.02, 100, torch.quint8),
        "rows": torch.quantize_per_channel(WEIGHT, scales, torch.arange(6), 0, torch.qint8),
    }
    torch.save(quantised, tmp_path / "m.pt")
    for name, tensor in quantised.items():
        for source in (quantised, tmp_path / "m.pt"):
            assert torch.allclose(Probing(source).weight(name), tensor.dequantize(), rtol=1e-6, atol=1e-7)


def test_an_expanded_tensor_is_not_written_out(tmp_path):
    torch.save({"w": WEIGHT, "wide": torch.zeros(1).expand(1 << 20, 1 << 20)}, tmp_path / "m.pt")
    assert "share 1 numbers" in reasons(rmsgd.probe(tmp_path / "m.pt"))["wide"]


def rewrite(path, change):
    """The zip archive with its members changed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in change(members).items():
            archive.writestr(name, content)


def test_an_archive_that_was_packed_again_is_read(tmp_path):
    torch.save({"w": WEIGHT}, tmp_path / "m.pt")
    rewrite(tmp_path / "m.pt", lambda members: members)
    assert_is_read(tmp_path / "m.pt")


def test_a_file_of_the_other_byte_order_is_read(tmp_path):
    def swap(members):
        swapped = {name: b"big" if name.endswith("byteorder") else data for name, data in members.items()}
        storage = next(name for name in members if name.endswith("data/0"))
        swapped[storage] = np.frombuffer(members[storage], "<f4").astype(">f4").tobytes()
        return swapped

    torch.save({"w": WEIGHT}, tmp_path / "m.pt")
    rewrite(tmp_path / "m.pt", swap)
    assert_is_read(tmp_path / "m.pt")


def test_a_tensor_that_unpacks_to_more_than_any_weight_would_is_refused(tmp_path):
    torch.save({"w": torch.zeros(5000, 5000)}, tmp_path / "bomb.pt")
    rewrite(tmp_path / "bomb.pt", lambda members: members)
    assert (tmp_path / "bomb.pt").stat().st_size < 1 << 20
    with pytest.raises(CheckpointError, match=r"bomb\.pt: refused: .* unpack to"):
        rmsgd.probe(tmp_path / "bomb.pt")


# -- safetensors ---------------------------------------------------------------------------------


def test_a_safetensors_file_with_bytes_behind_its_end_is_told_so(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"w": WEIGHT}, path)
    path.write_bytes(path.read_bytes() + bytes(123))
    with pytest.raises(CheckpointError, match=r"m\.safetensors: .*123 bytes follow the last tensor"):
        rmsgd.probe(path)


# -- gzip ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["torch", "old torch", "safetensors", "npz"])
def test_a_file_with_gzip_is_read_as_what_is_in_it(tmp_path, form):
    inner = io.BytesIO()
    if form == "npz":
        np.savez(inner, w=WEIGHT.numpy())
    elif form == "safetensors":
        save_file({"w": WEIGHT}, tmp_path / "m")
        inner.write((tmp_path / "m").read_bytes())
    else:
        torch.save({"w": WEIGHT}, inner, _use_new_zipfile_serialization=form == "torch")
    (tmp_path / "m.gz").write_bytes(gzip.compress(inner.getvalue()))
    assert_is_read(tmp_path / "m.gz")


@pytest.mark.filterwarnings("error")
def test_what_gzip_was_unpacked_to_is_gone_with_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    torch.save({"w": WEIGHT}, tmp_path / "m.pt")
    (tmp_path / "m.pt.gz").write_bytes(gzip.compress((tmp_path / "m.pt").read_bytes()))
    probing = Probing(tmp_path / "m.pt.gz")
    assert len(list((tmp_path / "tmp").iterdir())) == 1
    assert torch.equal(probing.weight("w"), WEIGHT)
    del probing
    gc.collect()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_bad_file_with_gzip_is_called_by_its_own_name(tmp_path):
    (tmp_path / "m.pt.gz").write_bytes(gzip.compress(b"\x89HDF\r\n\x1a\n" + bytes(100)))
    with pytest.raises(CheckpointError, match=r"m\.pt\.gz: an HDF5 file, which is not read"):
        rmsgd.probe(tmp_path / "m.pt.gz")


# -- what is not read ----------------------------------------------------------------------------


def archive_of(*members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for member in members:
            archive.writestr(member, "{}")
    return file.getvalue()


NAMED = {
    "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "a Keras archive": archive_of("config.json", "metadata.json", "model.weights.h5"),
    "a torch.export archive": archive_of("m/archive_format", "m/models/model.json"),
    "a zip archive of something else": archive_of("report.txt"),
    "a tar archive": bytes(257) + b"ustar" + bytes(300),
    "a Zstandard file": b"\x28\xb5\x2f\xfd" + bytes(20),
    "a TensorFlow Lite model": b"\x1c\0\0\0TFL3" + bytes(50),
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\n",
}


@pytest.mark.parametrize("name", NAMED)
def test_a_format_that_is_not_read_is_called_by_its_name(tmp_path, name):
    (tmp_path / "m.pt").write_bytes(NAMED[name])
    with pytest.raises(CheckpointError) as error:
        rmsgd.probe(tmp_path / "m.pt")
    assert f"m.pt: {name}, which is not read" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "content"), [(n, c) for n, c in NAMED.items()])
def test_no_two_formats_claim_a_file(tmp_path, name, content):
    from rmsgd.inspection.reading.file_format import Beginning

    (tmp_path / "m").write_bytes(content)
    assert [f.name for f in FORMATS if f.is_this(Beginning(tmp_path / "m"))] == [name]


def test_a_format_takes_one_object_and_is_then_read(tmp_path, monkeypatch):
    def read(path):
        return OpenFile({name: torch.tensor(rows) for name, rows in json.loads(path.read_text()).items()})

    own = FileFormat("a file of numbers in JSON", lambda file: file.bytes.startswith(b"{"), read)
    monkeypatch.setattr("rmsgd.inspection.reading.checkpoints.FORMATS", (*FORMATS, own))
    (tmp_path / "m.json").write_text(json.dumps({"w": WEIGHT.tolist()}))
    assert_is_read(tmp_path / "m.json")
