"""The networks whose weights are measured: those of `bench.models`, and single large linear layers."""

import argparse

from torch import nn

from bench.errors import UsageError
from bench.models import architecture, build

LINEAR = "linear-"


class OneLinear(nn.Module):
    """A single large linear layer, as a network of its own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size, bias=False)


def network(name: str) -> nn.Module:
    """A model of `bench.models`, or "linear-N"; raises UsageError when there is none of that name."""
    size = _linear_size(name)
    return build(name) if size is None else OneLinear(size)


def networks(text: str) -> tuple[str, ...]:
    """`A,B,...` for argparse: names that `network` knows."""
    names = tuple(text.split(","))
    try:
        for name in names:
            if _linear_size(name) is None:
                architecture(name)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return names


def _linear_size(name: str) -> int | None:
    """N of "linear-N"; None for any other name."""
    if not name.startswith(LINEAR):
        return None
    size = name.removeprefix(LINEAR)
    if not size.isdecimal() or int(size) < 2:
        raise UsageError(f"{name!r}: expected {LINEAR}N, with N the rows and columns, from 2 on")
    return int(size)
