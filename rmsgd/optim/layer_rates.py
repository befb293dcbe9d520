"""LayerRates: the learning rates of RMSGD for any optimizer."""

import difflib
import warnings
from collections import ChainMap
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from rmsgd.backends.streams import check_not_capturing
from rmsgd.inspection.report.report import Report
from rmsgd.optim.applied_lr import AppliedLr, check_lr
from rmsgd.optim.device_rates import is_probed
from rmsgd.optim.load_rates import TRANSITION, checked
from rmsgd.optim.optimizer import RMSGD
from rmsgd.optim.options import OPTIONS, check_ranges, device_of, fault, in_short, is_trained, listed
from rmsgd.optim.rates import Rates
from rmsgd.optim.ratio_rules import RatioRule, name_of
from rmsgd.optim.records import (
    ParamRecord,
    all_parameters,
    by_device,
    hold_the_same,
    parameter_names,
    records_of,
)
from rmsgd.optim.state import State, complete_rates
from rmsgd.optim.transition import Transition, between
from rmsgd.rules import DEFAULT, REFERENCE_LR, RULES
from rmsgd.tail_rules import TAIL_RULES
from rmsgd.tails import TailReport

NAMES: Mapping[str, str] = {"rank-momentum": DEFAULT} | {name: name for name in RULES}
"""What a rule of the stable rank may be called, and its name in ``rmsgd.rules``."""

_OPTIONS = {"beta": 0.98, "zeta": 1.0, "initial_rank": None}
"""The options of those rules and their defaults."""


class LayerRates:
    """Gives every layer of any optimizer a learning rate of its own, which follows its spectrum.

    While the optimizer steps, ``group["lr"]`` is multiplied by the ratio of the group's layer. It is restored
    when the step ends, even by an exception. So ``group["lr"]`` keeps the value that schedulers, checkpoints
    and the user give it.

    ```python
    groups = rmsgd.layer_groups(model.named_parameters(), weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, lr=3e-4, fused=True)
    rates = rmsgd.LayerRates(optimizer)
    for step, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
        if step % 100 == 99:
            rates.step()
    ```

    The rule "rank-momentum" is Algorithm 1 of Hosseini, Tuli, Plataniotis, "Exploiting Explainable Metrics
    for Augmented SGD" (CVPR 2022) in the form that is ``RMSGD``'s default, for the ratio r = eta / lr. With
    the stable rank s of the layer's low-rank part and its smaller side L it is

        r <- 1 + beta (r - 1) + zeta n^2 / (1 + n^2) (s(t+1) - s(t)) / 0.03,  n = 0.03 L

    kept within 1/2 and 2. Algorithm 1 adds zeta (s(t+1) - s(t)) to a rate, which is right for rates of the
    size of .03, the paper's. Here a gain counts for the same ratio at every lr.

    The rules "tempbalance" and "llr" map the tail exponents of the layers' spectra to ratios, from the
    heaviest tail to the lightest: see ``rmsgd.tail_rules``. They forget what was before, and have no ratios
    before the first ``step``: call it once before the training, as their authors do.

    With r the ratio before a measurement and r' the one that it has set, the k-th step of the optimizer after
    it takes r + (r' - r) min(k / n, 1), where n is ``transition``.

    Args:
        optimizer: any optimizer whose groups have an "lr". A group may hold one layer that is measured, and
            parameters that follow it, as ``layer_groups`` makes them. ``probe=False`` in a group leaves its
            parameters unmeasured. A second ``LayerRates`` of an optimizer takes the place of the first.
        rule: "rank-momentum"; "tempbalance" or "llr"; a rule of RMSGD by its name ("bounded" is rank-
            momentum, "paper" is Algorithm 1 to the letter, "release" and "published" are what the authors'
            code computes, for SGD); or a function of your own, from the ``Report`` of a measurement to a dict
            of ratios by the names of layers. A function with the attribute ``measures = "tails"`` is given a
            ``rmsgd.tails.TailReport``. Layers that it leaves out keep their rates.
        beta: momentum of the ratio, in [0, 1).
        zeta: gain of the stable rank's change, above 0.
        linear: whether 2-D weights are measured, besides convolutions.
        initial_rank: "measure" takes s(0) from the weights before the first step, "zero" takes 0. None leaves
            the choice to the rule: see ``RMSGD``.
        transition: the optimizer's steps in which the rates move linearly to new ones; 0 makes new rates hold
            at once. None leaves it to the rule: under "llr" it is half of the steps that lay between the last
            two measurements, and under all others 0.
        process_group: the ranks that hold copies of the parameters. They share the work, and all of them must
            call ``step``.

    Raises:
        TypeError: ``optimizer`` is not an optimizer, or is RMSGD, which moves its rates itself.
        ValueError: an option is out of its range or is none of the rule's, a group has no lr or shares it, as
            a tensor, with another group, or the parameters of a group would have different rates; the message
            names them.
    """

    def __init__(
        self,
        optimizer: Any,
        rule: str | RatioRule = "rank-momentum",
        *,
        beta: float = 0.98,
        zeta: float = 1.0,
        linear: bool = True,
        initial_rank: str | None = None,
        transition: int | None = None,
        process_group: Any = None,
    ) -> None:
        if isinstance(optimizer, RMSGD):
            raise TypeError("RMSGD moves its learning rates itself: call its epoch_step()")
        if not hasattr(optimizer, "param_groups") or not callable(getattr(optimizer, "step", None)):
            raise TypeError(
                f"LayerRates takes an optimizer with param_groups and step(), got {in_short(optimizer)}"
            )
        options = {"beta": beta, "zeta": zeta, "linear": linear, "initial_rank": initial_rank}
        check_ranges(options, {name: OPTIONS[name] for name in options})
        check_ranges({"transition": transition}, TRANSITION)
        check_lr(optimizer.param_groups)
        self.optimizer = optimizer
        self.rule = rule
        self.process_group = process_group
        self.state: dict[Tensor, State] = {}
        self._ratio_rule: RatioRule | None = None
        if isinstance(rule, str) and rule in NAMES:
            base = RULES[NAMES[rule]]
            self._rule = base.name
        else:
            given = [name for name, default in _OPTIONS.items() if options[name] != default]
            if given:
                whose = repr(rule) if isinstance(rule, str) else "a rule of your own"
                raise ValueError(
                    f"{given[0]} is an option of the rules of the stable rank, and not of {whose}"
                )
            base = RULES["paper"]  # has no bounds
            self._ratio_rule = _ratio_rule(rule)
            self._rule = name_of(self._ratio_rule)
        if initial_rank is None:
            options["initial_rank"] = base.initial_rank
        self._options: dict[str, Any] = options | {"transition": transition}
        self._fixed = {
            "rule": base.name,
            "lr0": REFERENCE_LR,
            "min_lr": 1e-10,
            "gamma": 1.0,
            "step_size": None,
        }
        self._rates = Rates()
        self._order: list[Tensor] = []
        self._kinds: list[object] = []
        self._transition = Transition()
        self._captured = False
        self._ratios: list[tuple[float, float]] | None = None
        self._build()
        self._applied = AppliedLr(optimizer, self)

    # -- parameters and state --------------------------------------------------------------------

    def _groups(self) -> list[Mapping[str, Any]]:
        """The optimizer's groups with the options that move their rates."""
        own = {**self._options, **self._fixed}
        return [ChainMap(own, group, {"probe": True}) for group in self.optimizer.param_groups]

    @torch.inference_mode(False)  # its tables outlive the mode of the first caller
    @torch.no_grad()
    def _build(self) -> None:
        """Make the tables for the current parameters. Where this raises, nothing has changed."""
        groups = self._groups()
        _check_distinct(groups)
        records = _layers_first(records_of(groups), groups)
        states = {p: dict(self.state.get(p, {})) for p in records}
        for p, record in records.items():
            complete_rates(p, states[p], groups[record.group])
        before = self._rates.devices
        try:
            self._rates.build(by_device(records), groups, states, self.process_group)
            _check_groups(groups, self._rates)
        except Exception:
            self._rates.devices = before
            raise
        self.state = states
        self._order = all_parameters(groups)
        self._kinds = _kinds(self._order)
        self._ratios = None

    def _rebuild(self) -> None:
        self._rates.write_back()
        self._build()

    def _refresh(self) -> None:
        """Make the tables anew if they are not those of the current parameters."""
        groups = self._groups()
        current = hold_the_same(groups, self._order) and self._kinds == _kinds(self._order)
        if not current or not self._rates.probe_the_same(groups):
            self._rebuild()

    def _group_ratios(self) -> list[tuple[float, float]]:
        """For every group the factor on its lr before the last measurement, and the one that that has set."""
        if not hold_the_same(self.optimizer.param_groups, self._order):
            self._rebuild()
        if self._ratios is None:
            self._refresh()  # the model may have moved since
            with torch.inference_mode(False), torch.no_grad():
                for device in self._rates.devices:
                    device.measure_first()
            rates, begin = self._rates.rates(), self._transition.begin
            leaders = [group["params"][:1] for group in self.optimizer.param_groups]
            self._ratios = [
                (begin.get(p[0], rates[p[0]]) / REFERENCE_LR, rates[p[0]] / REFERENCE_LR) if p else (1.0, 1.0)
                for p in leaders
            ]
        return self._ratios

    def _next_ratios(self) -> list[float]:
        ratios, share = self._group_ratios(), self._transition.share(self._transition.taken + 1)
        return [between(before, after, share) for before, after in ratios]

    def _begin_step(self, captured: bool) -> list[float]:
        ratios = self._next_ratios()
        if captured and self._transition.moves:
            raise RuntimeError(
                "rates are on their way to new ones, which a CUDA graph cannot follow: use transition=0, or "
                "capture the step before a measurement. Nothing has changed"
            )
        self._captured |= captured
        self._transition.taken += 1
        return ratios

    def _steps_of_transition(self) -> int:
        """The n of a measurement now. Replays of a graph do not count, so that rates would never get on."""
        given = self._options["transition"]
        if self._captured:
            return 0
        if given is not None:
            return int(given)
        return self._transition.taken // 2 if getattr(self._ratio_rule, "gradual", False) else 0

    def state_dict(self) -> dict[str, Any]:
        """Return all that the rates need to go on, beside the optimizer's own: plain numbers and strings.

        It is ``{"rule", "options", "names", "state", "transition"}``, where "names" and "state" have an entry
        for every parameter.
        """
        self._refresh()
        self._rates.write_back()
        begin = {**self._rates.rates(), **self._transition.begin}
        return {
            "rule": self._rule,
            "options": dict(self._options),
            "names": [name for names in parameter_names(self._groups()) for name in names],
            "state": [self.state[p] | {"begin": begin[p]} for p in self._order],
            "transition": {"steps": self._transition.steps, "taken": self._transition.taken},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``, whose options replace those given here.

        Parameters are found by their names, or by their order where no names are the same.

        Raises:
            ValueError: ``state_dict`` was not made by LayerRates, is of another rule or of other parameters,
                or holds a value that no LayerRates writes. The message names the difference, and nothing has
                been changed.
        """
        self._refresh()
        names = [name for own in parameter_names(self._groups()) for name in own]
        saved = checked(state_dict, self._rule, names)
        kept = self._options, self.state
        self._options = self._options | saved.options
        self.state = dict(zip(self._order, saved.states, strict=True))
        try:
            self._build()
        except Exception:
            self._options, self.state = kept
            raise
        steps = 0 if self._captured else saved.steps
        begin = dict(zip(self._order, saved.begin, strict=True)) if steps else {}
        self._transition = Transition(steps, saved.taken, begin)
        self._applied.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "rule": self.rule, "saved": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The copy of an optimizer is plain: its step and its hooks do not refer to rates.
        self.__init__(state["optimizer"], state["rule"], process_group=state.get("process_group"))  # type: ignore[misc]
        self.load_state_dict(state["saved"])

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerRates":
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        copy.__setstate__({**deepcopy(self.__getstate__(), memo), "process_group": self.process_group})
        return copy

    # -- what to call ----------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> None:
        """Measure every layer and move its rate. Call it at epoch ends, or after a fixed number of steps.

        A layer whose weight holds a NaN or an Inf keeps its rate, and a warning names it. On a GPU the
        measurement runs beside later work, and the next step of the optimizer waits for it.

        Raises:
            RuntimeError: the ranks of a process group or a mesh do not hold the same layers, a parameter has
                no values, or a CUDA graph is being captured. Nothing has changed then.
            ValueError: the parameters of a group would have different rates, as after a change of the groups,
                or a rule of your own gave what is no ratio. No rate has changed then.
            TypeError: a rule of your own returned no dict.
        """
        check_not_capturing(
            filter(is_trained, all_parameters(self.optimizer.param_groups)), "LayerRates.step()"
        )
        self._refresh()
        now, steps = self._transition, self._steps_of_transition()
        begin = now.at(now.taken, self._rates.rates()) if steps else {}
        messages = self._rates.epoch_step(self._groups(), self.state, self._ratio_rule)
        self._transition = Transition(steps, begin=begin)
        self._ratios = None
        self._applied.refresh()
        for message in messages:
            warnings.warn(message, stacklevel=3)

    def learning_rates(self) -> dict[str, float]:
        """Return the rate of every parameter in the optimizer's next step, a float, by its name, in order.

        See ``RMSGD.learning_rates``.
        """
        self._refresh()
        groups = self._groups()
        for message in self._rates.large(groups) if self._ratio_rule is None else ():
            warnings.warn(message, stacklevel=2)
        self._rates.write_back()
        now = self._transition
        return self._rates.by_name(groups, now.at(now.taken + 1, self._rates.rates()) if now.moves else None)

    def report(self) -> Report | TailReport:
        """What the last ``step`` measured, a ``TailReport`` under a rule of tail exponents.

        It computes nothing. Every number in it is without a unit, but the noise variance: the square of the
        weights' unit.

        Raises:
            RuntimeError: there was no ``step`` yet.
        """
        if not self._rates.measured:
            raise RuntimeError("report() needs a step() of LayerRates first: nothing has been measured yet")
        report: Report | TailReport = self._rates.report()
        return report


def _ratio_rule(rule: object) -> RatioRule:
    """A rule that is a function, by itself or by its name."""
    if isinstance(rule, str) and rule in TAIL_RULES:
        return TAIL_RULES[rule]
    if callable(rule):
        return rule
    names = [*NAMES, *TAIL_RULES]
    nearest = difflib.get_close_matches(str(rule), names, 1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"rule must be a function or one of {', '.join(names)}, got {in_short(rule)}{hint}")


def _kinds(parameters: Sequence[Tensor]) -> list[object]:
    """What decides whether and how the parameters are measured. Frozen ones may be tensors of any kind."""
    with torch._C.DisableTorchFunctionSubclass():
        return [(device_of(p), p.shape, p.dtype) if is_trained(p) else None for p in parameters]


def _layers_first(
    records: Mapping[Tensor, ParamRecord], groups: Sequence[Mapping[str, Any]]
) -> dict[Tensor, ParamRecord]:
    """The records, where in every group the measured layer comes before the parameters that follow it."""

    def rank(record: ParamRecord) -> tuple[int, bool]:
        p, group = record.parameter, groups[record.group]
        return record.group, not (is_trained(p) and fault(p) is None and is_probed(p, group))

    return {record.parameter: record for record in sorted(records.values(), key=rank)}


def _check_distinct(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError for a parameter that is in several groups and would have several rates."""
    owner: dict[Tensor, int] = {}
    for g, (group, names) in enumerate(zip(groups, parameter_names(groups), strict=True)):
        for p, name in zip(group["params"], names, strict=True):
            if owner.setdefault(p, g) != g:
                raise ValueError(f"{name} is in the groups {owner[p]} and {g}: a parameter has one rate")


def _check_groups(groups: Sequence[Mapping[str, Any]], rates: Rates) -> None:
    """Raise ValueError for a group whose parameters follow different layers."""
    leaders = {p: leader for device in rates.devices for p, leader in device.leaders().items()}
    names = parameter_names(groups)
    name_of = {
        p: name
        for group, own in zip(groups, names, strict=True)
        for p, name in zip(group["params"], own, strict=True)
    }
    for g, group in enumerate(groups):
        followed = list(dict.fromkeys(leaders[p] for p in group["params"]))
        if len(followed) > 1:
            layers = [name_of[p] if p is not None else "the mean of all" for p in followed]
            raise ValueError(
                f"group {g} has one lr, and its parameters follow {len(layers)} layers ({listed(layers)}): "
                "make the groups with rmsgd.layer_groups(model.named_parameters()), which also splits groups"
            )
