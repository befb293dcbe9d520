"""The checkpoint of LayerRates, and the checks of one that is loaded."""

from collections.abc import Mapping, Sequence
from typing import Any

from rmsgd.optim.load_state_dict import STATE_NUMBERS
from rmsgd.optim.options import INITIAL_RANK, OPTIONS, check_ranges, in_short, listed, number
from rmsgd.optim.state import State

_OPTIONS = {name: OPTIONS[name] for name in ("beta", "zeta", "linear")} | {"initial_rank": INITIAL_RANK}
_NUMBERS = ("rate", "stable_rank", "epoch", "decay", "ready")
"""The entries of a parameter's state that move its rate."""


def checked(saved: object, rule: str, names: Sequence[str]) -> tuple[dict[str, Any], list[State]]:
    """The options in a ``LayerRates.state_dict``, and the state of every parameter of these names.

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
    if (
        not isinstance(theirs, list | tuple)
        or not isinstance(states, list | tuple)
        or len(theirs) != len(states)
    ):
        raise ValueError("names and state of the checkpoint must be lists with an entry for every parameter")
    by_name = dict(zip(theirs, states, strict=True))
    if by_name.keys() != set(names):
        missing, unexpected = sorted(set(names) - by_name.keys()), sorted(by_name.keys() - set(names))
        if len(states) != len(names):
            raise ValueError(
                f"the checkpoint has rates of {len(states)} parameters, the optimizer has {len(names)}; "
                f"missing in the checkpoint: {listed(missing)}; unexpected: {listed(unexpected)}"
            )
        by_name = dict(zip(names, states, strict=True))
    return dict(options), [_state(by_name[name], name) for name in names]


def _state(state: object, name: str) -> State:
    where = f"{name} in the checkpoint: "
    if not isinstance(state, Mapping) or not state.keys() >= set(_NUMBERS):
        raise ValueError(f"{where}its state must be a dict of {', '.join(_NUMBERS)}, got {in_short(state)}")
    check_ranges(state, {kind: STATE_NUMBERS[kind][1] for kind in _NUMBERS}, where)
    return {kind: STATE_NUMBERS[kind][0](number(state[kind])) for kind in _NUMBERS}
