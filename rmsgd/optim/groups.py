"""Parameter groups of one layer each: a group has one learning rate, and so has a layer."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from rmsgd.layers import leader_of, unfoldings
from rmsgd.optim.options import in_short

Parameters: TypeAlias = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[Mapping[str, Any]]


class _Entry(NamedTuple):
    group: int
    """The number of its group among those that were given."""
    name: str | None
    parameter: Tensor

    @property
    def what(self) -> str:
        return "a parameter" if self.name is None else f"parameter {self.name}"


def layer_groups(params: Parameters, **defaults: Any) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer, one for each layer and the parameters that follow it.

    A layer is a weight with a spectrum: a matrix (o, i) or a kernel (o, i, *k) with more than one row and
    column. A bias, a norm or another parameter without one is with the layer before it in its own group, else
    with the layer whose name shares the longest module path with its own. Those that follow none are a group
    of their own. A tensor that is given twice, as tied weights are, is in one group.

    ```python
    groups = rmsgd.layer_groups(model.named_parameters(), weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, lr=3e-4, fused=True)
    ```

    Args:
        params: named parameters, parameters, or groups of either, each of which is split, as the
            ``param_groups`` of an optimizer. Names are worth giving: rates and reports go by them.
        defaults: options of every group; a group's own come first. Each group gets a tensor of its own where
            an option is one, as ``lr=torch.tensor(3e-4)`` is for a compiled step.

    Returns:
        The groups, in the order of registration. In each of them the layer is first.

    Raises:
        TypeError: ``params`` holds something else, or a parameter to train that has no shape yet.
        ValueError: a group has no "params", or another number of "param_names".
    """
    options, entries = _entries(params)
    layers = [i for i, entry in enumerate(entries) if _is_layer(entry)]
    number = {i: layer for layer, i in enumerate(layers)}
    names = [entries[i].name for i in layers]
    latest: dict[int, int] = {}  # group -> the last layer so far
    members: dict[tuple[int, int], list[_Entry]] = {}
    for i, entry in enumerate(entries):
        if i in number:
            latest[entry.group] = number[i]
            members.setdefault((entry.group, number[i]), []).insert(0, entry)
        else:
            leader = leader_of(entry.name, latest.get(entry.group), names)
            members.setdefault((entry.group, leader), []).append(entry)
    return [
        {**_own(defaults), **_own(options[group]), "params": [_as_given(entry) for entry in of_group]}
        for (group, _), of_group in members.items()
    ]


def _own(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options, every tensor among them as one of the group's own."""
    return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in options.items()}


def _entries(params: Parameters) -> tuple[list[dict[str, Any]], list[_Entry]]:
    """The options of every group that was given, and all parameters, each of them once."""
    if isinstance(params, Tensor | Mapping | torch.nn.Module) or not isinstance(params, Iterable):
        raise TypeError(
            "layer_groups takes model.named_parameters(), parameters, or a list of groups of either, got "
            f"{_kind(params)}"
        )
    given = list(params)
    groups: list[Mapping[str, Any]] = [{"params": given}]
    if given and all(isinstance(part, Mapping) for part in given):
        groups = given  # type: ignore[assignment]
    options, entries, seen = [], [], set()
    for g, group in enumerate(groups):
        if "params" not in group:
            raise ValueError(f'group {g} has no "params", only {in_short(group)}')
        options.append({k: v for k, v in group.items() if k not in ("params", "param_names")})
        for name, parameter in _named(group):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                entries.append(_Entry(g, name, parameter))
    return options, entries


def _named(group: Mapping[str, Any]) -> Iterator[tuple[str | None, Tensor]]:
    """The parameters of a group and their names, as far as it has them."""
    members = group["params"]
    if not isinstance(members, Iterable):
        raise TypeError(f'"params" of a group must be parameters, got {in_short(members)}')
    members = [members] if isinstance(members, Tensor) else list(members)
    names = group.get("param_names") or [None] * len(members)
    if len(names) != len(members):
        raise ValueError(f"a group has {len(members)} parameters and {len(names)} param_names")
    for i, (name, member) in enumerate(zip(names, members, strict=True)):
        if isinstance(member, tuple) and len(member) == 2 and isinstance(member[0], str):
            name, member = member
        if not isinstance(member, Tensor):
            raise TypeError(f"parameter {name or i} must be a tensor or (name, tensor), got {_kind(member)}")
        yield name, member


def _kind(value: object) -> str:
    return f"a {type(value).__name__}" if isinstance(value, Tensor | torch.nn.Module) else in_short(value)


def _is_layer(entry: _Entry) -> bool:
    """Whether a parameter has a spectrum. A frozen one may be of any kind: its shape alone is asked."""
    if is_lazy(entry.parameter) and not entry.parameter.requires_grad:
        return False
    if is_lazy(entry.parameter):
        raise TypeError(
            f"{entry.what} has no shape yet, as its module is a lazy one: call the model once on an input "
            "first"
        )
    with torch._C.DisableTorchFunctionSubclass():
        shape = () if entry.parameter.is_nested else tuple(entry.parameter.shape)
    return len(shape) > 1 and bool(unfoldings(shape))


def _as_given(entry: _Entry) -> Tensor | tuple[str, Tensor]:
    return entry.parameter if entry.name is None else (entry.name, entry.parameter)
