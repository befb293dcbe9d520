"""How much a step and an epoch end have to do: bytes moved, multiplications."""

from rmsgd.layers import Unfolding

STEP_BYTES = 20
"""Moved per fp32 parameter: weight, gradient and velocity are read, weight and velocity written."""


def gram_multiplications(unfolding: Unfolding) -> int:
    """Multiplications of a whole Gram product of an L x M matrix: L^2 M."""
    return unfolding.L**2 * unfolding.M
