"""The checkpoint of LayerRates, and the checks of one that is loaded."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rmsgd.optim.load_state_dict import STATE_NUMBERS
from rmsgd.optim.options import (
    AT_LEAST_0,
    INITIAL_RANK,
    OPTIONS,
    Range,
    check_ranges,
    in_short,
    listed,
    number,
)
from rmsgd.optim.state import State

_OPTIONS = {name: OPTIONS[name] for name in ("beta", "zeta", "linear")} | {"initial_rank": INITIAL_RANK}
_NUMBERS = ("rate", "stable_rank", "epoch", "decay", "ready")
"""The entries of a parameter's state that move its rate."""

_COUNT: Range = (lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 0, "a number of steps")
TRANSITION: Mapping[str, Range] = {
    "transition": (lambda x: x is None or _COUNT[0](x), "a whole number of steps from 0 on, or None")
}
"""The range of the option ``transition``."""


class Saved(NamedTuple):
    """What a ``LayerRates.state_dict`` holds."""

    options: dict[str, Any]
    states: list[State]
    """The state of every parameter, in the order of those that are there now."""
    steps: int
    taken: int
    begin: list[float]
    """These three are those of its ``Transition``."""


def checked(saved: object, rule: str, names: Sequence[str]) -> Saved:
    """What is in a ``LayerRates.state_dict`` for the parameters of these names.

    One that was saved before there were transitions has none under way.

    Raises:
        ValueError: see ``LayerRates.load_state_dict``.
    """
    if not isinstance(saved, Mapping) or not {"rule", "options", "names", "state"} <= saved.keys():
        raise ValueError(
            "a checkpoint of LayerRates must be a dict with 'rule', 'options', 'names' and 'state', got "
            f"{in_short(saved)}"
        )
    if saved["rule"] != rule:
        raise ValueError(
            f"the checkpoint is of the rule {in_short(saved['rule'])}, this LayerRates of {rule!r}: its "
            "numbers have another meaning"
        )
    options, theirs, states = saved["options"], saved["names"], saved["state"]
    if not isinstance(options, Mapping) or not options.keys() >= _OPTIONS.keys():
        raise ValueError(
            f"options of the checkpoint must be a dict of {', '.join(_OPTIONS)}, got {in_short(options)}"
        )
    check_ranges(options, _OPTIONS, "options of the checkpoint: ")
    check_ranges({"transition": None} | dict(options), TRANSITION, "options of the checkpoint: ")
    if (
        not isinstance(theirs, list | tuple)
        or not all(isinstance(name, str) for name in theirs)
        or not isinstance(states, list | tuple)
        or len(theirs) != len(states)
    ):
        raise ValueError("names and state of the checkpoint must be lists with an entry for every parameter")
    way = saved.get("transition", {"steps": 0, "taken": 0})
    if not isinstance(way, Mapping) or not way.keys() >= {"steps", "taken"}:
        raise ValueError(f"transition of the checkpoint must be steps and taken, got {in_short(way)}")
    check_ranges(way, {"steps": _COUNT, "taken": _COUNT}, "transition of the checkpoint: ")
    by_name = dict(zip(theirs, states, strict=True))
    if by_name.keys() != set(names):
        missing, unexpected = sorted(set(names) - by_name.keys()), sorted(by_name.keys() - set(names))
        if len(states) != len(names):
            raise ValueError(
                f"the checkpoint has rates of {len(states)} parameters, the optimizer has {len(names)}; "
                f"missing in the checkpoint: {listed(missing)}; unexpected: {listed(unexpected)}"
            )
        by_name = dict(zip(names, states, strict=True))
    found = [_state(by_name[name], name) for name in names]
    begin = [_begin(by_name[name], name) for name in names]
    return Saved(dict(options), found, way["steps"], way["taken"], begin)


def _state(state: object, name: str) -> State:
    where = f"{name} in the checkpoint: "
    if not isinstance(state, Mapping) or not state.keys() >= set(_NUMBERS):
        raise ValueError(f"{where}its state must be a dict of {', '.join(_NUMBERS)}, got {in_short(state)}")
    check_ranges(state, {kind: STATE_NUMBERS[kind][1] for kind in _NUMBERS}, where)
    return {kind: STATE_NUMBERS[kind][0](number(state[kind])) for kind in _NUMBERS}


def _begin(state: Mapping[str, Any], name: str) -> float:
    """The rate of a parameter before the last measurement."""
    begin = state.get("begin", state["rate"])
    check_ranges({"begin": begin}, {"begin": AT_LEAST_0}, f"{name} in the checkpoint: ")
    return number(begin)
