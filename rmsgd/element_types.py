"""The element types of weights and gradients that the kernels know."""

import torch

ELEMENT_TYPES = {
    dtype: str(dtype).removeprefix("torch.")
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
}
"""Every type and its name, in the order of ``csrc/dtype.h``, whose table says the rest."""

NUMBERS = {dtype: number for number, dtype in enumerate(ELEMENT_TYPES)}
"""Every type's number in the kernels' tables."""


def known_element_types() -> str:
    """The names of all of them, for messages."""
    return ", ".join(ELEMENT_TYPES.values())


def rounding(dtype: torch.dtype) -> float:
    """How far rounding may have moved an entry, as a share of it: see ``reference.numerical_zero``.

    The unit roundoff of the type that it is stored in, and three times that of the arithmetic whose sums made
    it: float32, or float64 for a float64 weight.
    """
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    return (torch.finfo(dtype).eps + 3.0 * torch.finfo(arithmetic).eps) / 2.0
