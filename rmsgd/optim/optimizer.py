"""RMSGD: SGD with momentum whose learning rate follows each layer's stable rank."""

import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from operator import is_
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from rmsgd.backends.streams import check_not_capturing
from rmsgd.inspection.report.report import Report
from rmsgd.optim.device_step import DeviceStep
from rmsgd.optim.load_state_dict import check_and_complete, check_form, unwrapped_state
from rmsgd.optim.options import (
    AT_LEAST_0,
    OF_EPOCH_END,
    check_groups,
    check_keywords,
    check_options,
    check_parameter,
    check_ranges,
    device_of,
    first_lr,
    is_trained,
    number,
    stands_still,
    step_groups,
)
from rmsgd.optim.rates import Rates
from rmsgd.optim.records import all_parameters, by_device, hold_the_same, parameter_name, records_of
from rmsgd.optim.state import State, check_shape, complete, follow
from rmsgd.optim.torch_compile import register_step, trace_step
from rmsgd.rules import DEFAULT, RULES


class RMSGD(Optimizer):
    """SGD with momentum and one learning rate per layer, moved at every epoch end (CVPR 2022).

    A mini-batch step is Algorithm 1 of Hosseini, Tuli, Plataniotis, "Exploiting Explainable Metrics
    for Augmented SGD": ``v <- momentum v - eta g``, ``w <- w + v``. An epoch end factorises every
    weight into low rank and noise (EVBMF) and measures the stable rank s of the low-rank part. With
    ``eta(0) = lr``, Algorithm 1 (``rule="paper"``) then moves the rate of the layer by

        eta <- max(beta eta + zeta (s(t+1) - s(t)), min_lr)

    Algorithm 1 to the letter has two weaknesses. The stable rank of L rows moves in steps of 1/L, which takes
    a classifier's head of ten rows from .03 to .58 and loses the network. And beta takes a rate without gains
    to 0. The default rule, "bounded", works around lr instead of 0, with gains that count for less where s is
    coarse:

        eta <- lr + beta (eta - lr) + zeta n^2 / (1 + n^2) (s(t+1) - s(t)),  n = L lr

    So one kept direction moves a rate by at most lr / 2. The rate that is applied is eta, kept between lr / 2
    and 2 lr, and the rule goes on from eta itself. A parameter without a spectrum (a bias, a norm) follows a
    layer that has one.

    ```python
    optimizer = rmsgd.RMSGD(model.named_parameters(), lr=0.03)
    for epoch in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
        optimizer.epoch_step()
    ```

    ``group["lr"]`` belongs to the user: the rate applied to a layer is ``eta lr / lr0``, where lr0 is the lr
    that its group was created with. So warm-up and any ``torch.optim.lr_scheduler`` multiply the rates of all
    layers. A group that is created with lr = 0, for example a frozen stage in fine-tuning, stands still and
    is not measured. Once its lr is raised it begins as a new group does, and lr0 is the first lr above 0, or
    its ``initial_lr`` if that is above 0.

    Args:
        params: parameters, named parameters, or groups of either. A trained parameter is a dense tensor of
            any shape, of float16, bfloat16, float32 or float64, on a CPU or a GPU. A group may set any of the
            options below, and ``probe=False`` to leave its parameters unmeasured.
        lr: the first rate of every layer, 0 or more; it may be a tensor of one element.
        beta: momentum of the learning rate, in [0, 1).
        step_size: with t earlier epoch ends, an epoch end first multiplies rates and zeta by ``gamma`` if t
            is positive and a multiple of it; None for never.
        linear: whether 2-D weights are measured, besides convolutions.
        gamma: see ``step_size``; above 0.
        momentum: momentum of the gradients, 0 or more. At 0 no velocity is kept and ``dampening`` is ignored.
        dampening: gradients enter the velocity times ``1 - dampening``; the first one enters whole.
        weight_decay: L2 penalty, 0 or more; ``p.grad`` is left as it is.
        nesterov: whether to use Nesterov momentum, which needs a ``momentum`` above 0 and no ``dampening``.
        zeta: gain of the stable rank's change, above 0.
        min_lr: smallest rate, before the multiplier. Above lr it is the rate that layers are lifted to, under
            "bounded" from the first step on. The rules of the released code have a floor of their own.
        maximize: whether to ascend instead of descend.
        rule: "bounded" (the default: Algorithm 1 around lr, within bounds), "paper"
            (Algorithm 1 to the letter), "release" (the arithmetic of rmsgd 1.0.2) or "published" (that of the
            branch that made the paper's tables). The last two keep gradients as torch's SGD does.
        initial_rank: "measure" takes s(0) from the weights before the first step. That is 0 for random ones,
            in which no low rank is found, and the right value for pretrained ones. "zero" takes s(0) = 0,
            which raises the rates of pretrained weights by s(1) in one epoch. None is "measure" for the rule
            "bounded" and "zero", as in their sources, for the others.
        process_group: the ranks that hold copies of the parameters, which share the measurement. All of them
            must call ``epoch_step``, and under ``initial_rank="measure"`` the first ``step``.
        switches: torch's ``foreach``, ``fused``, ``capturable`` and ``differentiable``, each None or False.

    Raises:
        ValueError: an option is out of its range; the message names it and its value.
        TypeError: a parameter that is to be trained is not a dense floating-point tensor of a supported type,
            an option is not one of RMSGD's, or one of ``switches`` is on. A frozen parameter may be a tensor
            of any kind.
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
        rule: str = DEFAULT,
        initial_rank: str | None = None,
        process_group: Any = None,
        **switches: bool | None,
    ) -> None:
        check_keywords(switches)
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
        check_options(defaults)
        self.process_group = process_group
        self._number = register_step(self._step_compiled)
        self._order: list[Tensor] = []
        self._forget_tables()
        super().__init__(params, defaults)

    # -- parameters and state --------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, whose rates start at its lr. See ``torch.optim.Optimizer.add_param_group``.

        Raises:
            ValueError: an option is out of its range, or a parameter is in another group already.
            TypeError: a parameter that is to be trained has a type that cannot be trained; see ``RMSGD``.
        """
        super().add_param_group(param_group)
        try:
            self._begin_group(len(self.param_groups) - 1)
        except Exception:
            self.param_groups.pop()
            raise
        for p in self.param_groups[-1]["params"]:
            complete(p, self.state[p], self.param_groups[-1])
        self._forget_departed()
        self._order = all_parameters(self.param_groups)

    def _begin_group(self, number_of_group: int) -> None:
        """Check a new group's options and parameters, and note the lr that its rates begin with."""
        group = self.param_groups[number_of_group]
        check_options(group)
        check_ranges(group, {"lr0": AT_LEAST_0} if "lr0" in group else {})
        for index, p in enumerate(group["params"]):
            check_parameter(p, parameter_name(group, number_of_group, index))
        if group["initial_rank"] is None:
            group["initial_rank"] = RULES[group["rule"]].initial_rank
        group.setdefault("lr0", number(group["lr"]) or first_lr(group))

    def _begin_groups_of_others(self) -> None:
        """Begin the groups that did not come by ``add_param_group``.

        A wrapper that shares its ``param_groups`` with the optimizer inside, as Lookahead and SAM do, adds
        groups to them by itself.
        """
        for index, group in enumerate(self.param_groups):
            if "lr0" not in group:
                group.update({name: value for name, value in self.defaults.items() if name not in group})
                self._begin_group(index)

    def _holds_its_parameters(self) -> bool:
        return hold_the_same(self.param_groups, self._order)

    def _forget_tables(self) -> None:
        self._rates = Rates()
        self._steps: list[DeviceStep] | None = None
        self._memory_needs_then: list[tuple[int, bool, str]] = []
        self._state_objects: list[Any] = []
        self._own_states: list[State] = []

    def _tables_are_current(self) -> bool:
        """Whether groups, state, parameters and memory are those that rates and steps were made from."""
        return (
            self._steps is not None
            and self._memory_needs_then == _memory_needs(self.param_groups)
            and self._holds_its_parameters()
            and self._holds_its_states()
            and all(step.is_current() for step in self._steps)
        )

    def _holds_its_states(self) -> bool:
        """Whether each parameter's state is the dict that rates and steps were made from."""
        now = list(self.state.values())
        if len(now) == len(self._state_objects) and all(map(is_, now, self._state_objects)):
            return True
        # Others may keep entries of their own beside the parameters', and put new ones in at every step.
        self._state_objects = now
        return all(self.state.get(p) is state for p, state in zip(self._order, self._own_states, strict=True))

    def _forget_departed(self) -> None:
        """Drop the state of parameters that have left the groups. Entries that others keep there stay."""
        for p in set(self._order).difference(all_parameters(self.param_groups)):
            self.state.pop(p, None)

    def _start_raised_groups(self) -> None:
        """Start the groups that stood still at lr = 0 and now have an lr above 0."""
        for group in filter(stands_still, self.param_groups):
            lr0 = first_lr(group)
            if lr0 > 0.0:
                self._write_back()
                self._steps = None
                group["lr0"] = lr0
                for p in group["params"]:
                    self.state[p]["rate"] = lr0

    def _current_steps(self) -> list[DeviceStep]:
        self._begin_groups_of_others()
        self._start_raised_groups()
        if not self._tables_are_current():
            self._write_back()
            self._build()
        assert self._steps is not None
        return self._steps

    def _write_back(self) -> None:
        """Write the numbers to the state; waits for a GPU."""
        if self._steps is None:  # there are no tables, or they are out of date
            return
        self._rates.write_back()
        for step in self._steps:
            step.write_back()

    @torch.inference_mode(False)  # its tables outlive the mode of the first caller
    @torch.no_grad()  # which leaving that mode would switch off
    def _build(self) -> None:
        check_groups(self.param_groups, OF_EPOCH_END)
        records = records_of(self.param_groups)
        for p, record in records.items():
            if is_trained(p):
                check_parameter(p, record.name)
                check_shape(p, self.state[p], record.name)
        self._forget_departed()
        for p, record in records.items():
            group = self.param_groups[record.group]
            complete(p, self.state[p], group)
            if is_trained(p):
                follow(p, self.state[p], group)
        on_devices = by_device(records)
        self._steps = None  # a capture would keep what fills these tables: none of them are used then
        self._rates.build(on_devices, self.param_groups, self.state, self.process_group)
        for rates in self._rates.devices:
            rates.check_first_measurement()
        self._steps = [
            DeviceStep(rates.device, rates.records, self.param_groups, self.state, rates.eta)
            for rates in self._rates.devices
        ]
        self._order = all_parameters(self.param_groups)
        self._memory_needs_then = _memory_needs(self.param_groups)
        self._state_objects = list(self.state.values())
        self._own_states = [self.state[p] for p in self._order]

    def state_dict(self) -> dict[str, Any]:
        """Return all that a run needs to go on, in tensors and plain numbers; see ``rmsgd.optim.state``.

        The past gradients of a parameter have its shape, and float64 if it has that, else float32. The other
        entries of its state are plain numbers: rates without a unit, stable ranks in 0 to 1, counts.
        Entries that others, such as wrappers, keep in ``optimizer.state`` are part of it, unchanged.
        """
        self._begin_groups_of_others()
        self._write_back()
        self._forget_departed()
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:  # a schedule may compute with NumPy
            group.update({k: v.item() for k, v in group.items() if isinstance(v, np.generic)})
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint of RMSGD, under any rule, or of ``torch.optim.SGD``.

        As in torch, the checkpoint's options replace the optimizer's, and options that it lacks stay. The
        checkpoint's tensors are copied.

        Args:
            state_dict: a dict in the form of ``state_dict()``; its past gradients have the parameters' shapes
                and any floating dtype.

        Raises:
            ValueError: the checkpoint is one of rmsgd 1.0.2 or of another optimizer, its parameters are not
                the optimizer's, or it holds a value that no optimizer writes. The message names the
                difference, and nothing has been changed.
        """
        if not isinstance(state_dict, dict):  # the content of a dict is checked after other hooks have run
            check_form(state_dict)
        self._begin_groups_of_others()
        handle = self.register_load_state_dict_pre_hook(check_and_complete)  # sees what other hooks give
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        self._write_back()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("process_group", None)
        if "_number" not in self.__dict__:
            self._number = register_step(self._step_compiled)
        self._forget_tables()
        for key in self.state:
            self.state[key] = unwrapped_state(
                self.state[key], device_of(key) if isinstance(key, Tensor) else None
            )
        self._begin_groups_of_others()
        for group in self.param_groups:
            for p in group["params"]:
                complete(p, self.state[p], group)
        self._order = all_parameters(self.param_groups)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RMSGD":
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        copy.__setstate__(deepcopy(self.__getstate__(), memo))
        copy.process_group = self.process_group
        return copy

    # -- steps -----------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take the step of one mini-batch: move every parameter that has a gradient, which has its shape.

        A CUDA graph may hold this step. At every replay it reads the rates, a learning rate that is a tensor,
        and AMP's scale. Capture it anew after ``load_state_dict`` and ``add_param_group``, and when other
        parameters are trained than before or parameters have moved in memory.

        Args:
            closure: evaluates the model again, with gradients enabled, and returns the loss.

        Returns:
            The loss of ``closure``; None without one.

        Raises:
            RuntimeError: a gradient is sparse, a parameter was resized, or two parameters share memory.
            TypeError: a parameter that was frozen is now trained and has a type that cannot be trained.
            ValueError: an option of a group has been set to what is no finite number, or deleted.
                Nothing has been changed in any of these cases.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            trace_step(self._number, self._order)
        else:
            with torch.no_grad():
                self._step()
        return loss

    def _step_compiled(
        self, indices: Sequence[int], parameters: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> None:
        """Step when a compiled graph runs, which may hold copies of the parameters and of their gradients."""
        order = self._order
        if not self._holds_its_parameters():
            self._current_steps()  # the next step is compiled for these parameters
            raise RuntimeError(
                "param_groups holds other parameters than when this step was compiled: take the step again"
            )
        mine = [order[i] for i in indices]
        copies = [(p, q) for p, q in zip(mine, parameters, strict=True) if p.data_ptr() != q.data_ptr()]
        for p, copy in copies:
            p.copy_(copy)
        own = [(p, p.grad) for p in order if p.grad is not None]
        for p, _ in own:
            p.grad = None
        for p, grad in zip(mine, gradients, strict=True):
            p.grad = grad
        try:
            self._step()
        finally:
            for p in mine:
                p.grad = None
            for p, before in own:
                p.grad = before
        for p, copy in copies:
            copy.copy_(p)

    def _step(self) -> None:
        self._opt_called = True
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        steps = self._current_steps()
        if len(steps) > 1:  # the gradients of all devices are checked before any of them is used
            for step in steps:
                step.check_gradients()
        for step, rates in zip(steps, self._rates.devices, strict=True):
            scale = step.scaling(grad_scale, found_inf)
            if scale is not None:
                rates.measure_first()
                step.step(step_groups(self.param_groups, step.device), scale)

    @torch.no_grad()
    def epoch_step(self) -> None:
        """End an epoch: measure every layer and move its learning rate.

        A layer whose weight holds a NaN or an Inf keeps its rate, and a warning names it. Another warning
        says once if there is no layer to measure, as under the first version of FSDP, which flattens
        parameters.

        On a GPU the measurement runs beside later work, and ``step`` waits for it. The few weights that need
        more than single precision are read again later. If something other than ``step`` has changed such a
        weight in between, it keeps its rate, and the report says that it changed.

        Raises:
            RuntimeError: the ranks of a process group or a mesh do not hold the same layers, a parameter was
                resized or has no values, two share memory, or a CUDA graph is being captured.
            ValueError: an option of a group has been set to a value out of its range, or deleted. Nothing has
                changed in either case.
        """
        check_not_capturing(filter(is_trained, all_parameters(self.param_groups)), "epoch_step()")
        self._begin_groups_of_others()
        check_groups(self.param_groups, OF_EPOCH_END)
        self._current_steps()
        if not self._rates.probe_the_same(self.param_groups):
            self._write_back()
            self._build()
        for message in self._rates.epoch_step(self.param_groups, self.state):
            warnings.warn(message, stacklevel=3)

    # -- what to look at -------------------------------------------------------------------------

    def learning_rates(self) -> dict[str, float]:
        """Return the rate that is now applied to every parameter, a float, by its name (or "group.index").

        The order is that of the parameters. Rates have no unit: a step moves by rate times gradient.

        Where groups have names in common, for example those of two models, every name is preceded by its
        group's number and a dot. A name that a group holds more than once is followed by "#" and its index
        there.
        """
        self._current_steps()
        for message in self._rates.large(self.param_groups):
            warnings.warn(message, stacklevel=2)
        self._write_back()
        return self._rates.by_name(self.param_groups)

    def report(self) -> Report:
        """Return the metrics that the last ``epoch_step`` measured, in the units of ``rmsgd.Report``.

        Raises:
            RuntimeError: there was no ``epoch_step`` yet.
        """
        report: Report = self._rates.report()
        return report


# A scheduler of torch's wraps an optimizer's step, to see that it is called first, in a function that
# torch.compile does not look into. The mark says that this has been done: _step notes the call by itself. A
# torch that knows no such mark wraps this step as any other.
RMSGD.step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def _memory_needs(groups: list[dict[str, Any]]) -> list[tuple[int, bool, str]]:
    """The options of the groups that decide which memory their parameters need."""
    return [(len(group["params"]), group.get("momentum") != 0, group.get("rule", "")) for group in groups]
