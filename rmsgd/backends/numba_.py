"""The reference compiled by numba: the fallback for installations without a compiler."""

from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rmsgd import reference
from rmsgd.backends.base import BackendUnavailable
from rmsgd.backends.numpy_ import NumpyBackend
from rmsgd.extras import install_command

Array = NDArray[np.floating[Any]]

_COMPILED = (
    "threshold",
    "tau_of",
    "slope",
    "free_energy_of_rank",
    "minimise_free_energy",
    "shrink",
    "low_rank_metrics",
    "measure_singular_values",
    "momentum_update",
)


def _compile_reference() -> dict[str, Any]:
    """The reference's functions compiled together, each calling the compiled others."""
    import numba

    scope = dict(vars(reference))
    for name in _COMPILED:
        source = getattr(reference, name)
        # A function looks names up in the module that it came from, which is `scope` here.
        copy = FunctionType(source.__code__, scope, name, source.__defaults__, source.__closure__)
        scope[name] = numba.njit(copy, nogil=True)
    return scope


def _launch_threads(numba: ModuleType) -> None:
    """Start numba's threads now. At the first step they would change the number of torch's threads."""
    before = torch.get_num_threads()
    numba.get_num_threads()
    torch.set_num_threads(before)


def create() -> NumpyBackend:
    """The backend; raises BackendUnavailable where numba cannot be imported."""
    try:
        import numba
    except ImportError as error:
        raise BackendUnavailable(f"numba cannot be imported ({error}): {install_command('numba')}") from None

    _launch_threads(numba)
    scope = _compile_reference()
    element = scope["momentum_update"]

    @numba.njit(nogil=True, parallel=True, error_model="numpy")
    def compiled(  # type: ignore[no-untyped-def]
        w, grad, v, eta, momentum, dampening, weight_decay, nesterov, maximize, fresh, velocity
    ):
        new_w, new_v = np.empty_like(w), np.empty_like(v)
        for i in numba.prange(len(w)):
            new_w[i], new_v[i] = element(
                w[i],
                grad[i],
                v[i],
                eta,
                momentum,
                dampening,
                weight_decay,
                nesterov,
                maximize,
                fresh,
                velocity,
            )
        return new_w, new_v

    def update(*arguments: Any) -> tuple[Array, Array]:
        # numba gets as many threads as torch has: more would spin and wait for each other on a busy machine.
        before = numba.get_num_threads()
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
        try:
            new: tuple[Array, Array] = compiled(*arguments)
        finally:
            numba.set_num_threads(before)
        return new

    description = f"numba {numba.__version__}, compiled on first use"
    return NumpyBackend("numba", description, scope["measure_singular_values"], update)
