"""The CPU kernels of rmsgd, in terms of pointers, sizes and plain numbers."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Group: TypeAlias = tuple[float, float, float, float, bool, bool, bool]
"""multiplier, momentum, dampening, weight_decay, nesterov, maximize, velocity."""

class StepPlan:
    """The momentum step of a set of parameters, made once and valid while their memory stays.

    Args:
        parameters: data pointers.
        buffers: data pointers of the momentum buffers or velocities, 0 where there is none. A buffer
            is float64 for a float64 parameter, else float32.
        dtypes: "float32", "float64", "float16" or "bfloat16" for each parameter.
        numels: number of elements of each.
        groups: for each, an index into the `groups` that `step` is given.
        eta_indices: for each, the index of its learning rate in `eta`.
        eta: learning rates, one-dimensional, writeable at any time: read anew at every step. Kept alive.
        fresh: one flag for each parameter: no gradient has entered its buffer yet, so that the buffer
            counts as zero whatever it holds and the next gradient is not dampened. `step` clears it.
            A group without momentum leaves it as it is. Kept alive.

    A parameter, its buffer and its gradient have equal strides and fill their memory without gaps.

    Raises:
        ValueError: lengths differ, a dtype is unknown, a size is negative, a pointer is null.
        IndexError: an index of `eta_indices` or `groups` is out of range.
        TypeError: an argument has the wrong type; `eta` and `fresh` are never converted or copied.
    """

    def __init__(
        self,
        parameters: Sequence[int],
        buffers: Sequence[int],
        dtypes: Sequence[str],
        numels: Sequence[int],
        groups: Sequence[int],
        eta_indices: Sequence[int],
        eta: NDArray[np.float64],
        fresh: NDArray[np.bool_],
    ) -> None: ...
    def step(
        self, gradients: Sequence[int], groups: Sequence[Group], grad_scale: float = 1.0, threads: int = 1
    ) -> None:
        """Take one step; the GIL is released meanwhile.

        With g = (maximize ? -gradient : gradient) / grad_scale + weight_decay w and
        rate = multiplier * eta[eta_indices[k]]:

        momentum 0:  w -= rate g;  neither buffer nor dampening is used
        velocity:    v <- momentum v - (1 - dampening) rate g;  w += v, or Nesterov momentum v - rate g
        otherwise:   b <- momentum b + (1 - dampening) g;  w -= rate b, or Nesterov rate (g + momentum b)

        Args:
            gradients: data pointers, in the parameters' dtypes; 0 where there is none this time:
                that parameter, its buffer and its flag stay as they are.
            groups: the hyper-parameters now.
            grad_scale: what the gradients are divided by; they are not written.
            threads: how many to use; the result does not depend on it.

        Raises:
            ValueError: a length, `grad_scale` or `threads` is wrong, or a parameter with momentum and a
                gradient has no buffer. Nothing has been written then.
            IndexError: `groups` is too short.
        """
    def step_tensors(
        self,
        tensor_type: type[Tensor],
        parameters: list[Tensor],
        groups: Sequence[Group],
        grad_scale: float = 1.0,
        threads: int = 1,
    ) -> list[int] | None:
        """Take one step along each parameter's `grad`, which is read and checked here.

        The quick way for plain tensors, without a Python operation per parameter. It needs
        torch >= 2.10, whose tensor type carries the C exchange table of DLPack.

        Args:
            tensor_type: `torch.Tensor`.
            parameters: the plan's parameters in its order, plain tensors; their memory is compared with the
                plan's. The buffers' is not.
            groups: as for `step`.
            grad_scale: as for `step`.
            threads: as for `step`.

        Returns:
            The indices of the parameters without a gradient, which were left alone. The caller bumps
            the version counters of all the others. None, and nothing is written, where a parameter's memory
            is not as planned, or a gradient is not a dense CPU tensor of the parameter's strides and dtype
            (or float32 for a half-precision parameter), or torch is older: the caller then looks at each
            one and uses `step`.

        Raises:
            ValueError, IndexError: as `step` does.
            TypeError: one of `parameters` is not a `tensor_type`.
        """
