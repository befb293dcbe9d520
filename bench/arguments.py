"""The types and checks of arguments that commands share, and the lists in their help."""

import argparse
import ast
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench import models, peers
from bench.data import registry
from bench.errors import UsageError
from bench.names import look_up

WIDEST = 100
"""The largest factor on channel counts: no machine holds a wider network."""

KNOWN = (
    f"Models: {', '.join(models.ARCHITECTURES)}.  Optimizers: {', '.join(peers.PEERS)}.  "
    f"A path given as data holds {registry.layouts()}."
)


def refuse(
    parser: argparse.ArgumentParser, options: argparse.Namespace, unused: Iterable[str], why: str
) -> None:
    """Exits with a usage error where an option was given that would not be used, and says why."""
    for option in unused:
        if getattr(options, option) != parser.get_default(option):
            parser.error(f"--{option.replace('_', '-')} {why}")


def names(text: str) -> tuple[str, ...]:
    """`A,B,...`."""
    return tuple(text.split(","))


def integers(text: str) -> tuple[int, ...]:
    """`0,1,...`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers like 0,1,2, got {text!r}") from None


def some_of(kind: str, known: Mapping[str, object]) -> Callable[[str], tuple[str, ...]]:
    """A parser of `A,B,...`, where each name is a key of `known`, which holds things of this kind."""

    def known_names(text: str) -> tuple[str, ...]:
        try:
            for name in names(text):
                look_up(kind, name, known)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return names(text)

    return known_names


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def number(text: str) -> float:
    """The number that a text stands for; NaN if it is not a number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def above_zero(text: str) -> float:
    """A finite number above 0."""
    value = number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def width(text: str) -> float:
    """A factor on channel counts."""
    value = above_zero(text)
    if value > WIDEST:
        raise argparse.ArgumentTypeError(f"expected at most {WIDEST}, got {text!r}")
    return value


def add_output(parser: argparse.ArgumentParser, command: str, holds: str = "the JSON") -> None:
    """Adds `--out`, a folder below .out that is called as the command, and `--readme`."""
    parser.add_argument("--out", type=Path, default=Path(".out") / command, help=f"folder for {holds}")
    parser.add_argument("--readme", type=Path, help="rewrite the measured tables of this file")


def add_rounds(parser: argparse.ArgumentParser, default: int) -> None:
    """Adds `--rounds`."""
    parser.add_argument(
        "--rounds", type=positive, default=default, help="interleaved rounds (default: %(default)s)"
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds `--set`, whose values are a list for `overrides`."""
    parser.add_argument(
        "--set",
        type=assignment,
        action="append",
        default=[],
        metavar="OPTIMIZER.KEY=VALUE",
        help="replace a setting of an optimizer, e.g. rmsgd.beta=0.9; may be repeated",
    )


def assignment(text: str) -> tuple[str, str, Any]:
    """Parses OPTIMIZER.KEY=VALUE. An optimizer's name may hold dots; the value is a Python literal."""
    target, _, literal = text.partition("=")
    optimizer, _, key = target.rpartition(".")
    try:
        if not optimizer or not key.isidentifier():
            raise ValueError
        return optimizer, key, ast.literal_eval(literal)
    except (ValueError, SyntaxError):
        message = f"expected OPTIMIZER.KEY=VALUE like rmsgd.beta=0.9 or rmsgd.rule='release', got {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def overrides(assignments: Sequence[tuple[str, str, Any]]) -> dict[str, dict[str, Any]]:
    """Gathers (optimizer, key, value) into optimizer -> settings."""
    gathered: dict[str, dict[str, Any]] = {}
    for optimizer, key, value in assignments:
        gathered.setdefault(optimizer, {})[key] = value
    return gathered


def check_device(name: str) -> None:
    """Raises UsageError when torch has no such device here."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {name!r} cannot be used here: {reason}") from error


def check_taking_part(overrides: Iterable[str], optimizers: Iterable[str]) -> None:
    """Raises UsageError when there are settings for an optimizer that does not take part."""
    if unused := set(overrides) - set(optimizers):
        raise UsageError(f"settings for {', '.join(sorted(unused))}, which is not among the optimizers")


def check_unique(what: str, values: Sequence[object]) -> None:
    """Raises UsageError when there is no value, or one is given twice."""
    if not values:
        raise UsageError(f"at least one {what} is needed")
    if len(set(values)) < len(values):
        raise UsageError(f"every {what} may be given once, got {', '.join(map(str, values))}")


@contextmanager
def torch_threads(count: int) -> Iterator[int]:
    """Lets torch use `count` threads for as long as the context lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)
