"""The options of a parameter group: their checks, and what the kernels make of them."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rmsgd.backends.base import RateGroup, StepGroup
from rmsgd.layers import SUPPORTED_DTYPES
from rmsgd.reference import RULES

INITIAL_RANKS = ("zero", "measure")

_OF_TORCH = {
    "fused": "its step is always fused",
    "foreach": "its step is always fused",
    "capturable": "its step can be captured as it is",
    "differentiable": "its step cannot be differentiated through",
}


def refuse(options: Mapping[str, object]) -> None:
    """Raise TypeError for keywords that are not RMSGD's, saying why for those of torch's SGD."""
    for name in options:
        reason = f": {_OF_TORCH[name]}" if name in _OF_TORCH else ""
        raise TypeError(f"RMSGD has no option {name!r}{reason}")


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option out of its range; the message names it and its value."""

    def fail(name: str, expected: str) -> None:
        raise ValueError(f"{name} must be {expected}, got {options[name]!r}")

    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr as a tensor: Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    if not 0.0 < float(lr) < math.inf:
        fail("lr", "above 0 (a scheduler may take it to 0 later)")
    if not 0.0 <= options["beta"] < 1.0:
        fail("beta", "in [0, 1)")
    if not 0.0 < options["gamma"] < math.inf:
        fail("gamma", "above 0")
    step_size = options["step_size"]
    if step_size is not None and not (isinstance(step_size, int) and step_size > 0):
        fail("step_size", "a positive whole number of epochs, or None")
    for name in ("momentum", "weight_decay", "min_lr"):
        if not 0.0 <= options[name] < math.inf:
            fail(name, "0 or more")
    if not math.isfinite(options["dampening"]):
        fail("dampening", "finite")
    if not 0.0 < options["zeta"] < math.inf:
        fail("zeta", "above 0")
    if options["nesterov"] and (options["momentum"] <= 0 or options["dampening"] != 0):
        raise ValueError(
            "nesterov needs a momentum above 0 and no dampening, got "
            f"momentum={options['momentum']!r}, dampening={options['dampening']!r}"
        )
    if options["rule"] not in RULES:
        fail("rule", f"one of {', '.join(RULES)}")
    if options["initial_rank"] not in INITIAL_RANKS:
        fail("initial_rank", f"one of {', '.join(INITIAL_RANKS)}")


def check_parameter(p: Tensor, name: str) -> None:
    """Raise TypeError for a parameter that is not a dense floating-point tensor of a known type."""
    if p.is_complex():
        raise TypeError(f"parameter {name} is complex ({p.dtype}); RMSGD needs real parameters")
    if p.dtype not in SUPPORTED_DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in SUPPORTED_DTYPES)
        raise TypeError(f"parameter {name} has dtype {p.dtype}; RMSGD knows {known}")
    if p.layout != torch.strided:
        raise TypeError(f"parameter {name} has layout {p.layout}; RMSGD needs dense parameters")


def parameter_name(group: Mapping[str, Any], g: int, index: int) -> str:
    """What a parameter is called: its name if the optimizer was given names, else "group.index"."""
    names = group.get("param_names")
    return str(names[index]) if names else f"{g}.{index}"


def multiplier(group: Mapping[str, Any]) -> float:
    """What the rates of a group are multiplied by: its lr over the lr it was created with."""
    return float(group["lr"]) / float(group["lr0"])


def step_group(group: Mapping[str, Any], device: torch.device) -> StepGroup:
    """A group's options as one step on a device needs them: a GPU's learning rate is not waited for."""
    lr = group["lr"]
    on_device = isinstance(lr, Tensor) and lr.is_cuda and device.type == "cuda"
    return StepGroup(
        lr.to(device, torch.float64) / float(group["lr0"]) if on_device else multiplier(group),
        float(group["momentum"]),
        float(group["dampening"]),
        float(group["weight_decay"]),
        bool(group["nesterov"]),
        bool(group["maximize"]),
        group["rule"] == "paper",
    )


def rate_group(group: Mapping[str, Any], epoch: int, decay: float) -> RateGroup:
    """A group's options as an epoch end needs them.

    ``epoch`` is the number of earlier epoch ends, ``decay`` the product of the gammas so far.
    """
    step_size = group["step_size"]
    decays = step_size is not None and epoch > 0 and epoch % step_size == 0
    floor = {"paper": group["min_lr"], "release": 0.0, "published": 1e-10}[group["rule"]]
    return RateGroup(
        group["lr0"],
        group["beta"],
        group["zeta"] * decay,
        group["gamma"] if decays else 1.0,
        floor,
        RULES.index(group["rule"]),
        epoch == 0,
    )
