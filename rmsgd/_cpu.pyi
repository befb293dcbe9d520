"""The CPU kernels of rmsgd, in terms of pointers, sizes and plain numbers."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_Group: TypeAlias = tuple[float, float, float, float, bool, bool, bool]
"""multiplier, momentum, dampening, weight_decay, nesterov, maximize, velocity."""

class StepPlan:
    """The momentum step of a set of parameters, made once and valid until their memory moves.

    Args:
        parameters: data pointers.
        buffers: data pointers of the momentum buffers or velocities, 0 where there is none. A buffer
            is float64 for a float64 parameter, else float32.
        dtypes: the name of each parameter's type, one of ``element_types()``.
        numels: number of elements of each.
        groups: for each parameter, an index into the `groups` that `step` is given.
        eta_indices: for each parameter, the index of its learning rate in `eta`.
        eta: the learning rates, (rates,), which may be written at any time and are read at every step. The
            plan keeps this array alive.
        fresh: one flag for each parameter, which says that no gradient has entered its buffer yet, so that
            the buffer counts as zero whatever it holds and the next gradient is not dampened. `step` clears
            it. A group without momentum leaves it as it is. The plan keeps this array alive.

    A parameter, its buffer and its gradient have equal strides and fill their memory without gaps.

    Raises:
        ValueError: lengths differ, a dtype is unknown, a size is negative, a pointer is null or misaligned,
            or two of the parameters and buffers share memory.
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
        self,
        gradients: Sequence[int],
        groups: Sequence[_Group],
        grad_scale: float = 1.0,
        threads: int = 1,
        dtypes: Sequence[str] | None = None,
    ) -> None:
        """Take one step; the GIL is released meanwhile.

        With g = (maximize ? -gradient : gradient) / grad_scale + weight_decay w and
        rate = multiplier * eta[eta_indices[k]]:

        momentum 0:  w -= rate g;  neither buffer nor dampening is used
        velocity:    v <- momentum v - (1 - dampening) rate g;  w += v, or Nesterov momentum v - rate g
        otherwise:   b <- momentum b + (1 - dampening) g;  w -= rate b, or Nesterov rate (g + momentum b)

        Args:
            gradients: data pointers, or 0 where a parameter has no gradient: then it, its buffer and its flag
                stay as they are.
            groups: the current hyper-parameters.
            grad_scale: the divisor of the gradients, which are not written.
            threads: the number of threads; the result does not depend on it.
            dtypes: the gradients' dtypes. By default they are those of the parameters; those of
                half-precision parameters may be float32.

        Raises:
            ValueError: a length, a dtype, `grad_scale` or `threads` is wrong, a gradient is misaligned or
                shares memory with a parameter or a buffer, or a parameter with momentum and a gradient has
                no buffer. Nothing has been written then.
            IndexError: `groups` is too short.
            RuntimeError: another thread is taking a step.
        """
    def step_tensors(
        self,
        tensor_type: type[Tensor],
        parameters: list[Tensor],
        groups: Sequence[_Group],
        grad_scale: float = 1.0,
        threads: int = 1,
    ) -> list[int] | None:
        """Take one step along each parameter's `grad`, which is read and checked here.

        This is the quick way for plain tensors, without a Python operation per parameter. It needs
        torch >= 2.10, whose tensor type carries the C exchange table of DLPack.

        Args:
            tensor_type: `torch.Tensor`.
            parameters: the plan's parameters in its order, plain tensors; their memory is compared with the
                plan's. The buffers' is not.
            groups: as for `step`.
            grad_scale: as for `step`.
            threads: as for `step`.

        Returns:
            The indices of the parameters without a gradient, which were left alone. The caller increments
            the version counters of all the others. The result is None, and nothing is written, if a
            parameter's memory is not as planned, if a gradient is not a dense, aligned CPU tensor of the
            parameter's strides and dtype (or float32 for a half-precision parameter) in memory of its own, or
            if torch is older. The caller then checks each gradient and uses `step`.

        Raises:
            ValueError, IndexError, RuntimeError: as `step` does.
            TypeError: one of `parameters` is not a `tensor_type`.
        """

_Matrix: TypeAlias = tuple[int, str, Sequence[int], Sequence[int], Sequence[int], Sequence[int]]
"""Data pointer, dtype, sizes and strides (in elements) of the smaller side, sizes and strides of the larger.

A side is a product of up to four tensor dimensions that cannot be joined to one. The order of rows and
columns does not matter to singular values.
"""

class Layouts:
    """The current addresses, devices, dtypes, sizes and strides of some tensors.

    They are read without a Python operation per tensor, by the C exchange table of DLPack that torch >= 2.10
    publishes on its tensor type. The tensors are not kept, and ``hold`` is given them again.

    Raises:
        ValueError: the type has no such table, or a tensor has no memory of its own.
        TypeError: one of them is not a tensor.
    """

    def __init__(self, tensor_type: type[Tensor], tensors: list[Tensor]) -> None: ...
    def hold(self, tensors: list[Tensor]) -> bool:
        """Whether these tensors are all as they were."""

def measure(matrices: Sequence[_Matrix], threads: int = 1) -> NDArray[np.float64]:
    """Singular values, EVBMF and metrics of matrices; the GIL is released meanwhile.

    Args:
        matrices: the matrices, which are not written. The caller guarantees the memory that they span.
        threads: the number of threads; the result does not depend on it.

    Returns:
        (matrices, 7) float64, the fields of ``backends.base``: rank, noise variance, stable rank, condition
        number, sum of d_i / d_1, status, stage. The status NEEDS_SVD says that two Gram matrices were not
        accurate enough and that the row is an estimate. NOT_FINITE says that there is a NaN or an Inf and
        that the row holds zeros.

    Raises:
        ValueError: a dtype is unknown, a size is below 1, sizes and strides differ in number, the smaller
            side is the longer one or has more than 2^24 rows, or a pointer is null or misaligned.
        MemoryError: there is no room for the Gram matrices.
        RuntimeError: RMSGD_ISA names an instruction set that this CPU does not have.
    """

def measure_parts(
    matrices: Sequence[_Matrix], threads: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``measure``, with the time of its parts.

    Returns:
        The table, and (4,) seconds: Gram matrices, reduction to tridiagonal form, eigenvalues, EVBMF with the
        metrics. They are sums over the matrices. An SVD, which the caller takes, is not included.

    Raises:
        As ``measure``.
    """

def spectra(
    matrices: Sequence[_Matrix], values: str, threads: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``measure``, and singular values: each square is within 16 u of the largest square.

    For a smaller side of 1024 and more (fp64) or 1449 and more (fp32) it may be 64 u of the root mean square
    of all squares, if that is more.

    Args:
        matrices: as for ``measure``.
        values: which are wanted. "top": those above the noise threshold, from what decided their number.
            "all": all, from a Gram matrix in fp64 (u = 2^-53). "half": all, in fp32 (u = 2^-24) where that
            gives the larger half to three digits, else in fp64. "bulk": the same without metrics, whose
            fields mean nothing then. In fp32 a square may be off by 1e-4 of itself besides, and one that is
            not known to three digits is 0.
        threads: as for ``measure``.

    Returns:
        The table, and all singular values one matrix after the other: for each as many as its smaller side
        is long, descending, in units of the weight, 0 where one is not wanted or its square is below 8 u of
        the largest. They mean nothing where the status is not MEASURED.

    Raises:
        ValueError: there is no such choice of values; and as ``measure``.
        MemoryError, RuntimeError: as ``measure``.
    """

def measure_spectrum(gamma: NDArray[np.float64], M: int) -> NDArray[np.float64]:
    """One row of ``measure`` from the L singular values of an L x M matrix.

    Args:
        gamma: (L,) contiguous and aligned, descending, with those that count as zero set to 0. It is never
            converted.
        M: the larger side.

    Raises:
        ValueError: ``gamma`` is empty, has another number of dimensions, a NaN or an Inf, is not descending
            or goes below zero; or M < L.
    """

def update_rates(
    parameter: NDArray[np.int32],
    group: NDArray[np.int32],
    spectrum_begin: NDArray[np.int32],
    weight: NDArray[np.float64],
    stable_rank: NDArray[np.float64],
    ready: NDArray[np.int32],
    unbounded: NDArray[np.float64],
    eta: NDArray[np.float64],
    follower: NDArray[np.int32],
    leader: NDArray[np.int32],
    follower_group: NDArray[np.int32],
    groups: Sequence[tuple[float, float, float, float, float, float, float, float, int, bool, int, bool]],
    metrics: NDArray[np.float64],
) -> None:
    """Take one epoch end, and update ``eta``, ``unbounded``, ``stable_rank`` and ``ready`` in place.

    Args:
        parameter: for this and all arguments up to ``follower_group`` see ``backends.base.RateTables``.
        groups: see ``backends.base.RateGroup``.
        metrics: (rows, 7), the result of ``measure``.

    Raises:
        TypeError: an array has another dtype or is not contiguous; none is ever converted or copied.
        ValueError: a number of entries does not fit, an array is misaligned or read-only, two of them share
            memory, or there is no such column or rule.
        IndexError: an index is out of range.
    """

def element_types() -> list[str]:
    """The names of the element types, in the order of their numbers."""

def isa() -> str:
    """The instruction set of the kernels that run: "baseline", "avx2" or "avx512".

    Raises:
        RuntimeError: RMSGD_ISA names one that is unknown or that this CPU does not have.
    """
