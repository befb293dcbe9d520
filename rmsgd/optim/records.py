"""The records of an optimizer's parameters, which say where each stands and how it is called."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor

from rmsgd.optim.options import device_of, is_trained


@dataclass(frozen=True)
class ParamRecord:
    """A parameter of an optimizer, its position and its name."""

    parameter: Tensor
    group: int
    """The index of its group."""
    position: int
    """Its position among all parameters, in the order of registration."""
    name: str
    """Its name if the optimizer was given names, else "group.index"."""
    named: bool


def records_of(groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, ParamRecord]:
    """The record of every parameter in these groups, in the order of registration."""
    records: dict[Tensor, ParamRecord] = {}
    for g, (group, names) in enumerate(zip(groups, parameter_names(groups), strict=True)):
        for p, name in zip(group["params"], names, strict=True):
            records.setdefault(p, ParamRecord(p, g, len(records), name, "param_names" in group))
    return records


def all_parameters(groups: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """The parameters of all groups, in their order."""
    return [p for group in groups for p in group["params"]]


def hold_the_same(groups: Sequence[Mapping[str, Any]], parameters: Sequence[Tensor]) -> bool:
    """Whether the groups hold these very parameters, in this order; asked at every step."""
    now = all_parameters(groups)
    return len(now) == len(parameters) and all(map(is_, now, parameters))


def by_device(records: Mapping[Tensor, ParamRecord]) -> dict[torch.device, list[ParamRecord]]:
    """The records of each device that holds trained parameters.

    Frozen parameters elsewhere are with those of the first such device, since nothing of them is read.
    """
    found: dict[torch.device, list[ParamRecord]] = {p.device: [] for p in records if is_trained(p)}
    elsewhere = next(iter(found), torch.device("cpu"))
    for p, record in records.items():
        device = device_of(p)
        found.setdefault(device if device in found else elsewhere, []).append(record)
    return found


def trained_tensors(records: Sequence[ParamRecord], device: torch.device) -> tuple[list[int], list[Tensor]]:
    """Which of these parameters are trained, and all of them, with an empty tensor for each frozen one.

    A frozen parameter may be a tensor of any kind, so it is not touched.
    """
    trained = [i for i, record in enumerate(records) if is_trained(record.parameter)]
    tensors = [torch.empty(0, device=device)] * len(records)
    for i in trained:
        tensors[i] = records[i].parameter
    return trained, tensors


def parameter_name(group: Mapping[str, Any], g: int, index: int) -> str:
    """The name of a parameter if the optimizer was given names, else "group.index"."""
    names = group.get("param_names") or ()
    return str(names[index]) if index < len(names) else f"{g}.{index}"


def parameter_names(groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The names of the parameters of all groups, each of which belongs to one parameter only.

    A name that a group holds more than once is followed by "#" and its index there. Where groups have names
    in common, every name is preceded by its group's number and a dot.
    """
    names = [_distinct(group, g) for g, group in enumerate(groups)]
    if sum(map(len, map(set, names))) == len({name for own in names for name in own}):
        return names
    return [[f"{g}.{name}" for name in own] for g, own in enumerate(names)]


def _distinct(group: Mapping[str, Any], g: int) -> list[str]:
    names = [parameter_name(group, g, i) for i in range(len(group["params"]))]
    times = Counter(names)
    return [name if times[name] == 1 else f"{name}#{i}" for i, name in enumerate(names)]
