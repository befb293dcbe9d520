"""How much work a step and an epoch end are: bytes moved, multiplications."""

from rmsgd.layers import Unfolding

STEP_BYTES = 20
"""Bytes moved per fp32 parameter: weight, gradient and velocity are read, weight and velocity are written."""


def gram_multiplications(unfolding: Unfolding) -> int:
    """Multiplications of a whole Gram product of an L x M matrix: L^2 M."""
    return unfolding.L**2 * unfolding.M
