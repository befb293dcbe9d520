"""The cases that a process of the gate can time: those of the optimizer, and their controls."""

import gc
import importlib
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn import Parameter

import rmsgd
from bench import epoch_end
from bench.measure import seconds_per_call
from bench.models import build
from bench.weights import make_trained_like

SLOWER = "RMSGD_BENCH_SLOWER"
"""The environment variable that slows cases down to test the gate: "step:0.1,epoch-end:0.1" lets those two
take 10 % more time."""

LONG_ENOUGH_S = 0.006
"""The shortest time of one timing; a quick case is called several times."""

Call = Callable[[], object]
STEP_NETWORK, MANY_TENSORS, EPOCH_END_NETWORK = "resnet18", "mobilenetv2", "mobilenetv2"


def standard() -> dict[str, Call]:
    """Steps and an epoch end of RMSGD, and their controls by torch."""
    weights = torch.cat([p.detach().flatten() for p in build(STEP_NETWORK).parameters()])
    copy = torch.empty_like(weights)
    network = build(EPOCH_END_NETWORK)
    make_trained_like(network)
    step, sgd_step = steps(STEP_NETWORK)
    step_many, sgd_step_many = steps(MANY_TENSORS)
    cases: dict[str, Call] = {
        "step": step,
        "sgd": sgd_step,
        "copy": lambda: copy.copy_(weights),
        "step-many-tensors": step_many,
        "sgd-many-tensors": sgd_step_many,
        "epoch-end": epoch_end.epoch_end(network),
        "spectra": epoch_end.torch_spectra(network),
        "gram": epoch_end.gram_products(network),
    }
    for name, share in slowed().items():
        cases[name] = slower(cases[name], share)
    return cases


def steps(model: str) -> tuple[Call, Call]:
    """The step of RMSGD and that of fused SGD, on the same weights, gradients and momentum.

    The places of tensors in memory change a step's time by 2 to 4 % from process to process. With shared
    tensors they change both steps alike. The values are small, so that they stay finite.
    """
    network = build(model)
    for p in network.parameters():
        p.grad = 1e-6 * torch.randn_like(p)
    settings: dict[str, Any] = {"lr": 1e-6, "momentum": 0.9, "weight_decay": 1e-4}
    ours, theirs = (make(network.named_parameters(), **settings) for make in (rmsgd.RMSGD, sgd))
    for optimizer in (ours, theirs):
        optimizer.step()  # the first step makes the momentum
    for p in network.parameters():
        theirs.state[p]["momentum_buffer"] = ours.state[p]["velocity"]
    return ours.step, theirs.step


def slowed() -> dict[str, float]:
    """From a case to the share of its time by which the environment slows it down."""
    pairs = (part.split(":") for part in os.environ.get(SLOWER, "").split(",") if part)
    return {name: float(share) for name, share in pairs}


def slower(call: Call, share: float) -> Call:
    """A function that calls `call`, then keeps the processor busy for `share` of the time that it took."""

    def prolonged() -> None:
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        while time.perf_counter() < end + share * (end - start):
            pass

    return prolonged


SGD_OPTIONS = {"lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"}


def sgd(
    parameters: Iterable[Parameter] | Iterable[tuple[str, Parameter]], **settings: Any
) -> torch.optim.SGD:
    """Fused SGD, with those of RMSGD's settings that SGD has too."""
    known = {name: value for name, value in settings.items() if name in SGD_OPTIONS}
    return torch.optim.SGD(parameters, **known, fused=True)


def target(name: str) -> dict[str, Call]:
    """The caller's own step, and the same with SGD.

    Args:
        name: "module:function". The function takes a callable that makes the optimizer (`rmsgd.RMSGD`, or a
            function with the same arguments that makes SGD) and returns a training step, which is called
            without arguments.

    Raises:
        ValueError: there is no such function, or it does not return a step.

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
    """The cases after a warm-up, and how often each is called per timing."""

    def __init__(self, threads: int, target_name: str | None) -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        gc.disable()  # the collector would run inside a timed region
        self._cases = target(target_name) if target_name else standard()
        self._wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        self._calls = dict.fromkeys(self._cases, 1)
        for name in self._cases:
            self.time(name)
            self._calls[name] = max(1, round(LONG_ENOUGH_S / max(self.time(name), 1e-9)))

    def time(self, name: str) -> float:
        """Seconds of one call."""
        return seconds_per_call(self._cases[name], self._calls[name], self._wait)
