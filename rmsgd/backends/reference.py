"""The formulas in float64 NumPy as a backend, for tests and comparisons."""

from rmsgd import reference
from rmsgd.backends.numpy_ import NumpyBackend


def create() -> NumpyBackend:
    """The backend; needs nothing but NumPy and SciPy."""
    return NumpyBackend(
        "reference", "NumPy and SciPy", reference.measure_singular_values, reference.momentum_update
    )
