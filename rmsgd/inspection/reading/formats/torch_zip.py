"""Files of torch.save since torch 1.6, and TorchScript archives: pickles in a zip archive."""

import io
from functools import partial
from pathlib import Path
from sys import byteorder
from typing import Any

from rmsgd.inspection.reading import pickles
from rmsgd.inspection.reading.archives import Archive
from rmsgd.inspection.reading.file_format import Beginning, FileFormat, OpenFile
from rmsgd.inspection.reading.stored import CheckpointError
from rmsgd.inspection.reading.torch_pickles import BUILDERS, Storage, storage_dtype


def _is_torch(file: Beginning) -> bool:
    return file.has("data.pkl") and not file.has("constants.pkl")


def _is_torchscript(file: Beginning) -> bool:
    return file.has("data.pkl") and file.has("constants.pkl")


def _open_torch(path: Path) -> OpenFile:
    archive = Archive(path)
    return OpenFile(_contents(archive, _folder(archive), "data.pkl", "data"))


def _open_torchscript(path: Path) -> OpenFile:
    """The attributes of the module, by their paths, and the constants, which have no names.

    The code in the archive is neither read nor compiled. A frozen archive has all its weights among the
    constants.
    """
    archive = Archive(path)
    folder = _folder(archive)
    module = _contents(archive, folder, "data.pkl", "data")
    constants = _contents(archive, folder, "constants.pkl", "constants")
    if (
        isinstance(module, pickles.StandIn)
        and isinstance(module.state, dict)
        and isinstance(constants, tuple)
    ):
        module.state = {**module.state, "constants": dict(enumerate(constants))}
    return OpenFile(module)


def _folder(archive: Archive) -> str:
    """The folder of all members, with its slash. torch names it after the file that it wrote first."""
    found = [name for name in archive.members if name.rpartition("/")[2] == "data.pkl"]
    if not found:
        raise CheckpointError("data.pkl is not in it")
    return min(found, key=len).removesuffix("data.pkl")


def _contents(archive: Archive, folder: str, pickle: str, storages: str) -> Any:
    foreign = False
    if f"{folder}byteorder" in archive.members:
        foreign = archive.read(f"{folder}byteorder") != byteorder.encode()

    def storage(key: Any) -> Storage:
        if not isinstance(key, tuple) or len(key) < 5 or key[0] != "storage" or not isinstance(key[2], str):
            raise CheckpointError("a storage that is none")
        name = f"{folder}{storages}/{key[2]}"
        return Storage(
            name, storage_dtype(key[1]), archive.size(name), partial(archive.read_range, name), foreign
        )

    data = archive.read(folder + pickle)
    return pickles.load(io.BytesIO(data), len(data), BUILDERS, storage)


FORMATS = [
    FileFormat("a torch file", _is_torch, _open_torch, suffixes=(".pt", ".pth", ".bin", ".ckpt")),
    FileFormat("a TorchScript archive", _is_torchscript, _open_torchscript),
]
