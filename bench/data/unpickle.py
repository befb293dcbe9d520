"""Reading pickles without running what is in them."""

import pickle
from collections.abc import Callable, Mapping
from typing import IO, Any

Allowed = Mapping[tuple[str, str], Callable[..., Any]]


class _Restricted(pickle.Unpickler):
    def __init__(self, file: IO[bytes], allowed: Allowed, encoding: str) -> None:
        super().__init__(file, encoding=encoding)
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no such file needs") from None


def maker(value: object) -> Any:
    """The callable that a pickle of `value` names to make it."""
    return value.__reduce__()[0]


def load(file: IO[bytes], allowed: Allowed, encoding: str = "ASCII") -> Any:
    """The content of a pickle that may name only what is in `allowed`.

    Args:
        file: a file that is open for reading.
        allowed: from (module, name) to the object that stands for it.
        encoding: the encoding of text that Python 2 wrote; "bytes" leaves it as bytes.

    Raises:
        pickle.UnpicklingError: the pickle names something else, or is not complete.

    """
    try:
        return _Restricted(file, allowed, encoding).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle can raise almost anything
        raise pickle.UnpicklingError(
            f"it is not a complete pickle ({type(error).__name__}: {error})"
        ) from error
