"""What the optimizer remembers of a parameter, and how a checkpoint's memory becomes it.

``optimizer.state[p]`` holds, from the start, so that every checkpoint format carries it:

    velocity or momentum_buffer   past gradients; float64 for a float64 parameter, else float32
    fresh                         whether no gradient has entered it yet
    rate                          eta, the learning rate before its group's multiplier
    stable_rank                   s at the last epoch end (NaN: to be measured before the first step)
    epoch                         how many epoch ends there have been
    decay                         product of the gammas that zeta has been multiplied by
    ready                         whether the release's ``not_ready`` list has let go of the layer
"""

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rmsgd.distributed import is_dtensor
from rmsgd.options import multiplier, parameter_name

State = dict[str, Any]
Group = dict[str, Any]
_BUFFERS = ("velocity", "momentum_buffer")


def buffer_key(group: Mapping[str, Any]) -> str:
    """What a group's state calls its memory of past gradients."""
    return "velocity" if group["rule"] == "paper" else "momentum_buffer"


def buffer_dtype(p: Tensor) -> torch.dtype:
    """The type of a parameter's memory."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def _buffer_like(p: Tensor) -> Tensor:
    return torch.zeros_like(p, dtype=buffer_dtype(p), memory_format=torch.preserve_format)


def complete(p: Tensor, state: State, group: Group) -> None:
    """Add what a parameter's state lacks.

    The other rules' memory of past gradients becomes this rule's by ``v = -eta buf``. A parameter
    that is frozen has none until it has a gradient.
    """
    state.setdefault("rate", group["lr0"])
    state.setdefault("stable_rank", math.nan if group["initial_rank"] == "measure" else 0.0)
    state.setdefault("epoch", 0)
    state.setdefault("decay", 1.0)
    state.setdefault("ready", False)
    key = buffer_key(group)
    other = state.pop(_BUFFERS[key == _BUFFERS[0]], None)
    if state.get(key) is None:
        state.pop(key, None)
        rate = state["rate"] * multiplier(group)
        if other is not None and (rate != 0.0 or key == "velocity"):
            factor = -rate if key == "velocity" else -1.0 / rate
            state[key] = other.to(buffer_dtype(p)) * factor
            state.setdefault("fresh", False)
        elif group["momentum"] != 0 and (p.requires_grad or p.grad is not None):
            state[key] = _buffer_like(p)
            state["fresh"] = True
    state.setdefault("fresh", key not in state)


def check_shape(p: Tensor, state: Mapping[str, Any], name: str) -> None:
    """Raise RuntimeError for a parameter whose memory has another shape."""
    for key in _BUFFERS:
        buffer = state.get(key)
        if buffer is not None and buffer.shape != p.shape:
            raise RuntimeError(
                f"parameter {name} was resized to {tuple(p.shape)}, but its {key} has the shape "
                f"{tuple(buffer.shape)}: make a new optimizer for the new parameter"
            )


def follow(p: Tensor, state: State, group: Group) -> None:
    """Keep a parameter's memory on its device and in its layout, also after ``model.to``."""
    key = buffer_key(group)
    buffer = state.get(key)
    if buffer is None:
        return
    if buffer.is_meta and not p.is_meta:
        state[key] = _buffer_like(p)
    elif buffer.device != p.device or buffer.dtype != buffer_dtype(p) or buffer.stride() != p.stride():
        state[key] = _buffer_like(p).copy_(buffer)


# -- checkpoints ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class AsItIs:
    """A tensor on its way through ``Optimizer.load_state_dict``.

    torch would cast it to the parameter's type, and a bfloat16 velocity loses what float32 held.
    """

    tensor: Tensor


def check_and_complete(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state_dict that fits the optimizer, from its own, torch's SGD's or another rule's.

    Options that the checkpoint's groups lack are taken from the optimizer's. Nothing is changed.

    Raises:
        ValueError: the checkpoint is of rmsgd 1.0.2, or its parameters are not the optimizer's; the
            message names those that differ.
    """
    groups, saved = optimizer.param_groups, state_dict["param_groups"]
    if any("lr_vector" in group for group in saved):
        raise ValueError(
            "this checkpoint was written by rmsgd 1.0.2, which keeps neither its epoch nor its learning "
            "rates in it, so that no run can go on from there: load the model's weights alone, and begin "
            "with RMSGD(..., initial_rank='measure')"
        )
    _check_parameters(groups, saved)
    owners = {
        key: (p, parameter_name(group, g, i))
        for g, (group, theirs) in enumerate(zip(groups, saved, strict=True))
        for i, (p, key) in enumerate(zip(group["params"], theirs["params"], strict=True))
    }
    _check_states(owners, state_dict["state"])
    return {
        **state_dict,
        "state": {
            key: {k: AsItIs(v) if isinstance(v, Tensor) else v for k, v in state.items()}
            for key, state in state_dict["state"].items()
        },
        "param_groups": [_complete_group(*pair) for pair in zip(groups, saved, strict=True)],
    }


def unwrap(p: Tensor, state: State) -> None:
    """Take the tensors that ``check_and_complete`` wrapped: copies, on the parameter's device."""
    for key, value in state.items():
        if isinstance(value, AsItIs):
            tensor = value.tensor
            state[key] = tensor.clone() if tensor.device == p.device else tensor.to(p.device)


def _complete_group(group: Group, saved: Group) -> Group:
    filled = {k: v for k, v in group.items() if k not in ("params", "param_names", "lr0")} | saved
    if "lr0" not in saved:
        lr = float(saved["lr"])
        filled["lr0"] = lr if lr > 0.0 else group["lr0"]
    return filled


def _check_parameters(groups: Sequence[Group], saved: Sequence[Group]) -> None:
    """Raise ValueError where the checkpoint's groups do not hold as many parameters, or hold others."""

    def names(of: Sequence[Group]) -> list[str]:
        return [str(name) for group in of for name in group.get("param_names") or ()]

    ours, theirs = [len(g["params"]) for g in groups], [len(g["params"]) for g in saved]
    known, loaded = names(groups), names(saved)
    if ours != theirs:
        message = f"the checkpoint has groups of {theirs} parameters, the optimizer of {ours}"
        if known and loaded:
            missing, unexpected = sorted(set(known) - set(loaded)), sorted(set(loaded) - set(known))
            message += f"; missing in the checkpoint: {_list(missing)}; unexpected: {_list(unexpected)}"
        raise ValueError(message)
    # Names may change, as under a wrapper that adds a prefix; the same ones in another order are a mix-up.
    if known != loaded and sorted(known) == sorted(loaded):
        mine, its = next((a, b) for a, b in zip(known, loaded, strict=True) if a != b)
        raise ValueError(f"the checkpoint lists {its} where the optimizer has {mine}: the order differs")


def _check_states(
    owners: Mapping[Any, tuple[Tensor, str]], states: MutableMapping[Any, Mapping[str, Any]]
) -> None:
    strangers = [str(key) for key in states if key not in owners]
    if strangers:
        raise ValueError(f"the checkpoint has state for parameters in none of its groups: {_list(strangers)}")
    different = []
    for key, state in states.items():
        p, name = owners[key]
        for kind in _BUFFERS:
            buffer = state.get(kind)
            if buffer is not None and is_dtensor(buffer) != is_dtensor(p):
                raise ValueError(
                    f"{name} or its {kind} is a DTensor and the other is not: load the checkpoint with "
                    "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
                )
            if buffer is not None and buffer.shape != p.shape:
                different.append(f"{name} is {tuple(p.shape)}, its {kind} {tuple(buffer.shape)}")
    if different:
        raise ValueError(f"shapes differ between optimizer and checkpoint: {_list(different)}")


def _list(items: Sequence[str], most: int = 5) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return (", ".join(items[:most]) or "none") + more
