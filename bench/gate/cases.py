"""What a process of the gate holds ready to be timed: the optimizer's cases and their controls."""

import importlib
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn import Parameter

import rmsgd
from bench import speed_epoch_end, speed_step
from bench.measure import seconds_per_call
from bench.models import build
from bench.weights import make_trained_like

SLOWER = "RMSGD_BENCH_SLOWER"
"""Environment variable, such as "step:0.1" or "step:0.1,epoch-end:0.1": lets those cases take that much more
time. It is there to test the gate."""

LONG_ENOUGH_S = 0.002
"""Shortest time of what is timed at once."""

Call = Callable[[], object]
STEP_NETWORK, MANY_TENSORS, EPOCH_END_NETWORK = "resnet18", "mobilenetv2", "mobilenetv2"


def standard() -> dict[str, Call]:
    """Steps and an epoch end of RMSGD, with fused SGD, a copy and torch's spectra as controls."""
    weights = torch.cat([p.detach().flatten() for p in build(STEP_NETWORK).parameters()])
    copy = torch.empty_like(weights)
    network = build(EPOCH_END_NETWORK)
    make_trained_like(network)
    cases: dict[str, Call] = {
        "step": speed_step.case("rmsgd", STEP_NETWORK),
        "sgd": speed_step.case("sgd-fused", STEP_NETWORK),
        "copy": lambda: copy.copy_(weights),
        "step-many-tensors": speed_step.case("rmsgd", MANY_TENSORS),
        "sgd-many-tensors": speed_step.case("sgd-fused", MANY_TENSORS),
        "epoch-end": speed_epoch_end.epoch_end(network),
        "gram": speed_epoch_end.gram_products(network),
        "eigenvalues": speed_epoch_end.gram_eigenvalues(network),
    }
    for name, share in slowed().items():
        cases[name] = slower(cases[name], share)
    return cases


def slowed() -> dict[str, float]:
    """Case to the share of its time that the environment asks it to take longer."""
    pairs = (part.split(":") for part in os.environ.get(SLOWER, "").split(",") if part)
    return {name: float(share) for name, share in pairs}


def slower(call: Call, share: float) -> Call:
    """`call`, and then for `share` of its time nothing but a busy processor."""

    def prolonged() -> None:
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        while time.perf_counter() < end + share * (end - start):
            pass

    return prolonged


SGD_OPTIONS = {"lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"}


def sgd(parameters: Iterable[Parameter], **settings: Any) -> torch.optim.SGD:
    """Fused SGD with those of RMSGD's settings that it knows."""
    known = {name: value for name, value in settings.items() if name in SGD_OPTIONS}
    return torch.optim.SGD(parameters, **known, fused=True)


def target(name: str) -> dict[str, Call]:
    """The caller's own step, and the same with SGD.

    Args:
        name: "module:function". The function takes what makes the optimizer, `rmsgd.RMSGD` or a
            function that is called in the same way and makes SGD, and returns a training step as a
            function without arguments.

    Raises:
        ValueError: there is no such function, or it returns none.

    """
    module, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--target {name!r}: expected module:function ({error})") from error
    cases = {"target": make(rmsgd.RMSGD), "target-sgd": make(sgd)}
    if not all(map(callable, cases.values())):
        raise ValueError(f"--target {name!r}: the function has to return a step to call, without arguments")
    return cases


class Bench:
    """The cases, warm, and how often each is called per timing."""

    def __init__(self, threads: int, target_name: str | None) -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self._cases = target(target_name) if target_name else standard()
        self._wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        self._calls = dict.fromkeys(self._cases, 1)
        for name in self._cases:
            self.time(name)
            self._calls[name] = max(1, round(LONG_ENOUGH_S / max(self.time(name), 1e-9)))

    def time(self, name: str) -> float:
        """Seconds of one call."""
        return seconds_per_call(self._cases[name], self._calls[name], self._wait)
