"""A pickle's contents, read without executing anything.

A pickle is a program for a small stack machine that may import any name and call it. Here a name is never
imported and never called: it stays a ``Global``. In place of the object that a call would make stands what
``Builders`` of this package make of its arguments, or else a ``StandIn`` that keeps them. So the bytes of a
file can make lists, dictionaries, strings, numbers and stand-ins, and nothing else.

The size of the pickle bounds time and memory, and no more than ``MOST_STEPS`` of its steps are taken.
"""

import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from rmsgd.inspection.reading.stored import CheckpointError

MOST_STEPS = 10_000_000
"""The most steps of the machine. A checkpoint takes some dozens per tensor, and a step about 100 bytes."""

_LONGEST_NAME = 1000

# Nothing would be executed here. But a file with these names was made to be executed elsewhere, and the
# user should know that.
_CODE = re.compile(
    r"os|posix|nt|sys|subprocess|runpy|importlib|imp|ctypes|socket|shutil|pty|code|codeop|commands|popen2|"
    r"_?pickle|cPickle|marshal|webbrowser|pip|setuptools|distutils|pdb|bdb|c?[pP]rofile|trace|doctest|dill|"
    r"cloudpickle"
)
_PLAIN_BUILTINS = re.compile(
    r"bool|bytearray|bytes|complex|dict|float|frozenset|int|list|long|object|range|set|slice|str|tuple|type|"
    r"unicode|xrange|Ellipsis|NotImplemented"
)


class Global(str):
    """A name that a pickle refers to, "module.name". It is not imported."""

    __slots__ = ()


class StandIn:
    """The object that a pickle would make by a call, as the name and the arguments of that call."""

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name: str, args: Sequence[Any] = ()) -> None:
        self.name = name
        self.args = args
        self.items: dict[Any, Any] | None = None
        self.state: Any = None

    def __repr__(self) -> str:
        return f"StandIn({self.name})"


Builder = Callable[..., Any]
Builders = Mapping[str, Builder]
"""From a name to a function that is called in its place, with the same arguments."""


class _Mark:
    """A place on the stack at which MARK was executed."""


_MARK = _Mark()


def load(
    file: BinaryIO, size: int, builders: Builders, persistent: Callable[[Any], Any] | None = None
) -> Any:
    """The contents of the pickle at the position of ``file``, which is moved behind the pickle.

    Args:
        file: the file, of which at most ``size`` bytes are read.
        size: the number of bytes that are left in it.
        builders: functions that are called in place of the names in the pickle.
        persistent: gives the object that a persistent id stands for.

    Raises:
        CheckpointError: the pickle is not complete, or it names code.
    """
    return _Machine(file, size, builders, persistent).run()


def refuse_code(name: str) -> None:
    """Refuse a name that stands for code.

    Raises:
        CheckpointError: the name stands for code.
    """
    module, _, last = name.rpartition(".")
    root = module.split(".")[0]
    if root in ("builtins", "__builtin__"):
        code = not _PLAIN_BUILTINS.fullmatch(last)
    else:
        code = _CODE.fullmatch(root) is not None
    if code:
        raise CheckpointError(
            f"refused: it holds code ({name}), not only weights; save model.state_dict() instead"
        )


class _Machine:
    def __init__(
        self, file: BinaryIO, size: int, builders: Builders, persistent: Callable[[Any], Any] | None
    ) -> None:
        self._file = file
        self._left = size
        self._builders = builders
        self._persistent = persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        steps = _STEPS
        for _ in range(MOST_STEPS):
            code = self._take(1)[0]
            if code == 0x2E:  # STOP
                return self._pop()
            step = steps.get(code)
            if step is None:
                raise CheckpointError(f"not a pickle of weights (no opcode {code:#04x} is in one)")
            step(self)
        raise CheckpointError(f"a pickle of more than {MOST_STEPS:,} steps")

    # -- bytes

    def _take(self, count: int) -> bytes:
        if count > self._left:
            raise CheckpointError("the pickle is cut short")
        data = self._file.read(count)
        if len(data) != count:
            raise CheckpointError("the pickle is cut short")
        self._left -= count
        return data

    def _unsigned(self, width: int) -> int:
        return int.from_bytes(self._take(width), "little")

    def _line(self) -> str:
        line = self._file.readline(_LONGEST_NAME)
        self._left -= len(line)
        if self._left < 0 or not line.endswith(b"\n"):
            raise CheckpointError("the pickle is cut short")
        return line[:-1].decode("utf-8", "replace")

    # -- stack

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise CheckpointError("not a sound pickle (its stack is empty)")
        return self._stack.pop()

    def _top(self) -> Any:
        value = self._pop()
        self._stack.append(value)
        return value

    def _pop_mark(self) -> list[Any]:
        items: list[Any] = []
        while self._stack:
            value = self._stack.pop()
            if value is _MARK:
                return items[::-1]
            items.append(value)
        raise CheckpointError("not a sound pickle (no mark on its stack)")

    def push(self, value: Any) -> None:
        self._stack.append(value)

    # -- names and calls

    def name(self, module: str, name: str) -> None:
        full = Global(f"{module}.{name}")
        refuse_code(full)
        self._stack.append(full)

    def name_on_stack(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise CheckpointError("not a sound pickle (a name that is not text)")
        if len(name) + len(module) > _LONGEST_NAME:
            raise CheckpointError("not a sound pickle (a name without end)")
        self.name(module, name)

    def call(self, args: Any) -> None:
        """Replace the callable on the stack by the result of a call of what stands for it, with ``args``."""
        name = self._pop()
        if not isinstance(name, Global) or not isinstance(args, tuple):
            raise CheckpointError("not a sound pickle (a call of something that is not a name)")
        builder = self._builders.get(name)
        self._stack.append(StandIn(name, args) if builder is None else builder(*args))

    def instance(self) -> None:
        args = self._pop_mark()
        self.name(self._line(), self._line())
        self.call(tuple(args))

    def object(self) -> None:
        name, *args = self._pop_mark() or [None]
        self._stack.append(name)
        self.call(tuple(args))

    def new_with_keywords(self) -> None:
        self._pop()
        self.call(self._pop())

    def build(self) -> None:
        """Give an object its state. Only stand-ins and objects made by builders take one."""
        state, target = self._pop(), self._top()
        if isinstance(target, StandIn):
            target.state = state
        elif callable(setstate := getattr(type(target), "pickled_state", None)):
            setstate(target, state)

    # -- containers

    def append(self, items: Sequence[Any]) -> None:
        target = self._top()
        if isinstance(target, list):
            target.extend(items)

    def set_items(self, items: Sequence[Any]) -> None:
        target = self._top()
        if isinstance(target, StandIn):
            if target.items is None:
                target.items = {}
            target = target.items
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=False):
                if _is_key(key):
                    target[key] = value

    def dictionary(self) -> None:
        items = self._pop_mark()
        self._stack.append({})
        self.set_items(items)

    def put(self, index: int) -> None:
        self._memo[index] = self._top()

    def get(self, index: int) -> None:
        if index not in self._memo:
            raise CheckpointError("not a sound pickle (it refers to nothing)")
        self._stack.append(self._memo[index])

    def persist(self, key: Any) -> None:
        if self._persistent is None:
            raise CheckpointError("not a sound pickle (it refers to what is not in it)")
        self._stack.append(self._persistent(key))

    def tuple_of(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self._stack.append(tuple(reversed(items)))

    # -- literals

    def long(self, count: int) -> None:
        self._stack.append(int.from_bytes(self._take(count), "little", signed=True))

    def text(self, count: int) -> None:
        self._stack.append(self._take(count).decode("utf-8", "replace"))

    def bytes_or_text(self, count: int) -> None:
        """Bytes or text: a string of Python 2, which did not distinguish the two."""
        data = self._take(count)
        try:
            self._stack.append(data.decode("ascii"))
        except UnicodeDecodeError:
            self._stack.append(data)

    def number(self, format_: str) -> None:
        (value,) = struct.unpack(format_, self._take(struct.calcsize(format_)))
        self._stack.append(value)


def _is_key(key: Any) -> bool:
    """Whether a dictionary of weights may have this key.

    Other keys are dropped: hashing deeply nested tuples would overflow C's stack, and the file could choose
    the hashes of large integers.
    """
    return type(key) in (str, bytes, bool, Global) or (type(key) is int and -(2**63) <= key < 2**63)


Step = Callable[[_Machine], Any]


def _steps() -> Iterator[tuple[str, Step]]:
    """The machine's instructions, except protocol 0's texts, extension codes and out-of-band buffers."""
    yield "\x80", lambda m: m._take(1)  # PROTO
    yield "\x95", lambda m: m._take(8)  # FRAME
    # names, calls, state
    yield "c", lambda m: m.name(m._line(), m._line())
    yield "\x93", lambda m: m.name_on_stack()
    yield "i", lambda m: m.instance()
    yield "o", lambda m: m.object()
    yield "R", lambda m: m.call(m._pop())
    yield "\x81", lambda m: m.call(m._pop())  # NEWOBJ
    yield "\x92", lambda m: m.new_with_keywords()
    yield "b", lambda m: m.build()
    yield "P", lambda m: m.persist(m._line())
    yield "Q", lambda m: m.persist(m._pop())
    # the stack and the memo
    yield "(", lambda m: m.push(_MARK)
    yield "0", lambda m: m._stack.pop() if m._stack else None
    yield "1", lambda m: m._pop_mark()
    yield "2", lambda m: m.push(m._top())
    yield "q", lambda m: m.put(m._unsigned(1))
    yield "r", lambda m: m.put(m._unsigned(4))
    yield "\x94", lambda m: m.put(len(m._memo))  # MEMOIZE
    yield "h", lambda m: m.get(m._unsigned(1))
    yield "j", lambda m: m.get(m._unsigned(4))
    # containers
    yield "]", lambda m: m.push([])
    yield "l", lambda m: m.push(m._pop_mark())
    yield "}", lambda m: m.push({})
    yield "d", lambda m: m.dictionary()
    yield "\x8f", lambda m: m.push([])  # EMPTY_SET
    yield "\x91", lambda m: m.push(m._pop_mark())  # FROZENSET
    yield ")", lambda m: m.push(())
    yield "t", lambda m: m.push(tuple(m._pop_mark()))
    for count, code in enumerate("\x85\x86\x87", 1):
        yield code, lambda m, count=count: m.tuple_of(count)  # type: ignore[misc]
    yield "a", lambda m: m.append([m._pop()])
    yield "e", lambda m: m.append(m._pop_mark())
    yield "\x90", lambda m: m.append(m._pop_mark())  # ADDITEMS
    yield "s", lambda m: m.set_items([m._pop(), m._pop()][::-1])
    yield "u", lambda m: m.set_items(m._pop_mark())
    # literals
    yield "N", lambda m: m.push(None)
    yield "\x88", lambda m: m.push(True)
    yield "\x89", lambda m: m.push(False)
    yield "J", lambda m: m.number("<i")
    yield "K", lambda m: m.number("<B")
    yield "M", lambda m: m.number("<H")
    yield "G", lambda m: m.number(">d")
    yield "\x8a", lambda m: m.long(m._unsigned(1))
    yield "\x8b", lambda m: m.long(m._unsigned(4))
    yield "X", lambda m: m.text(m._unsigned(4))
    yield "\x8c", lambda m: m.text(m._unsigned(1))
    yield "\x8d", lambda m: m.text(m._unsigned(8))
    yield "C", lambda m: m.push(m._take(m._unsigned(1)))
    yield "B", lambda m: m.push(m._take(m._unsigned(4)))
    yield "\x8e", lambda m: m.push(m._take(m._unsigned(8)))
    yield "\x96", lambda m: m.push(m._take(m._unsigned(8)))  # BYTEARRAY8
    yield "U", lambda m: m.bytes_or_text(m._unsigned(1))
    yield "T", lambda m: m.bytes_or_text(m._unsigned(4))


_STEPS: Mapping[int, Step] = {ord(code): step for code, step in _steps()}
