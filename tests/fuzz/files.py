"""Checkpoint files damaged at random are read, or refused in one line, and never crash the reader."""

import io
import json
import re
import signal
import struct
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from safetensors.torch import save as save_safetensors

from rmsgd.inspection.reading.checkpoints import open_checkpoint
from rmsgd.inspection.reading.stored import CheckpointError, NotMeasurableError

SECONDS = 20
"""Seconds after which a file that is still being read counts as a hang."""


# -- sound files ---------------------------------------------------------------------------------


def _state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 5, generator=generator)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "half": weight.half(),
        "brain": weight.bfloat16(),
        "eighth": weight.to(torch.float8_e4m3fn),
        "double": weight.double(),
        "counts": torch.arange(12).view(3, 4),
        "bias": weight[0].clone(),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
    }


def _saved(content: object, zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


@cache
def sound_files() -> Mapping[str, bytes]:
    """A file of every format that is read, by name."""
    state = _state()
    parameter = torch.nn.Parameter(state["double"])
    parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.Adam([parameter])
    optimizer.step()
    views = {"a": state["half"], "b": state["half"], "c": state["half"].t()}
    training = {"epoch": 3, "state_dict": state, "optimizer": optimizer.state_dict(), "best": np.float64(1)}
    # Before torch 1.6 there were no types of eight bits, and torch cannot read them from such a file.
    old = {name: tensor for name, tensor in state.items() if name != "eighth"}
    index = {"metadata": {"total_size": 1}, "weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    return {
        "m.safetensors": save_safetensors(state, metadata={"format": "pt"}),
        "m.pt": _saved(state, True),
        "views.pt": _saved(views, True),
        "sparse.pt": _saved({"a": state["half"], "s": state["half"].to_sparse()}, True),
        "training.ckpt": _saved(training, True),
        "old.pth": _saved(old, False),
        "old_training.pth": _saved({**training, "state_dict": old}, False),
        "m.safetensors.index.json": json.dumps(index).encode(),
    }


# -- damage --------------------------------------------------------------------------------------

Damage = Callable[[bytes, np.random.Generator], bytes]


def flip_bits(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for at in rng.integers(0, len(data), int(rng.integers(1, 17))):
        changed[at] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def flip_bits_at_the_head(data: bytes, rng: np.random.Generator) -> bytes:
    cut = min(len(data), 600)
    return flip_bits(data[:cut], rng) + data[cut:]


def flip_bits_at_the_end(data: bytes, rng: np.random.Generator) -> bytes:
    cut = max(0, len(data) - 400)
    return data[:cut] + flip_bits(data[cut:], rng)


def truncate(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: int(rng.integers(0, len(data)))]


def append(data: bytes, rng: np.random.Generator) -> bytes:
    return data + rng.bytes(int(rng.integers(1, 2000)))


def zero_a_block(data: bytes, rng: np.random.Generator) -> bytes:
    at, size = int(rng.integers(len(data))), int(rng.integers(1, 600))
    return data[:at] + bytes(min(size, len(data) - at)) + data[at + size :]


def cut_a_block(data: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(len(data)))
    return data[:at] + data[at + int(rng.integers(1, 600)) :]


def repeat_a_block(data: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(len(data)))
    block = data[at : at + int(rng.integers(1, 600))]
    return data[:at] + block + block + data[at + len(block) :]


def splice(data: bytes, rng: np.random.Generator) -> bytes:
    other = list(sound_files().values())[int(rng.integers(len(sound_files())))]
    return data[: int(rng.integers(len(data)))] + other[int(rng.integers(len(other))) :]


EXTREME = (0, 1, 0x7F, 0x80, 0xFF, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1)


def set_an_integer(data: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes become an extreme integer of that width."""
    width = int(rng.choice([1, 2, 4, 8]))
    value = EXTREME[int(rng.integers(len(EXTREME)))] % 2 ** (8 * width)
    at = int(rng.integers(max(1, len(data) - width)))
    return data[:at] + value.to_bytes(width, "little") + data[at + width :]


OTHERS = (b"0", b"-1", b"1", b"7", b"4294967296", b"18446744073709551615", b"1e400", b"[]", b"null", b'""')


def change_a_number(data: bytes, rng: np.random.Generator) -> bytes:
    """A number in decimal digits, as in JSON, becomes another."""
    found = list(re.finditer(rb"-?\d+", data))
    if not found:
        return flip_bits(data, rng)
    match = found[int(rng.integers(len(found)))]
    other = OTHERS[int(rng.integers(len(OTHERS)))]
    return data[: match.start()] + other + data[match.end() :]


def in_the_archive(damage: Damage) -> Damage:
    """Damage to one member of a zip archive, whose checksums are right again afterwards."""

    def inside(data: bytes, rng: np.random.Generator) -> bytes:
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                members = {name: archive.read(name) for name in archive.namelist()}
            names = list(members)
            pickle = next(i for i, name in enumerate(names) if name.endswith("data.pkl"))
        except Exception:  # the file is no archive, or was damaged before
            return damage(data, rng)
        chosen = names[pickle if rng.random() < 0.8 else int(rng.integers(len(names)))]
        if rng.random() < 0.95:
            members[chosen] = damage(members[chosen] or bytes(8), rng)
        else:
            del members[chosen]
        rebuilt = io.BytesIO()
        with zipfile.ZipFile(rebuilt, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return rebuilt.getvalue()

    return inside


def in_the_header(damage: Damage) -> Damage:
    """Damage to a safetensors header, whose length is right again afterwards."""

    def inside(data: bytes, rng: np.random.Generator) -> bytes:
        if data[8:9] != b"{":
            return damage(data, rng)
        (length,) = struct.unpack("<Q", data[:8])
        header = damage(data[8 : 8 + length], rng)
        return struct.pack("<Q", len(header)) + header + data[8 + length :]

    return inside


ANYWHERE: tuple[Damage, ...] = (
    flip_bits,
    flip_bits_at_the_head,
    flip_bits_at_the_end,
    truncate,
    append,
    zero_a_block,
    cut_a_block,
    repeat_a_block,
    splice,
    set_an_integer,
    change_a_number,
)
DAMAGES = (
    *ANYWHERE,
    *(in_the_archive(damage) for damage in ANYWHERE),
    *(in_the_header(damage) for damage in (*ANYWHERE, change_a_number, change_a_number)),
)


def draw(seed: int) -> tuple[str, bytes]:
    """The name and content of the damaged file with this number."""
    rng = np.random.default_rng(seed)
    names = list(sound_files())
    name = names[int(rng.integers(len(names)))]
    data = sound_files()[name]
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        if data:
            data = DAMAGES[int(rng.integers(len(DAMAGES)))](data, rng)
    return name, data


# -- reading -------------------------------------------------------------------------------------


class Hang(BaseException):
    """A hang. It is not an Exception, so that no reader can take it for a bad file."""


def _too_long(number: int, frame: FrameType | None) -> None:
    raise Hang(f"still reading after {SECONDS} s")


def refused(error: CheckpointError | NotMeasurableError, path: Path) -> str:
    """A line for each file that cannot be read, with its name."""
    for line in str(error).splitlines():
        if isinstance(error, CheckpointError) and not line.startswith(str(path.parent)):
            raise AssertionError(f"a line that names no file: {error!r}")
    return "refused"


def check(path: Path) -> str:
    """Read all of a checkpoint as ``rmsgd.probe`` does, and return "read" or "refused"; else it raises."""
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        source = open_checkpoint(path)
        outcome = "refused" if source.errors else "read"
        for stored in source.tensors:
            try:
                tensor = stored.read()
            except (CheckpointError, NotMeasurableError) as error:
                outcome = refused(error, path)
                continue
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.numel() < 1e6:
                tensor.clone()  # reads all of its memory
        return outcome
    except CheckpointError as error:
        return refused(error, path)
    finally:
        signal.alarm(0)
