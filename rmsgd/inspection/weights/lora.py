"""The products of LoRA's pairs."""

import re
from collections.abc import Iterator

from torch import Tensor

from rmsgd.inspection.reading.stored import StoredTensor
from rmsgd.inspection.weights.rule import Stored, Weight, numbers

# The names of A and B in PEFT, in loralib and in diffusion models. A is (r, inputs), B is (outputs, r).
_NAMES = (
    ("lora_A", "lora_B"),
    ("lora_down", "lora_up"),
    ("lora.down", "lora.up"),
    ("lora_embedding_A", "lora_embedding_B"),
)


def products(stored: Stored) -> Iterator[Weight]:
    """The product B A of every pair, as an additional layer that replaces no stored tensor.

    The factor alpha / r is left out. It changes only the noise variance, by its square.
    """
    for a in stored.tensors.values():
        for down, up in _NAMES:
            match = re.fullmatch(rf"(.*?)(?<![A-Za-z]){re.escape(down)}(\..+)?", a.name)
            b = stored.get(f"{match[1]}{up}{match[2] or ''}") if match else None
            if match is None or b is None or a.skip or not _fit(a.shape, b.shape):
                continue
            name = f"{match[1]}{up}@{down}{match[2] or ''}"
            shape = (b.shape[0], *a.shape[1:])

            def read(a: StoredTensor = a, b: StoredTensor = b, shape: tuple[int, ...] = shape) -> Tensor:
                left, right = numbers(b), numbers(a)
                if left.dtype != right.dtype:
                    left, right = left.double(), right.double()
                return (left.flatten(1) @ right.flatten(1)).reshape(shape)

            yield Weight(name, shape, read, {})


def _fit(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether two matrices fit, or two convolutions of which the second has kernels of one entry."""
    return len(a) == len(b) and len(a) > 1 and b[1] == a[0] and all(n == 1 for n in b[2:])
