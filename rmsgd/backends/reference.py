"""Float64 NumPy: every formula as it is written. For tests and comparisons."""

from rmsgd import reference
from rmsgd.backends.numpy_ import NumpyBackend


def create() -> NumpyBackend:
    """The backend; needs nothing but NumPy and SciPy."""
    return NumpyBackend(
        "reference", "NumPy and SciPy", reference.measure_singular_values, reference.momentum_update
    )
