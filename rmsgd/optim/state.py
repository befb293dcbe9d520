"""The state of a parameter.

``optimizer.state[p]`` has these entries from the start, so that every checkpoint format carries them:

    velocity or momentum_buffer   past gradients; float64 for a float64 parameter, else float32
    fresh                         whether no gradient has entered it yet
    rate                          eta as the rule moves it, before its bounds and its group's multiplier
    stable_rank                   what the rule measured at the last epoch end (NaN: to be measured before the
                                  first step); see ``Rule.mode_weights``
    epoch                         how many epoch ends there have been
    decay                         product of the gammas that zeta has been multiplied by
    ready                         whether the layer has left the release's ``not_ready`` list

While the optimizer runs, rate, stable_rank and ready are kept where the kernels read and write them
(``rmsgd.optim.device_rates``), and so is fresh (``rmsgd.optim.device_step``). On a CPU every change is
written to the state at once, for wrappers that save it by themselves. On a GPU, which is not waited for,
``state_dict()``, ``learning_rates()``, pickling and copying write it.

Entries that others keep in ``optimizer.state``, under keys of their own or beside these in the state of a
parameter, stay where they are, and are part of checkpoints and copies. The state of a parameter that leaves
the groups is deleted.
"""

import math
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from rmsgd.backends.base import buffer_dtype
from rmsgd.optim.options import applied_rate, fault, is_trained, multiplier
from rmsgd.rules import RULES, Buffer

State = dict[str, Any]
Group = dict[str, Any]
BUFFERS: tuple[Buffer, ...] = get_args(Buffer)


def buffer_key(group: Mapping[str, Any]) -> Buffer:
    """The key of past gradients in the state of a group's parameters."""
    return RULES[group["rule"]].buffer


def _buffer_like(p: Tensor) -> Tensor:
    return torch.zeros_like(p, dtype=buffer_dtype(p), memory_format=torch.preserve_format)


def complete_rates(p: Tensor, state: State, group: Mapping[str, Any]) -> None:
    """Add the entries that a parameter's state lacks for its rate to move at epoch ends."""
    state.setdefault("rate", group["lr0"])
    to_measure = group["initial_rank"] == "measure" and p.ndim > 1
    state.setdefault("stable_rank", math.nan if to_measure else 0.0)
    state.setdefault("epoch", 0)
    state.setdefault("decay", 1.0)
    state.setdefault("ready", False)


def complete(p: Tensor, state: State, group: Group) -> None:
    """Add the entries that a parameter's state lacks.

    Past gradients in the form of another rule are converted by ``v = -eta buf``. A frozen parameter has no
    past gradients until it has a gradient.
    """
    complete_rates(p, state, group)
    key = buffer_key(group)
    other = state.pop(BUFFERS[key == BUFFERS[0]], None)
    if state.get(key) is None:
        state.pop(key, None)
        rate = applied_rate(group, state["rate"], state["decay"]) * multiplier(group)
        if other is not None and (rate != 0.0 or key == "velocity"):
            factor = -rate if key == "velocity" else -1.0 / rate
            state[key] = other.to(buffer_dtype(p)) * factor
        elif group["momentum"] != 0 and is_trained(p) and fault(p) is None:
            state[key] = _buffer_like(p)
            state["fresh"] = True
    state.setdefault("fresh", key not in state)


def check_shape(p: Tensor, state: Mapping[str, Any], name: str) -> None:
    """Raise RuntimeError for a parameter whose past gradients have another shape."""
    for key in BUFFERS:
        buffer = state.get(key)
        if buffer is not None and buffer.shape != p.shape:
            raise RuntimeError(
                f"parameter {name} was resized to {tuple(p.shape)}, but its {key} has the shape "
                f"{tuple(buffer.shape)}: make a new optimizer for the new parameter"
            )


def follow(p: Tensor, state: State, group: Group) -> None:
    """Keep a parameter's past gradients on its device and in its layout, also after ``model.to``.

    A tensor that was made in inference mode, as by ``load_state_dict`` there, is copied, since it could not
    be written to later.
    """
    key = buffer_key(group)
    buffer = state.get(key)
    if buffer is None:
        return
    as_it_was = (
        buffer.device == p.device and buffer.dtype == buffer_dtype(p) and buffer.stride() == p.stride()
    )
    if buffer.is_meta and not p.is_meta:
        state[key] = _buffer_like(p)
    elif not as_it_was or buffer.is_inference():
        state[key] = _buffer_like(p).copy_(buffer)
