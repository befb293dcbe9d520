"""Checkpoint files damaged at random are read, or refused in one line, and never crash the reader."""

import gzip
import io
import json
import os
import re
import signal
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from model_files import entry, gguf, initialiser, message, onnx, q8_0, raw
from safetensors.torch import save as save_safetensors
from torch import nn

from rmsgd.element_types import ELEMENT_TYPES
from rmsgd.inspection.reading.checkpoints import open_checkpoint
from rmsgd.inspection.reading.stored import CheckpointError, NotMeasurableError
from rmsgd.inspection.weights.constants import constant_by_name, constant_by_value
from rmsgd.inspection.weights.effective import effective_weights, lora_products

SECONDS = 20
"""Seconds after which a file that is still being read counts as a hang."""
MEASURED = 10**6
"""The most entries of a tensor whose numbers are looked at."""


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


def _in_parts() -> dict[str, torch.Tensor]:
    """Weights of 8 rows and 32 columns, each of which is stored in parts of another kind."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-128, 128, (8, 32), generator=generator)
    weight, scales = torch.randn(8, 32, generator=generator), torch.rand(8, 1, generator=generator) + 0.5
    words = torch.randint(-(2**31), 2**31, (8, 8), generator=generator).int()
    floats = weight.to(torch.float8_e4m3fn)
    settings = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [8, 32]})
    parts = {
        "torchao._weight_qdata": codes.to(torch.int8),
        "torchao._weight_scale": scales,
        "torchao._weight_zero_point": codes[:, :1].to(torch.int8),
        "quanto.weight._data": codes.to(torch.int8),
        "quanto.weight._scale": scales,
        "compressed.weight": codes.to(torch.int8),
        "compressed.weight_scale": scales,
        "packed.weight_packed": words[:, :4],
        "packed.weight_scale": scales,
        "packed.weight_shape": torch.tensor([8, 32]),
        "blocks.weight": floats,
        "blocks.weight_scale_inv": scales[:2, :1],
        "tensor.weight": floats,
        "tensor.scale_weight": torch.tensor(0.5),
        "int8.weight": codes.to(torch.int8),
        "int8.SCB": scales[:, 0],
        "four.weight": codes.to(torch.uint8).reshape(-1, 1)[:128],
        "four.weight.absmax": scales[:4, 0],
        "four.weight.quant_map": torch.linspace(-1, 1, 16),
        "four.weight.quant_state.bitsandbytes__nf4": torch.tensor([*settings.encode()], dtype=torch.uint8),
        "gptq.qweight": words[:4],
        "gptq.qzeros": torch.full((2, 1), 0x77777777, dtype=torch.int32),
        "gptq.scales": scales.t().repeat(2, 1).half(),
        "gptq.g_idx": torch.arange(32, dtype=torch.int32) // 16,
        "awq.qweight": words[:, :1].repeat(4, 1),
        "awq.qzeros": words[:2, :1],
        "awq.scales": scales.t().repeat(2, 1).half(),
        "mlx.weight": words[:, :4].view(torch.uint32),
        "mlx.scales": scales,
        "mlx.biases": scales,
        "normed.weight_g": scales,
        "normed.weight_v": weight,
        "parametrised.parametrizations.weight.original0": scales,
        "parametrised.parametrizations.weight.original1": weight,
        "pruned.weight_orig": weight,
        "pruned.weight_mask": (weight > 0).float(),
        "spectral.weight_orig": weight,
        "spectral.weight_u": weight[:, 0],
        "spectral.weight_v": weight[0],
        "lora_A.weight": weight[:4],
        "lora_B.weight": weight[:, :4],
    }
    return {name: part.clone().contiguous() for name, part in parts.items()}


class Settings:
    """A class of somebody's that a checkpoint holds beside the weights."""

    def __init__(self) -> None:
        self.content = {"lr": 0.1, "names": ["a", "b"]}


class Command:
    """A command that a pickle would run if it were let."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 1",)


class Network(nn.Module):
    """A network for TorchScript."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 5).half()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The output for x. Nothing calls it, and an archive holds it as code."""
        return self.head(self.body(x).mean((2, 3)).half())  # type: ignore[no-any-return]


def _torchscript() -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and its files are still about
        torch.jit.save(torch.jit.script(Network()), file)  # type: ignore[no-untyped-call]
    return file.getvalue()


def _numpy(save: Callable[..., None]) -> bytes:
    file, state = io.BytesIO(), _state()
    arrays = {name: state[name].numpy() for name in ("conv.weight", "double", "counts", "scalar", "empty")}
    odd = {"dense/kernel": np.zeros((3, 3, 2, 4), ">f4"), "fortran": np.asfortranarray(arrays["double"])}
    save(file, **arrays, **odd, objects=np.array([[{}, []]], dtype=object))
    return file.getvalue()


def _npy() -> bytes:
    file = io.BytesIO()
    np.save(file, _state()["conv.weight"].numpy())
    return file.getvalue()


def _gguf() -> bytes:
    state, codes = _state(), torch.arange(-64, 64, dtype=torch.int8)
    kinds = {"double": 28, "half": 1, "brain": 30, "conv.weight": 0}
    tensors = {name: (kind, tuple(state[name].shape), raw(state[name])) for name, kind in kinds.items()}
    blocks = {"blocks": (8, (2, 64), q8_0(codes, torch.ones(4))), "packed": (12, (4, 256), bytes(576))}
    return bytes(gguf({**tensors, **blocks}))


def _onnx() -> bytes:
    state = _state()
    kinds = {"double": 11, "half": 10, "brain": 16, "conv.weight": 1, "counts": 7}
    beside = initialiser("beside", 1, (6, 5), entry("location", "w.data"), entry("offset", "16"))
    inside = [
        initialiser(name, kind, tuple(state[name].shape), message(9, raw(state[name])))
        for name, kind in kinds.items()
    ]
    return bytes(onnx(*inside, beside, initialiser("packed", 22, (6, 8), message(9, bytes(24)))))


def _safetensors_in_parts() -> bytes:
    """The oldest `safetensors.torch` cannot write unsigned integers: they are written as signed ones."""
    parts = _in_parts()
    name = "mlx.weight"
    data = save_safetensors({**parts, name: parts[name].view(torch.int32)})
    start = f'"{name}":{{"dtype":"'.encode()
    assert start + b"I32" in data
    return data.replace(start + b"I32", start + b"U32")


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
        "parts.safetensors": _safetensors_in_parts(),
        "parts.pt": _saved(_in_parts(), True),
        "several.pt": _saved({"model": state, "model_ema": state, "config": Settings()}, True),
        "list.pt": _saved([state, {"a": [state["half"]]}], True),
        "module.pt": _saved({"net": Network(), "step": 3}, True),
        "command.pt": _saved({**views, "x": Command()}, True),
        "old_command.pth": _saved({**views, "x": Command()}, False),
        "script.pt": _torchscript(),
        "m.npz": _numpy(np.savez),
        "packed.npz": _numpy(np.savez_compressed),
        "m.npy": _npy(),
        "m.gguf": _gguf(),
        "m.onnx": _onnx(),
        "m.pt.gz": gzip.compress(_saved(state, True), 1, mtime=0),
        "m.safetensors.gz": gzip.compress(_safetensors_in_parts(), 1, mtime=0),
    }


REFUSED = ("m.onnx", "command.pt", "old_command.pth")
"""Sound files of which something is refused: numbers in a file that is not there, and code."""


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


def swap_two_words(data: bytes, rng: np.random.Generator) -> bytes:
    """Two names or numbers, as in JSON, change places."""
    found = list(re.finditer(rb'"[^"]{1,40}"|\d+', data))
    if len(found) < 2:
        return flip_bits(data, rng)
    a, b = (found[i] for i in sorted(rng.choice(len(found), 2, replace=False)))
    return data[: a.start()] + b[0] + data[a.end() : b.start()] + a[0] + data[b.end() :]


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


def in_the_gzip(damage: Damage) -> Damage:
    """Damage to what a gzip file holds, which is packed again afterwards."""

    def inside(data: bytes, rng: np.random.Generator) -> bytes:
        try:
            content = gzip.decompress(data)
        except Exception:  # no gzip file, or one damaged before
            return damage(data, rng)
        return gzip.compress(damage(content, rng), 1, mtime=0)

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
    *(in_the_header(swap_two_words) for _ in range(4)),
    *(in_the_gzip(damage) for damage in ANYWHERE),
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


CODE = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen")
"""What Python tells of when a name in a pickle is looked up or a command is run."""

_executed: list[str] | None = None


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if _executed is not None and event in CODE:
        _executed.append(f"{event} {arguments}")


@cache
def _listen() -> None:
    sys.addaudithook(_hear)


@contextmanager
def nothing_is_executed() -> Iterator[None]:
    """Raises AssertionError if a name in a pickle is looked up or a command is run meanwhile."""
    global _executed
    _listen()
    _executed = []
    try:
        yield
        assert not _executed, f"executed: {_executed}"
    finally:
        _executed = None


def check(path: Path) -> str:
    """Read all of a checkpoint as ``rmsgd.probe`` does, and return "read" or "refused"; else it raises.

    Every weight is put together of the parts that it is stored in, and is looked at as constants are.
    """
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        with nothing_is_executed(), warnings.catch_warnings():
            warnings.simplefilter("error")  # what is wrong with a file is said in the report
            return _read_all(path)
    finally:
        signal.alarm(0)


def _read_all(path: Path) -> str:
    try:
        source = open_checkpoint(path)
    except CheckpointError as error:
        return refused(error, path)
    outcome = "refused" if source.errors else "read"
    tensors = effective_weights(source)
    for stored in (*source.tensors, *tensors, *lora_products(tensors)):
        if stored.skip or constant_by_name(stored):
            continue
        try:
            tensor = stored.read()
        except (CheckpointError, NotMeasurableError) as error:
            outcome = refused(error, path)
            continue
        if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.numel() < MEASURED:
            tensor.clone()  # reads all of its memory
            if tensor.ndim > 1 and tensor.dtype in ELEMENT_TYPES:
                constant_by_value(stored, tensor)
    return outcome
