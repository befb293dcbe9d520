"""The optimizer's step inside ``torch.compile``, as one opaque operation.

Dynamo cannot look into the compiled core, and it would guard on every number that the step reads, so that a
schedule would recompile at each change. So the graph holds one call that declares which memory it changes,
and the step itself runs when the graph runs. The operation is used only while compiling, since an operation
of torch.library costs more than the whole step of a small network.
"""

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, TypeAlias
from weakref import WeakMethod

import torch
from torch import Tensor

Step: TypeAlias = Callable[[Sequence[int], Sequence[Tensor], Sequence[Tensor]], None]

_STEPS: dict[int, "WeakMethod[Step]"] = {}
_numbers = count()


def register_step(step: Step) -> int:
    """Return a number by which a compiled graph finds an optimizer's step, as long as the optimizer lives.

    ``step(indices, parameters, gradients)`` takes positions among all parameters, the parameters at these
    positions as the graph holds them, and their gradients.
    """
    number = next(_numbers)
    _STEPS[number] = WeakMethod(step, lambda _: _STEPS.pop(number, None))
    return number


# A replayed CUDA graph would repeat the learning rates and flags of the step that it recorded.
_UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None)  # torch 2.8 and later
_TAGS: dict[str, Any] = {} if _UNSAFE is None else {"tags": (_UNSAFE,)}  # torch 2.6 takes none


@torch.library.custom_op(
    "rmsgd::step",
    mutates_args=("parameters",),
    # Newer versions of torch infer this from the annotations; torch 2.6 cannot.
    schema="(SymInt number, SymInt[] indices, Tensor(a2!)[] parameters, Tensor[] gradients) -> ()",
    **_TAGS,
)
def _step(number: int, indices: list[int], parameters: list[Tensor], gradients: list[Tensor]) -> None:
    step = _STEPS[number]()
    assert step is not None
    with torch.no_grad():
        step(indices, parameters, gradients)


@_step.register_fake
def _(number: int, indices: list[int], parameters: list[Tensor], gradients: list[Tensor]) -> None:
    return None


def trace_step(number: int, everything: Sequence[Tensor]) -> None:
    """Put the step of an optimizer with these parameters into the graph that is being compiled."""
    indices = [i for i, p in enumerate(everything) if p.grad is not None]
    if indices:
        parameters = [everything[i] for i in indices]
        _step(number, indices, parameters, [p.grad for p in parameters])
