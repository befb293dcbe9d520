"""The options of a parameter group: their checks, and their form for the kernels."""

import difflib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from rmsgd import rules
from rmsgd.backends.base import RateGroup, StepGroup
from rmsgd.element_types import ELEMENT_TYPES, known_element_types
from rmsgd.optim.layouts import bytes_spanned, has_memory
from rmsgd.rules import RULES

INITIAL_RANKS = ("zero", "measure")

_IF_TRUE = {
    "foreach": "leave it out, RMSGD always steps all parameters at once",
    "fused": "leave it out, RMSGD's step is always fused",
    "capturable": "leave it out, RMSGD's step can be captured in a CUDA graph as it is",
    "differentiable": "RMSGD's step cannot be differentiated through, that of torch.optim.SGD can",
}
"""The switches of torch's optimizers, and advice where one is on. Off, or None, they have no effect."""


def check_keywords(options: Mapping[str, object]) -> None:
    """Raise TypeError for keywords that RMSGD does not have, with what to do instead.

    Switches of torch's optimizers that are off are accepted, since code that is driven by a configuration
    passes them to every optimizer.
    """
    for name, value in options.items():
        if name not in _IF_TRUE:
            raise TypeError(f"RMSGD has no option {name!r}{_instead(name)}")
        if value is not None and number(value) != 0.0:
            raise TypeError(f"{name}={in_short(value)}: {_IF_TRUE[name]}")


def _instead(name: str) -> str:
    if name == "probe":
        return ': it is one of parameter groups, {"params": ..., "probe": False}'
    known = [*OPTIONS.keys() - {"probe"}, "process_group", *_IF_TRUE]
    nearest = difflib.get_close_matches(name, known, 1)
    return f": did you mean {nearest[0]!r}?" if nearest else f"; it has {', '.join(sorted(known))}"


Range = tuple[Callable[[Any], bool], str]
"""The condition on a value, and its text for a message."""


def number(value: object) -> float:
    """A number, or a tensor of one element, as a float; NaN for anything else."""
    if not isinstance(value, Real | np.bool_ | Tensor):
        return math.nan
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (ValueError, OverflowError, RuntimeError):  # several elements, or one that a float cannot hold
        return math.nan


ABOVE_0: Range = (lambda x: 0.0 < number(x) < math.inf, "above 0")
AT_LEAST_0: Range = (lambda x: 0.0 <= number(x) < math.inf, "0 or more")
FINITE: Range = (lambda x: math.isfinite(number(x)), "finite")
YES_OR_NO: Range = (lambda x: number(x) in (0.0, 1.0), "True or False")


def _one_of(names: Collection[str]) -> Range:
    return lambda x: isinstance(x, str) and x in names, f"one of {', '.join(names)}"


INITIAL_RANK = _one_of(INITIAL_RANKS)

OPTIONS: Mapping[str, Range] = {
    "lr": AT_LEAST_0,
    "beta": (lambda x: 0.0 <= number(x) < 1.0, "in [0, 1)"),
    "gamma": ABOVE_0,
    "step_size": (
        lambda x: x is None or (isinstance(x, int | np.integer) and number(x) > 0),
        "a positive whole number of epochs, or None",
    ),
    "momentum": AT_LEAST_0,
    "weight_decay": AT_LEAST_0,
    "min_lr": AT_LEAST_0,
    "dampening": FINITE,
    "zeta": ABOVE_0,
    "rule": _one_of(RULES),
    "initial_rank": (lambda x: x is None or INITIAL_RANK[0](x), INITIAL_RANK[1]),
    "linear": YES_OR_NO,
    "nesterov": YES_OR_NO,
    "maximize": YES_OR_NO,
    "probe": YES_OR_NO,
}
"""The range of every option."""


OF_STEP: Mapping[str, Range] = {
    name: FINITE for name in ("lr", "lr0", "momentum", "dampening", "weight_decay")
} | {name: OPTIONS[name] for name in ("nesterov", "maximize", "rule")}
"""What a step needs of a group. As in torch, a schedule may go beyond the ranges of ``OPTIONS``."""

OF_EPOCH_END: Mapping[str, Range] = {
    name: OPTIONS[name]
    for name in ("beta", "zeta", "gamma", "step_size", "min_lr", "rule", "linear", "probe", "initial_rank")
} | {"lr0": AT_LEAST_0}
"""What an epoch end needs of the options of a group: not its lr, which may lie on a GPU."""


def check_ranges(values: Mapping[str, Any], ranges: Mapping[str, Range], where: str = "") -> None:
    """Raise ValueError for a value that lacks or is out of range; the message is ``where`` and its name."""
    for name, (holds, expected) in ranges.items():
        if name not in values:
            raise ValueError(f"{where}{name} is missing; it must be {expected}")
        if not holds(values[name]):
            raise ValueError(f"{where}{name} must be {expected}, got {in_short(values[name])}")


def in_short(value: object) -> str:
    """A value as a message shows it, in one line of bounded length."""
    if isinstance(value, Tensor) and value.numel() != 1:
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        value = list(value)
        text = f"a dict of {', '.join(map(repr, value[:5]))}" if value else "an empty dict"
    else:
        text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def listed(items: Sequence[str]) -> str:
    """The first five of these in a message, and how many more there are."""
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return (", ".join(items[:5]) or "none") + more


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option out of its range; the message names it and its value."""
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr as a tensor: Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    check_ranges(options, OPTIONS)
    if options["nesterov"] and (options["momentum"] <= 0 or options["dampening"] != 0):
        raise ValueError(
            "nesterov needs a momentum above 0 and no dampening, got "
            f"momentum={options['momentum']!r}, dampening={options['dampening']!r}"
        )


def is_trained(p: Tensor) -> bool:
    """Whether a step may move the parameter, because it requires gradients or has one.

    A frozen parameter may be a tensor of any kind, so nothing else but its device is read from it.
    """
    with torch._C.DisableTorchFunctionSubclass():
        return p.requires_grad or p.grad is not None


def device_of(p: Tensor) -> torch.device:
    """The device that a parameter of any kind reports."""
    with torch._C.DisableTorchFunctionSubclass():
        return p.device


def have_gradients(frozen: Sequence[Tensor]) -> bool:
    """Whether a frozen parameter has been given a gradient; every step checks it."""
    with torch._C.DisableTorchFunctionSubclass():
        return any(p.grad is not None for p in frozen)


def fault(p: Tensor) -> str | None:
    """Why a parameter cannot be trained, as the end of a sentence about it; None where it can."""
    if is_lazy(p):
        return (
            "has no shape yet, as its module is a lazy one: call the model once on an input, and make the "
            "optimizer then"
        )
    if p.is_nested:
        return "is a nested tensor; RMSGD needs plain ones, such as one parameter for each part"
    if p.is_complex():
        return f"is complex ({p.dtype}); RMSGD needs real parameters, such as torch.view_as_real gives"
    if p.dtype not in ELEMENT_TYPES:
        return f"has dtype {p.dtype}; RMSGD knows {known_element_types()}"
    if p.layout != torch.strided:
        return f"has layout {p.layout}; RMSGD needs dense parameters"
    if not has_memory(p):
        if type(p) in (Tensor, torch.nn.Parameter):
            return "has no memory: its storage was freed, as by untyped_storage().resize_(0)"
        return (
            f"is of type {type(p).__name__}, which has no memory that a step could write to: freeze it by "
            "requires_grad_(False) and train plain parameters beside it, as LoRA does"
        )
    if p.nbytes > bytes_spanned(p):
        return "has elements that share memory, as after expand(); use clone()"
    if p.is_neg():
        return "is the negative of other memory; use resolve_neg()"
    return None


def check_parameter(p: Tensor, name: str) -> None:
    """Raise TypeError for a parameter that is trained and cannot be; the message names it.

    It has to be a dense floating-point tensor of a known type, whose elements share no memory with each other
    and are not the negative of what their memory holds.
    """
    why = fault(p) if is_trained(p) else None
    if why is not None:
        raise TypeError(f"parameter {name} {why}")


def stands_still(group: Mapping[str, Any]) -> bool:
    """Whether a group was created with lr = 0 and has not had an lr above 0 yet.

    Such a group has no lr0 at which its rates could begin, so it is not measured and its epochs do not count.
    """
    return number(group.get("lr0")) == 0.0


def first_lr(group: Mapping[str, Any]) -> float:
    """The lr0 of a group that has stood still: ``initial_lr`` if that is above 0, else its current lr.

    Raises:
        RuntimeError: its lr is on a GPU and a CUDA graph is being captured, in which it would never begin.
    """
    lr, initial_lr = group["lr"], number(group.get("initial_lr", 0.0))
    if 0.0 < initial_lr < math.inf:
        return initial_lr
    if isinstance(lr, Tensor) and lr.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a group with lr = 0 stands still, and would do so in every replay of this CUDA graph: give it "
            "an lr above 0, or an initial_lr, before the capture"
        )
    return number(lr)


def multiplier(group: Mapping[str, Any]) -> float:
    """The factor on the rates of a group: its lr over lr0, the lr that it was created with."""
    return 0.0 if stands_still(group) else float(group["lr"]) / float(group["lr0"])


def step_groups(groups: Sequence[Mapping[str, Any]], device: torch.device) -> list[StepGroup]:
    """The groups' options in the form of a step on a device, without a wait for a learning rate on a GPU.

    Raises:
        ValueError: code or a schedule has set an option to what is no number, or has deleted it. The message
            names the group and the option.
    """
    try:
        made = [_step_group(group, device) for group in groups]
        if all(map(_is_finite, made)):
            return made
    except (LookupError, TypeError, ValueError, OverflowError, RuntimeError):
        check_groups(groups, OF_STEP)
        raise
    check_groups(groups, OF_STEP)
    return made


def check_groups(groups: Sequence[Mapping[str, Any]], ranges: Mapping[str, Range]) -> None:
    """Raise ValueError for an option out of its range that a group has been given since it was added."""
    for g, group in enumerate(groups):
        check_ranges(group, ranges, f"group {g}: ")


def _is_finite(group: StepGroup) -> bool:
    multiplier = 1.0 if isinstance(group.multiplier, Tensor) else group.multiplier
    return math.isfinite(multiplier + group.momentum + group.dampening + group.weight_decay)


def _step_group(group: Mapping[str, Any], device: torch.device) -> StepGroup:
    lr = group["lr"]
    on_device = isinstance(lr, Tensor) and lr.is_cuda and device.type == "cuda" and not stands_still(group)
    return StepGroup(
        lr.to(device, torch.float64) / float(group["lr0"]) if on_device else multiplier(group),
        float(group["momentum"]),
        float(group["dampening"]),
        float(group["weight_decay"]),
        bool(group["nesterov"]),
        bool(group["maximize"]),
        RULES[group["rule"]].buffer == "velocity",
    )


def floor(group: Mapping[str, Any]) -> float:
    """The smallest eta of a group's rule, a rate before the group's multiplier."""
    of_rule = RULES[group["rule"]].floor
    return float(group["min_lr"]) if of_rule is None else of_rule


def bounds(group: Mapping[str, Any], decay: float) -> tuple[float, float]:
    """The smallest and the largest rate that is applied to a group's parameters, before its multiplier.

    ``decay`` is the product of the gammas so far, which shrink the bounds as they shrink the rates.
    """
    rule, lr0 = RULES[group["rule"]], float(group["lr0"]) * decay
    lowest = max(rule.lowest * lr0, float(group["min_lr"])) if rule.lowest else 0.0
    return lowest, max(rule.highest * lr0, lowest)


def applied_rate(group: Mapping[str, Any], rate: float, decay: float) -> float:
    """The rate before the group's multiplier when its rule has come to ``rate``; see ``bounds``."""
    return rules.applied_rate(rate, *bounds(group, decay))


def decayed(decay: float, gamma: float) -> float:
    """The product of the gammas so far and one more.

    It is kept above 0 where it underflows, since rules divide by it, and 0 times an infinite bound is NaN.
    """
    return max(decay * gamma, 1e-300)


def rate_group(group: Mapping[str, Any], epoch: int, decay: float) -> RateGroup:
    """A group's options in the form of an epoch end.

    ``epoch`` is the number of earlier epoch ends, and ``decay`` is the product of the gammas so far.
    """
    step_size = group["step_size"]
    decays = step_size is not None and epoch > 0 and epoch % step_size == 0
    now, rule = float(group["gamma"]) if decays else 1.0, RULES[group["rule"]]
    return RateGroup(
        group["lr0"],
        group["beta"],
        group["zeta"] * decay,
        now,
        floor(group),
        rule.anchor * group["lr0"] * decay * now,
        *bounds(group, decayed(decay, now)),
        rule.column,
        rule.holds,
        rule.number,
        epoch == 0,
    )
