"""A pickle is read and nothing in it is executed, whatever it asks for."""

import argparse
import datetime
import enum
import functools
import json
import os
import pathlib
import pickle
import types
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from torch import nn

import rmsgd
from rmsgd.inspection.probing import Probing
from rmsgd.inspection.reading import pickles
from rmsgd.inspection.reading.stored import CheckpointError

WEIGHT = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))


def names(report):
    return [layer.name for layer in report.layers]


# -- what is executed: nothing -------------------------------------------------------------------


class Calls:
    """An object that would call ``function(*arguments)`` when it is unpickled."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


class CallsLater(Calls):
    """An object that would do so through its state."""

    def __reduce__(self):
        return object, (), {"x": 1}, iter([Calls(*self.reduced)]), iter([(1, Calls(*self.reduced))])


def attacks(marker):
    """Objects, by kind, that would leave ``marker`` behind if they were executed."""
    touch = f"open({str(marker)!r}, 'w')"
    return {
        "os.system": Calls(os.system, f"touch {marker}"),
        "eval": Calls(eval, touch),
        "exec": Calls(exec, touch),
        "open": Calls(open, str(marker), "w"),
        "getattr": Calls(getattr, str(marker), "upper"),
        "Path.touch": Calls(pathlib.Path.touch, pathlib.Path(str(marker))),
        "os.mkdir in a list": [Calls(os.mkdir, str(marker))],
        "a key": {"x": {"y": (Calls(os.mkdir, str(marker)),)}},
        "state": CallsLater(os.mkdir, str(marker)),
        "partial": functools.partial(os.mkdir, str(marker)),
        "numpy": Calls(np.save, str(marker), np.zeros(1)),
        "torch.save": Calls(torch.save, {}, str(marker)),
        "torch.hub": Calls(torch.hub.load_state_dict_from_url, f"file://{marker}"),
        "torch.load": Calls(torch.load, str(marker)),
        "jit": Calls(torch.jit.load, str(marker)),
        "shutil": Calls(__import__("shutil").copy, __file__, str(marker)),
    }


@pytest.mark.parametrize("kind", list(attacks("x")))
@pytest.mark.parametrize("form", ["zip", "legacy", "plain", "protocol 4"])
def test_nothing_in_a_pickle_is_executed(tmp_path, kind, form):
    marker = tmp_path / "executed"
    content = {"w": WEIGHT, "extra": attacks(marker)[kind]}
    path = tmp_path / "m.pt"
    if form in ("zip", "legacy"):
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    else:
        path.write_bytes(pickle.dumps(content, protocol=2 if form == "plain" else 4))
    said = ""
    try:
        rmsgd.probe(path)
    except CheckpointError as error:
        said = str(error)
    assert "\n" not in said
    assert said == "" or "refused: it holds code" in said or "no opcode" in said
    assert not marker.exists()


def test_no_name_in_a_pickle_is_imported(tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for opcode in (b"ctrap\nThing\n", b"\x8c\x04trap\x8c\x05Thing\x93"):
        (tmp_path / "m.pkl").write_bytes(b"\x80\x04}\x8c\x01x" + opcode + b")\x81s.")
        with pytest.raises(CheckpointError, match="no weights"):
            rmsgd.probe(tmp_path / "m.pkl")


@pytest.mark.parametrize("name", ["os system", "builtins eval", "__builtin__ apply", "subprocess Popen"])
@pytest.mark.parametrize("opcode", [b"c%s\n%s\n", b"(i%s\n%s\n", b"\x8c%b%s\x8c%b%s\x93"])
def test_names_of_code_are_refused_by_every_opcode(tmp_path, name, opcode):
    module, last = name.encode().split()
    pair = (
        (module, last) if b"\x93" not in opcode else (bytes([len(module)]), module, bytes([len(last)]), last)
    )
    (tmp_path / "m.pkl").write_bytes(b"\x80\x04" + opcode % pair + b".")
    with pytest.raises(CheckpointError, match="refused: it holds code"):
        rmsgd.probe(tmp_path / "m.pkl")


def test_a_pickle_changes_nothing_of_this_package(tmp_path):
    """BUILD would set attributes on any object on the stack: a name, a function, a class."""
    for name in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"ctorch\nSize\n"):
        (tmp_path / "m.pkl").write_bytes(b"\x80\x02" + name + b"N}X\x0c\x00\x00\x00__defaults__)s\x86b.")
        with pytest.raises(CheckpointError):
            rmsgd.probe(tmp_path / "m.pkl")
    torch.save({"w": WEIGHT}, tmp_path / "m.pt")
    assert torch.equal(Probing(tmp_path / "m.pt").weight("w"), WEIGHT)


# -- bounds --------------------------------------------------------------------------------------

HUGE = (2**63 - 1).to_bytes(8, "little")

HOSTILE = {
    "a text longer than the file": b"\x80\x04X\xff\xff\xff\x7f.",
    "bytes longer than memory": b"\x80\x04\x8e" + HUGE + b".",
    "a bytearray longer than memory": b"\x80\x05\x96" + HUGE + b".",
    "an integer longer than the file": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "a memo of 4 billion entries": b"\x80\x02}r\xff\xff\xff\xff.",
    "tuples in tuples, as a key": b"\x80\x02})" + b"\x85" * 300_000 + b"Ns.",
    "lists in lists": b"\x80\x02" + b"(" * 100_000 + b"l" * 100_000 + b".",
    "dictionaries in dictionaries": b"\x80\x02" + b"}K\x01" * 100_000 + b"N" + b"s" * 100_000 + b".",
    "keys that share a hash": b"\x80\x02}("
    + b"".join(b"\x8a\x0c" + (k * (2**61 - 1)).to_bytes(12, "little") + b"N" for k in range(50_000))
    + b"u.",
    "an empty stack": b"\x80\x02.",
    "a mark and nothing": b"\x80\x02(.",
    "pops of nothing": b"\x80\x02" + b"0" * 100 + b".",
    "a reference to nothing": b"\x80\x02h\x07.",
    "a call of a list": b"\x80\x02])R.",
    "a persistent id": b"\x80\x02NQ.",
    "an extension code": b"\x80\x02\x82\x01.",
    "no end": b"\x80\x02" + b"N0" * 1000,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_pickle_is_one_line(tmp_path, kind):
    (tmp_path / "m.pkl").write_bytes(HOSTILE[kind])
    with pytest.raises(CheckpointError, match=r"^[^\n]*m\.pkl: [^\n]+$"):
        rmsgd.probe(tmp_path / "m.pkl")


def test_a_pickle_of_very_many_steps_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "MOST_STEPS", 1000)
    (tmp_path / "m.pkl").write_bytes(b"\x80\x02" + b"N0" * 10_000 + b"N.")
    with pytest.raises(CheckpointError, match="more than 1,000 steps"):
        rmsgd.probe(tmp_path / "m.pkl")


# -- what is found beside stand-ins --------------------------------------------------------------


class Config(dict):
    """A dictionary like those of OmegaConf and EasyDict: a class of its own, made by its own functions."""

    def __init__(self, values):
        super().__init__(values)
        self.__dict__["metadata"] = {"ref_type": type(self)}


class Kind(enum.Enum):
    LARGE = 1


class Settings:
    __slots__ = ("depth", "kind")

    def __init__(self):
        self.depth = 3
        self.kind = Kind.LARGE


BESIDE = {
    "a class": lambda: Settings(),
    "a dictionary of its own class": lambda: Config({"lr": 0.1, "inner": Config({})}),
    "an enumeration": lambda: Kind.LARGE,
    "a function": lambda: names,
    "a type": lambda: Settings,
    "a partial": lambda: functools.partial(nn.LayerNorm, eps=1e-6),
    "a namespace": lambda: argparse.Namespace(lr=0.1),
    "another namespace": lambda: types.SimpleNamespace(lr=0.1),
    "a path": lambda: pathlib.PurePosixPath("/data"),
    "a date": lambda: datetime.datetime(2024, 1, 1),
    "a NumPy scalar": lambda: np.float64(0.9),
    "a random state": lambda: np.random.get_state(),
    "a generator": lambda: np.random.default_rng(0),
    "sets and counters": lambda: ({1, 2}, frozenset("ab"), Counter("aab"), defaultdict(list, x=[1])),
    "complex and bytes": lambda: (1j, b"\xff\x00", bytearray(b"\xff"), 2**100, -(2**70), None, 1.5),
    "a device and a type": lambda: (torch.device("cpu"), torch.float16, torch.Size([1])),
    "a scheduler": lambda: torch.optim.lr_scheduler.StepLR(torch.optim.SGD([nn.Parameter(WEIGHT)]), 1),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", BESIDE)
def test_what_lies_beside_the_weights_does_not_hide_them(tmp_path, kind, zipped):
    content = {"state_dict": {"w": WEIGHT}, "hyper_parameters": BESIDE[kind]()}
    torch.save(content, tmp_path / "m.ckpt", _use_new_zipfile_serialization=zipped)
    assert names(rmsgd.probe(tmp_path / "m.ckpt")) == ["w"]
    assert torch.equal(Probing(tmp_path / "m.ckpt").weight("w"), WEIGHT)


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 4)
        self.head.again = self.head.weight
        self.register_buffer("table", torch.randn(5, 5))
        self.register_buffer("passing", torch.randn(5, 5), persistent=False)
        self.unused = None


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"model": m, "epoch": 3}, nn.DataParallel])
def test_a_module_that_was_saved_whole_has_its_parameters_and_buffers(tmp_path, wrap):
    module = Backbone()
    torch.save(wrap(module), tmp_path / "m.pt")
    report = rmsgd.probe(tmp_path / "m.pt")
    reasons = {layer.name.removeprefix("module."): layer.skipped for layer in report.layers}
    assert reasons == {
        "table": "a buffer, not a parameter",
        "model.0.weight": None,
        "head.weight": None,
        "head.again": "tied: the same memory as " + names(report)[-2],
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_plain_pickle_of_tensors_and_arrays_is_read(tmp_path, protocol):
    state = OrderedDict(w=WEIGHT, array=WEIGHT.numpy(), fortran=np.asfortranarray(WEIGHT.numpy()))
    state["big"] = WEIGHT.numpy().astype(">f4")
    state["objects"] = np.array([[{}, {}]])
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({"model": state}, protocol))
    probing = Probing(tmp_path / "m.pkl")
    probing.run()
    assert {layer.name: layer.skipped for layer in probing.layers} == {
        **dict.fromkeys(state),
        "objects": "an array of Python objects",
    }
    for name in list(state)[:-1]:
        assert torch.equal(probing.weight(name), WEIGHT)


def test_a_tensor_of_a_class_of_its_own_is_listed(tmp_path):
    class_ = type("Masked", (torch.Tensor,), {"__module__": __name__})
    globals()["Masked"] = class_
    torch.save({"w": WEIGHT, "odd": WEIGHT.as_subclass(class_)}, tmp_path / "m.pt")
    [_, odd] = rmsgd.probe(tmp_path / "m.pt").layers
    assert "Masked, not a plain tensor" in odd.skipped
    assert odd.shape == (6, 8)


def a_pickle(folder, text):
    (folder / "m.pkl").write_bytes(b"\x80\x02c" + f"os\nsystem{text}\n.".encode())
    return folder / "m.pkl"


def an_index(name):
    def write(folder, text):
        index = {"weight_map": {"w": name.format(text)}}
        (folder / "m.index.json").write_text(json.dumps(index))
        return folder / "m.index.json"

    return write


def shards_with_a_name_in_common(folder, text):
    for number in (1, 2):
        torch.save({f"w{text}": WEIGHT}, folder / f"m{number}.pt")
    return folder


@pytest.mark.parametrize(
    "write",
    [a_pickle, an_index("../{}"), an_index("{}"), shards_with_a_name_in_common],
    ids=lambda x: x.__name__,
)
@pytest.mark.parametrize("text", ["\x0b", "\x1b[2J", "\u2028", "\r"], ids=ascii)
def test_a_message_shows_what_could_steer_a_terminal_as_escapes(tmp_path, write, text):
    path = write(tmp_path, text)
    try:
        messages = rmsgd.probe(path).errors
    except CheckpointError as error:
        messages = str(error).splitlines()
    assert len(messages) == 1
    assert messages[0].isprintable()
    assert ascii(text)[1:-1] in messages[0]
