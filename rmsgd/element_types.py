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
