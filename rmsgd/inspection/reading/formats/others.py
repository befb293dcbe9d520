"""Formats that are not read, so that a message can name the format of such a file."""

from collections.abc import Callable

from rmsgd.inspection.reading.file_format import Beginning, FileFormat

_SAVE = "load it where it is from and save the weights as .safetensors or .npz"


def _starts(magic: bytes, at: int = 0) -> Callable[[Beginning], bool]:
    return lambda file: file.bytes[at : at + len(magic)] == magic


def _archive_with(*names: str) -> Callable[[Beginning], bool]:
    return lambda file: any(file.has(name) for name in names) and not file.has("data.pkl")


_is_keras = _archive_with("model.weights.h5")
_is_export = _archive_with("archive_format", "serialized_exported_program.json")


def _is_archive(file: Beginning) -> bool:
    """Whether it is a zip archive without known content."""
    arrays = all(name.endswith(".npy") for name in file.members)
    known = file.has("data.pkl") or arrays or _is_keras(file) or _is_export(file)
    return bool(file.members) and not known


FORMATS = [
    FileFormat("a Git LFS pointer", _starts(b"version https://git-lfs"), advice="run git lfs pull"),
    FileFormat("an HDF5 file", _starts(b"\x89HDF"), advice=_SAVE),
    FileFormat("a Keras archive", _is_keras, advice=_SAVE),
    FileFormat("a torch.export archive", _is_export, advice="save program.state_dict with torch.save"),
    FileFormat("a zip archive of something else", _is_archive),
    FileFormat("a tar archive", _starts(b"ustar", 257), advice="unpack it"),
    FileFormat("an xz file", _starts(b"\xfd7zXZ\0"), advice="unpack it"),
    FileFormat("a bzip2 file", _starts(b"BZh"), advice="unpack it"),
    FileFormat("a Zstandard file", _starts(b"\x28\xb5\x2f\xfd"), advice="unpack it"),
    FileFormat("a 7z archive", _starts(b"7z\xbc\xaf\x27\x1c"), advice="unpack it"),
    FileFormat("a TensorFlow Lite model", _starts(b"TFL3", 4), advice=_SAVE),
    FileFormat("a PyTorch Mobile flatbuffer", _starts(b"PTMF", 4), advice="save model.state_dict() instead"),
    FileFormat("an ExecuTorch program", _starts(b"ET12", 4), advice="save model.state_dict() instead"),
    FileFormat("a GGML file from before GGUF", _starts(b"lmgg"), advice="convert it to GGUF"),
    FileFormat("a GGML file from before GGUF", _starts(b"tjgg"), advice="convert it to GGUF"),
]
