"""Backends that other packages bring, found by their entry points.

A package registers a backend by an entry point of the group ``rmsgd.backends`` that refers to an
``rmsgd.backends.Entry``::

    # pyproject.toml
    [project.entry-points."rmsgd.backends"]
    mlu = "rmsgd_mlu:entry"

    # rmsgd_mlu/__init__.py
    from rmsgd.backends import Entry

    entry = Entry("mlu", "mlu", create)  # create() gives what rmsgd.backends.base.Backend describes

A fault of such a package shows as a line in ``rmsgd doctor`` and never as an error of the optimizer.
"""

from collections.abc import Callable, Collection, Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import NoReturn

from rmsgd.backends.base import ATTRIBUTES, OPERATIONS, Backend, BackendUnavailable
from rmsgd.backends.entry import Entry

GROUP = "rmsgd.backends"

UNKNOWN = "unknown"
"""The device of a backend whose package fails before it names one."""


def names() -> list[str]:
    """Names of the backends that installed packages register; imports none of them."""
    return [point.name for point in _points()]


def entries(taken: Collection[str], only: str | None = None) -> Iterator[Entry]:
    """The entries that installed packages register. Each package is imported when its turn comes.

    Args:
        taken: names that are in use and that no package may give its backend.
        only: the name to look for; None looks for all.
    """
    for point in _points():
        if only is not None and point.name != only:
            continue
        if point.name in taken:
            yield _broken(point.name, f"{_package(point)} must give its backend another name")
        else:
            yield _entry(point)


@cache
def _points() -> tuple[EntryPoint, ...]:
    return tuple(sorted(entry_points(group=GROUP), key=lambda point: point.name))


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.module


@cache
def _entry(point: EntryPoint) -> Entry:
    """The entry that a package registers, guarded against its errors, or one that tells why there is none."""
    package = _package(point)
    try:
        found = point.load()
    except Exception as error:  # a module may raise anything when it is imported
        return _broken(point.name, f"{package} cannot be imported: {_in_one_line(error)}")
    if not isinstance(found, Entry):
        kind = type(found).__name__
        return _broken(point.name, f"{package} registers a {kind} instead of an rmsgd.backends.Entry")
    return Entry(point.name, found.device, _guarded(found.create, package))


def _broken(name: str, reason: str) -> Entry:
    def create() -> NoReturn:
        raise BackendUnavailable(reason)

    return Entry(name, UNKNOWN, create)


def _guarded(create: Callable[[], Backend], package: str) -> Callable[[], Backend]:
    """Wrap ``create`` so that its every failure is a BackendUnavailable."""

    def guarded() -> Backend:
        try:
            backend = create()
        except BackendUnavailable as error:
            raise BackendUnavailable(" ".join(str(error).split())) from None
        except Exception as error:
            raise BackendUnavailable(f"{package} cannot make it: {_in_one_line(error)}") from error
        lacking = [name for name in (*ATTRIBUTES, *OPERATIONS) if not hasattr(backend, name)]
        if lacking:
            raise BackendUnavailable(f"{package} makes one without {', '.join(lacking)}")
        return backend

    return guarded


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
