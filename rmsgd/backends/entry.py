"""What is known of a backend before it runs: its name, its device type, and how to make it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from rmsgd.backends.base import Backend, BackendUnavailable


@dataclass(frozen=True)
class Status:
    """Whether a backend can run here, and if not, why."""

    name: str
    device: str
    available: bool
    reason: str


@dataclass(frozen=True)
class Entry:
    """A backend by name.

    Args:
        name: what RMSGD_BACKEND and ``rmsgd doctor`` call it.
        device: the device type it runs on, as in ``torch.device(device)``, or "any".
        create: makes the backend, or raises BackendUnavailable with the reason why it cannot run here and
            what to do. Called at most once.
    """

    name: str
    device: str
    create: Callable[[], Backend]

    def load(self) -> Backend:
        """The backend; raises BackendUnavailable with the reason when it cannot run here."""
        found = _load(self.create)
        if isinstance(found, str):
            raise BackendUnavailable(found)
        return found

    def status(self) -> Status:
        """Whether it can run here; loads it to find out."""
        try:
            return Status(self.name, self.device, True, self.load().description)
        except BackendUnavailable as error:
            return Status(self.name, self.device, False, str(error))


@cache
def _load(create: Callable[[], Backend]) -> Backend | str:
    """The backend, or why it cannot run here. It is kept, since it may take a minute of compilation."""
    try:
        return create()
    except BackendUnavailable as error:
        return str(error)


def forget_loaded() -> None:
    """Forget the backends that were loaded, so that each is made anew at its next use."""
    _load.cache_clear()
