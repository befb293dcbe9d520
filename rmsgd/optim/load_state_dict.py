"""Loading a checkpoint into the optimizer: all of it is checked before anything changes."""

import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy as copy_of
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from rmsgd.optim.distributed import is_dtensor
from rmsgd.optim.options import (
    ABOVE_0,
    AT_LEAST_0,
    FINITE,
    INITIAL_RANK,
    OPTIONS,
    YES_OR_NO,
    Range,
    check_ranges,
    in_short,
    listed,
    number,
)
from rmsgd.optim.records import parameter_name
from rmsgd.optim.state import BUFFERS, Group

_GROUP: Mapping[str, Range] = {
    **OPTIONS,
    "lr": (lambda x: -1e-9 <= number(x) < math.inf, "0 or more"),
    "lr0": AT_LEAST_0,
    "initial_rank": INITIAL_RANK,
}
"""The ranges of a checkpoint's options: its lr may be where a schedule ends, and rounded below 0."""

_OF_OTHERS = {"betas", "eps", "etas", "lambd", "max_iter"}
"""Options that other optimizers have, and neither RMSGD nor SGD: they tell before there is any state."""

_OF_ANOTHER = "it is another optimizer's checkpoint, neither RMSGD's nor torch.optim.SGD's"

STATE_NUMBERS: Mapping[str, tuple[Callable[[float], float], Range]] = {
    "rate": (float, FINITE),
    "stable_rank": (float, (lambda x: AT_LEAST_0[0](x) or _is_nan(x), "0 or more, or NaN")),
    "epoch": (int, (lambda x: AT_LEAST_0[0](x) and number(x).is_integer(), "a whole number")),
    "decay": (float, ABOVE_0),
    "fresh": (bool, YES_OR_NO),
    "ready": (bool, YES_OR_NO),
}
"""What the numbers in a parameter's state are, and their ranges."""


@dataclass(frozen=True)
class AsItIs:
    """A wrapper of a parameter's state, or of others' entries, for ``Optimizer.load_state_dict``.

    torch would cast its tensors to the parameter's dtype, and a velocity in bfloat16 would lose precision.
    """

    value: Any


def check_and_complete(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state_dict that fits the optimizer, from its own, torch's SGD's or another rule's.

    Options that the checkpoint's groups lack are taken from the optimizer's. Nothing is changed.

    Raises:
        ValueError: the checkpoint is one of rmsgd 1.0.2 or of another optimizer, its parameters are not the
            optimizer's, or it holds a value that no optimizer writes. The message names the difference.
    """
    check_form(state_dict)
    groups, saved = optimizer.param_groups, state_dict["param_groups"]
    if any("lr_vector" in group for group in saved):
        raise ValueError(
            "this checkpoint was written by rmsgd 1.0.2, which keeps neither its epoch nor its learning "
            "rates in it, so that no run can go on from there: load the model's weights alone, and begin "
            "with RMSGD(..., initial_rank='measure')"
        )
    _check_parameters(groups, saved)
    completed = [_complete_group(*pair) for pair in zip(groups, saved, strict=True)]
    for g, group in enumerate(completed):
        check_ranges(group, _GROUP, f"group {g} of the checkpoint: ")
    owners = {
        key: (p, parameter_name(group, g, i))
        for g, (group, theirs) in enumerate(zip(groups, saved, strict=True))
        for i, (p, key) in enumerate(zip(group["params"], theirs["params"], strict=True))
    }
    ours = {key for group in saved if _is_ours(group) for key in group["params"]}
    _check_states(owners, state_dict["state"], ours, all(map(_is_ours, saved)))
    for g, group in enumerate(saved):
        foreign = [] if _is_ours(group) else sorted(_OF_OTHERS & group.keys())
        if foreign:
            raise ValueError(f"group {g} of the checkpoint has {listed(foreign)}: {_OF_ANOTHER}")
    return {
        **state_dict,
        "state": {
            key: AsItIs({k: _plain(k, v) for k, v in state.items()} if key in owners else state)
            for key, state in state_dict["state"].items()
        },
        "param_groups": completed,
    }


def unwrapped_state(state: Any, device: torch.device | None) -> Any:
    """A copy of what ``check_and_complete`` wrapped, on ``device`` unless that is None."""
    return _copied(state.value, device) if isinstance(state, AsItIs) else state


def _copied(value: Any, device: torch.device | None) -> Any:
    """A copy of a value and its tensors, also in dicts and lists. Keys stay: they may be parameters."""
    if isinstance(value, Tensor):
        value = value.detach()
        return value.clone() if device is None or value.device == device else value.to(device)
    if type(value) in (dict, OrderedDict, defaultdict):
        copy = copy_of(value)
        for key, item in value.items():  # torch leaves a counter of steps on the host, too
            copy[key] = _copied(item, None if key == "step" else device)
        return copy
    if type(value) in (list, tuple):
        return type(value)(_copied(item, device) for item in value)
    return value


def _is_nan(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and bool(value.isnan())
    return isinstance(value, float) and math.isnan(value)


def _plain(key: str, value: Any) -> Any:
    """A number in the type that the state uses; any other value as it is."""
    return STATE_NUMBERS[key][0](number(value)) if key in STATE_NUMBERS else value


def _complete_group(group: Group, saved: Group) -> Group:
    filled = {k: v for k, v in group.items() if k not in ("params", "param_names", "lr0")} | saved
    if "lr0" not in saved:
        lr = number(filled["lr"])
        filled["lr0"] = lr if lr > 0.0 else group["lr0"]
    return filled


def check_form(state_dict: object) -> None:
    """Raise ValueError if a checkpoint does not have the form of ``Optimizer.state_dict()``."""

    def refuse(what: str, expected: str, value: object) -> NoReturn:
        raise ValueError(f"{what} must be {expected}, got {in_short(value)}")

    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        refuse("a checkpoint of an optimizer", "a dict with 'state' and 'param_groups'", state_dict)
    groups, states = state_dict["param_groups"], state_dict["state"]
    if not isinstance(groups, list | tuple):
        refuse("param_groups of the checkpoint", "a list", groups)
    seen: set[Any] = set()
    for g, group in enumerate(groups):
        where = f"group {g} of the checkpoint"
        if not isinstance(group, Mapping):
            refuse(where, "a dict", group)
        keys, names = group.get("params"), group.get("param_names")
        if not isinstance(keys, list | tuple) or not all(isinstance(key, int | str) for key in keys):
            refuse(f"{where}: params", "a list of the numbers of parameters", keys)
        for key in keys:
            if key in seen:
                raise ValueError(f"{where}: params holds {key!r}, which the checkpoint has already listed")
            seen.add(key)
        fits = isinstance(names, list | tuple) and len(names) == len(keys)
        if names is not None and not (fits and all(isinstance(name, str) for name in names)):
            refuse(f"{where}: param_names", f"{len(keys)} names", names)
    if not isinstance(states, Mapping):
        refuse("state of the checkpoint", "a dict", states)
    for key, state in states.items():
        if key in seen and not isinstance(state, Mapping):
            refuse(f"state of parameter {in_short(key)} in the checkpoint", "a dict", state)


def _check_parameters(groups: Sequence[Group], saved: Sequence[Group]) -> None:
    """Raise ValueError if the checkpoint's groups have other numbers of parameters, or other parameters."""

    def names(of: Sequence[Group]) -> list[str]:
        return [name for group in of for name in group.get("param_names") or ()]

    ours, theirs = [len(g["params"]) for g in groups], [len(g["params"]) for g in saved]
    if ours != theirs:
        message = f"the checkpoint has groups of {theirs} parameters, the optimizer of {ours}"
        known, loaded = names(groups), names(saved)
        if known and loaded:
            missing, unexpected = sorted(set(known) - set(loaded)), sorted(set(loaded) - set(known))
            message += f"; missing in the checkpoint: {listed(missing)}; unexpected: {listed(unexpected)}"
        raise ValueError(message)
    named = [pair for pair in zip(groups, saved, strict=True) if all(g.get("param_names") for g in pair)]
    known, loaded = names([group for group, _ in named]), names([group for _, group in named])
    # Names may change, as under a wrapper that adds a prefix. The same names in another order are an error.
    if known != loaded and sorted(known) == sorted(loaded):
        mine, its = next((a, b) for a, b in zip(known, loaded, strict=True) if a != b)
        raise ValueError(f"the checkpoint lists {its} where the optimizer has {mine}: the order differs")


def _is_ours(group: Mapping[str, Any]) -> bool:
    """Whether RMSGD wrote a checkpoint's group; a group of another optimizer has no ``lr0``."""
    return {"lr0", "rule"} <= group.keys()


def _is_of_a_parameter(key: Any, state: Mapping[str, Any]) -> bool:
    """Whether an entry is RMSGD's state of a parameter, under the number torch gives it or another key."""
    return (
        not STATE_NUMBERS.keys().isdisjoint(state)
        if isinstance(key, int)
        else STATE_NUMBERS.keys() <= state.keys()
    )


def _check_states(
    owners: Mapping[Any, tuple[Tensor, str]],
    states: Mapping[Any, Any],
    ours: Collection[Any],
    all_ours: bool,
) -> None:
    """Raise ValueError for a state that RMSGD cannot go on from.

    Entries that others, such as wrappers, keep in RMSGD's state are not checked. In another optimizer's
    checkpoint an unknown tensor is the state of another rule, and going on without it would be wrong.

    Args:
        owners: parameter and name by the key of its state.
        states: the states of the checkpoint.
        ours: keys of the parameters whose groups RMSGD wrote.
        all_ours: whether RMSGD wrote all groups.
    """
    strangers = [
        in_short(key)
        for key, state in states.items()
        if key not in owners
        and (not all_ours or (isinstance(state, Mapping) and _is_of_a_parameter(key, state)))
    ]
    if strangers:
        raise ValueError(
            f"the checkpoint has state for parameters in none of its groups: {listed(strangers)}"
        )
    different = []
    for key in [key for key in states if key in owners]:
        state, (p, name) = states[key], owners[key]
        _check_values(state, p, name, key in ours)
        for kind in BUFFERS:
            buffer = state.get(kind)
            if buffer is None:
                continue
            _check_buffer(buffer, p, name, kind)
            if buffer.shape != p.shape:
                different.append(f"{name} is {tuple(p.shape)}, its {kind} {tuple(buffer.shape)}")
    if different:
        raise ValueError(f"shapes differ between optimizer and checkpoint: {listed(different)}")


def _check_values(state: Mapping[str, Any], p: Tensor, name: str, is_ours: bool) -> None:
    """Raise ValueError for a number out of its range, a tensor without values, and another rule's tensor."""
    for kind, value in state.items():
        if isinstance(value, Tensor) and value.is_meta and not p.is_meta:
            raise ValueError(f"{name} in the checkpoint: {kind} is on the meta device, without values")
    numbers = {kind: what for kind, (_, what) in STATE_NUMBERS.items() if kind in state}
    check_ranges(state, numbers, f"{name} in the checkpoint: ")
    known = (*BUFFERS, *STATE_NUMBERS)
    foreign = [str(k) for k, v in state.items() if isinstance(v, Tensor) and k not in known]
    if foreign and not is_ours:
        raise ValueError(f"{name} in the checkpoint has {listed(foreign)}: {_OF_ANOTHER}")


def _check_buffer(buffer: object, p: Tensor, name: str, kind: str) -> None:
    """Raise ValueError for past gradients that are no plain numbers, or are sharded where ``p`` is not."""
    if not (isinstance(buffer, Tensor) and buffer.layout == torch.strided and buffer.is_floating_point()):
        got = f"{buffer.dtype}, {buffer.layout}" if isinstance(buffer, Tensor) else in_short(buffer)
        raise ValueError(
            f"{name} in the checkpoint: {kind} must be a dense tensor of floating-point numbers, got {got}"
        )
    if is_dtensor(buffer) != is_dtensor(p):
        raise ValueError(
            f"{name} or its {kind} is a DTensor and the other is not: load the checkpoint with "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
        )
