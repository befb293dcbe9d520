"""Errors that a command answers with one line instead of a traceback."""


class UsageError(ValueError):
    """The request makes no sense, or cannot be met here. The message says what was expected."""


class UnavailableError(RuntimeError):
    """An optional package is not installed, and could not be fetched. The message says how to get it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or NumPy says that the GPU's or the host's memory does not suffice."""
    said = str(error)
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in said for word in words)
    )
