"""Backends that other packages bring, found by their entry points.

A package registers a backend by an entry point of the group ``rmsgd.backends`` that refers to an
``rmsgd.backends.Entry``::

    # pyproject.toml
    [project.entry-points."rmsgd.backends"]
    mlu = "rmsgd_mlu:entry"

    # rmsgd_mlu/__init__.py
    from rmsgd.backends import Entry

    entry = Entry("mlu", "mlu", create)  # create() gives what rmsgd.backends.base.Backend describes

Whatever is wrong with such a package is one line in ``rmsgd doctor`` and never an error of the optimizer.
"""

from collections.abc import Callable, Collection, Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import NoReturn

from rmsgd.backends.base import ATTRIBUTES, OPERATIONS, Backend, BackendUnavailable
from rmsgd.backends.entry import Entry

GROUP = "rmsgd.backends"

UNKNOWN = "unknown"
"""The device of a backend whose package does not get as far as saying it."""


def names() -> list[str]:
    """Names of the backends that installed packages register; imports none of them."""
    return [point.name for point in _points()]


def entries(taken: Collection[str], only: str | None = None) -> Iterator[Entry]:
    """What installed packages register, by name; each package is imported when its turn comes.

    Args:
        taken: names that none of them may have.
        only: the one name that is asked for; None: all.
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
    """The entry that a package registers, made safe; where there is none, one that tells why."""
    package = _package(point)
    try:
        found = point.load()
    except Exception as error:  # whatever a module does when it is imported
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
    """``create``, whose every failure is a backend that is not available."""

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
