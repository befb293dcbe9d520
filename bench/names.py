"""Looking names up, with a suggestion where there is no such name."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

from bench.errors import UsageError

Value = TypeVar("Value")


def look_up(kind: str, name: str, known: Mapping[str, Value]) -> Value:
    """Returns `known[name]`.

    Raises:
        UsageError: there is no such name; the message suggests the nearest and lists them all.

    """
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}.")
