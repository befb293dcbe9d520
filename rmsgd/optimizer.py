"""RMSGD: SGD with momentum whose learning rate follows each layer's stable rank."""

import math
import warnings
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from rmsgd.backends.base import RateGroup, StepGroup
from rmsgd.layers import SUPPORTED_DTYPES
from rmsgd.ledger import Ledger, Member, buffer_key
from rmsgd.metrics import Report
from rmsgd.reference import RULES

INITIAL_RANKS = ("zero", "measure")


class RMSGD(Optimizer):
    """SGD with momentum and one learning rate per layer, moved at every epoch end (CVPR 2022).

    A mini-batch step is Algorithm 1 of Hosseini, Tuli, Plataniotis, "Exploiting Explainable Metrics
    for Augmented SGD": ``v <- momentum v - eta g``, ``w <- w + v``. An epoch end factorises every
    weight into low rank and noise (EVBMF), measures the stable rank s of the low-rank part, and
    sets ``eta <- max(beta eta + zeta (s(t+1) - s(t)), min_lr)``, with ``eta(0) = lr`` and ``s(0) = 0``.
    A parameter without a spectrum (a bias, a norm) follows a layer that has one.

    ::

        optimizer = rmsgd.RMSGD(model.named_parameters(), lr=0.03)
        for epoch in range(epochs):
            for x, y in batches:
                optimizer.zero_grad()
                loss(model(x), y).backward()
                optimizer.step()
            optimizer.epoch_step()

    ``group["lr"]`` stays the user's: the rate applied to a layer is ``eta lr / lr0``, with lr0 the lr
    that its group was created with. Warm-up and any ``torch.optim.lr_scheduler`` so act as a
    multiplier.

    Args:
        params: parameters, named parameters, or groups of either. A group may set any of the options
            below, and ``probe=False`` to leave its parameters unmeasured.
        lr: the first rate of every layer, above 0. May be a tensor of one element.
        beta: momentum of the learning rate, in [0, 1).
        step_size: with t earlier epoch ends, rates and zeta are multiplied by ``gamma`` first whenever
            t > 0 is a multiple of it. None: never.
        linear: whether 2-D weights are measured, besides convolutions.
        gamma: see ``step_size``; above 0.
        momentum: of the gradients, 0 or more. At 0 no velocity is kept and ``dampening`` is ignored.
        dampening: gradients enter the velocity times ``1 - dampening``, the first one whole.
        weight_decay: L2 penalty, 0 or more; ``p.grad`` is left as it is.
        nesterov: Nesterov momentum; needs ``momentum`` and no ``dampening``.
        zeta: gain of the stable rank's change, above 0.
        min_lr: floor of eta, before the multiplier. The rules of the released code have their own.
        maximize: ascend instead.
        rule: "paper" (Algorithm 1), "release" (the arithmetic of rmsgd 1.0.2) or "published" (that of
            the branch that made the paper's tables). The last two keep gradients as torch's SGD does.
        initial_rank: "zero" takes s(0) = 0, right for random weights. "measure" takes it from the
            weights before the first step: for pretrained ones, whose rates "zero" would throw up by
            s(1) in one epoch.
        process_group: for replicated parameters; every rank then calls ``epoch_step``.

    Raises:
        ValueError: an option is out of its range; the message names it and its value.
        TypeError: a parameter is not a floating-point tensor of a supported type.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.03,
        beta: float = 0.98,
        step_size: int | None = None,
        linear: bool = True,
        gamma: float = 1.0,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        zeta: float = 1.0,
        min_lr: float = 1e-10,
        maximize: bool = False,
        rule: str = "paper",
        initial_rank: str = "zero",
        process_group: Any = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta": beta,
            "step_size": step_size,
            "linear": linear,
            "gamma": gamma,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "zeta": zeta,
            "min_lr": min_lr,
            "maximize": maximize,
            "rule": rule,
            "initial_rank": initial_rank,
            "probe": True,
        }
        _check_options(defaults)
        self.process_group = process_group
        self._ledgers: list[Ledger] | None = None
        self._measured: list[Ledger] | None = None
        super().__init__(params, defaults)

    # -- parameters and state --------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its rates start at its lr. See ``torch.optim.Optimizer.add_param_group``."""
        _check_options({**self.defaults, **param_group})
        self._settle()
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for index, p in enumerate(group["params"]):
                _check_parameter(p, _name(group, len(self.param_groups) - 1, index))
        except TypeError:
            self.param_groups.pop()
            raise
        group.setdefault("lr0", float(group["lr"]))
        group.setdefault("epoch", 0)
        for p in group["params"]:
            self._adopt(p, group)

    def _adopt(self, p: Tensor, group: dict[str, Any]) -> None:
        """Complete the state of one parameter: present from the start, so that checkpoints fit."""
        state = self.state[p]
        key = buffer_key(group)
        if group["momentum"] != 0 and state.get(key) is None:
            state["fresh"] = True
            state[key] = torch.zeros_like(p, dtype=_buffer_dtype(p), memory_format=torch.preserve_format)
        state.setdefault("fresh", True)
        state.setdefault("rate", group["lr0"])
        state.setdefault("stable_rank", math.nan if group["initial_rank"] == "measure" else 0.0)
        state.setdefault("ready", False)

    def _settle(self) -> None:
        """Bring everything the ledgers hold to the state, and drop them."""
        if self._ledgers is not None:
            for ledger in self._ledgers:
                ledger.write_back()
        self._ledgers = None

    def _current_ledgers(self) -> list[Ledger]:
        if self._ledgers is None or not all(ledger.is_current() for ledger in self._ledgers):
            self._settle()
            self._ledgers = self._open_ledgers()
        return self._ledgers

    def _open_ledgers(self) -> list[Ledger]:
        by_device: dict[torch.device, list[Member]] = {}
        for g, group in enumerate(self.param_groups):
            for index, p in enumerate(group["params"]):
                self._adopt(p, group)
                self._follow(p, group)
                member = Member(p, g, _name(group, g, index), "param_names" in group)
                by_device.setdefault(p.device, []).append(member)
        return [Ledger(members, self.param_groups, self.state) for members in by_device.values()]

    def _follow(self, p: Tensor, group: dict[str, Any]) -> None:
        """Keep a parameter's memory on its device and in its layout, also after ``model.to``."""
        state, key = self.state[p], buffer_key(group)
        buffer = state.get(key)
        if buffer is None:
            return
        if buffer.shape != p.shape:
            raise RuntimeError(
                f"a parameter was resized to {tuple(p.shape)}, but its {key} has the shape "
                f"{tuple(buffer.shape)}: make a new optimizer for the new parameter"
            )
        dtype = _buffer_dtype(p)
        if buffer.is_meta and not p.is_meta:
            state[key] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        elif buffer.device != p.device or buffer.dtype != dtype or buffer.stride() != p.stride():
            moved = torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format)
            state[key] = moved.copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to go on: tensors and plain numbers only."""
        self._settle()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("process_group", None)
        self._ledgers = None
        self._measured = None

    # -- steps -----------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One mini-batch: move every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss, which is returned.

        Raises:
            RuntimeError: a gradient is sparse. Nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ledgers = self._current_ledgers()
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and float(found_inf) != 0.0:
            return loss
        scale = 1.0 if grad_scale is None else float(grad_scale)
        groups = [_step_group(group) for group in self.param_groups]
        for ledger in ledgers:
            ledger.measure_first()
            ledger.step(groups, scale)
        return loss

    @torch.no_grad()
    def epoch_step(self) -> None:
        """One epoch end: measure every layer and move its learning rate.

        A layer whose weight holds a NaN or an Inf keeps its rate; a warning names it.
        """
        ledgers = self._current_ledgers()
        if not all(ledger.probes_the_same() for ledger in ledgers):
            self._settle()
            ledgers = self._current_ledgers()
        groups = [_rate_group(group) for group in self.param_groups]
        for ledger in ledgers:
            ledger.measure_first()
            ledger.epoch_step(groups)
        for group, moved in zip(self.param_groups, groups, strict=True):
            group["epoch"] += 1
            group["zeta"] = moved.zeta * moved.decay
        self._measured = ledgers
        bad = [name for ledger in ledgers if ledger.device.type == "cpu" for name in ledger.not_finite()]
        if bad:
            warnings.warn(
                f"NaN or infinite weights in {', '.join(bad)}: not measured, the learning rate stays",
                stacklevel=3,
            )

    # -- what to look at -------------------------------------------------------------------------

    def learning_rates(self) -> dict[str, float]:
        """The rate now applied to every parameter, by its name (or "group.index"), in order."""
        rates: dict[Tensor, float] = {}
        for ledger in self._current_ledgers():
            rates.update(zip((m.parameter for m in ledger.members), ledger.rates(), strict=True))
        return {
            _name(group, g, index): rates[p] * (float(group["lr"]) / group["lr0"])
            for g, group in enumerate(self.param_groups)
            for index, p in enumerate(group["params"])
        }

    def report(self) -> Report:
        """The metrics that the last ``epoch_step`` measured; computes nothing.

        Raises:
            RuntimeError: there was no ``epoch_step`` yet.
        """
        if self._measured is None:
            raise RuntimeError("report() needs an epoch_step() first: nothing has been measured yet")
        layers = {}
        for ledger in self._measured:
            for i, layer in ledger.layers().items():
                layers[ledger.members[i].parameter] = layer
        order = [p for group in self.param_groups for p in group["params"]]
        return Report(tuple(layers[p] for p in order if p in layers))


def _name(group: dict[str, Any], g: int, index: int) -> str:
    names = group.get("param_names")
    return str(names[index]) if names else f"{g}.{index}"


def _buffer_dtype(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def _step_group(group: dict[str, Any]) -> StepGroup:
    return StepGroup(
        float(group["lr"]) / group["lr0"],
        float(group["momentum"]),
        float(group["dampening"]),
        float(group["weight_decay"]),
        group["nesterov"],
        group["maximize"],
        group["rule"] == "paper",
    )


def _rate_group(group: dict[str, Any]) -> RateGroup:
    epoch, step_size = group["epoch"], group["step_size"]
    decays = step_size is not None and epoch > 0 and epoch % step_size == 0
    floor = {"paper": group["min_lr"], "release": 0.0, "published": 1e-10}[group["rule"]]
    return RateGroup(
        group["lr0"],
        group["beta"],
        group["zeta"],
        group["gamma"] if decays else 1.0,
        floor,
        RULES.index(group["rule"]),
        epoch == 0,
    )


def _check_options(options: dict[str, Any]) -> None:
    def fail(name: str, expected: str) -> None:
        raise ValueError(f"{name} must be {expected}, got {options[name]!r}")

    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor of one element, got shape {tuple(lr.shape)}")
    number = float(lr)
    if not 0.0 < number < math.inf:
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


def _check_parameter(p: Tensor, name: str) -> None:
    if p.is_complex():
        raise TypeError(f"parameter {name} is complex ({p.dtype}); RMSGD needs real parameters")
    if p.dtype not in SUPPORTED_DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in SUPPORTED_DTYPES)
        raise TypeError(f"parameter {name} has dtype {p.dtype}; RMSGD knows {known}")
    if p.layout != torch.strided:
        raise TypeError(f"parameter {name} has layout {p.layout}; RMSGD needs dense parameters")
