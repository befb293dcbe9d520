"""Numbers of less than eight bits, packed into integers."""

import numpy as np
import torch
from torch import Tensor

from rmsgd.inspection.reading.stored import NotMeasurableError

_MOST_UNPACKED = 1 << 22
"""How many numbers are in memory as single bits at a time."""


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Unsigned numbers of ``bits`` bits each out of a stream of bits, the lowest first.

    ``words`` is (rows, n) of any integer dtype, and the result is (rows, ``count``) uint8.

    Raises:
        NotMeasurableError: there are fewer numbers than ``count``.
    """
    data = words.contiguous().view(torch.uint8).reshape(words.shape[0], -1)
    if data.shape[1] * 8 < count * bits:
        raise NotMeasurableError("packed weights with fewer codes than the weight has entries")
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        numbers: Tensor = (data[..., None] >> shifts) & (2**bits - 1)
        return numbers.reshape(words.shape[0], -1)[:, :count]
    result = np.empty((words.shape[0], count), np.uint8)
    step = max(1, _MOST_UNPACKED // max(1, count))
    for first in range(0, words.shape[0], step):
        stream = np.unpackbits(data[first : first + step].numpy(), axis=1, bitorder="little")
        digits = stream[:, : count * bits].reshape(-1, count, bits)
        result[first : first + step] = np.packbits(digits, axis=2, bitorder="little")[..., 0]
    return torch.from_numpy(result)
