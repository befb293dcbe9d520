"""The optimizer's books for one device: rates and measurements as arrays, and the backend at work.

``optimizer.state`` holds plain numbers per parameter, which is what checkpoints carry. While the
optimizer runs, the same numbers live here, in the order of registration, where the kernels read
and write them. ``write_back`` brings them to the state.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmsgd.backends import backend_for
from rmsgd.backends.base import (
    RateGroup,
    RateTables,
    StepGroup,
    StepTables,
    buffer_dtype,
    same_layout,
)
from rmsgd.layers import NO_LEADER, Unfolding, leader_of, unfoldings
from rmsgd.optim.distributed import SharedMeasurement, is_dtensor, local, local_gradient
from rmsgd.optim.layouts import Layouts, check_apart, dense_forms
from rmsgd.optim.measurement import Measurement
from rmsgd.optim.options import applied_rate, have_gradients, is_trained, stands_still
from rmsgd.optim.state import State, buffer_key
from rmsgd.rules import RULES, Rule

_PROBING = ("probe", "linear")
"""The options of a group that decide which of its parameters are probed; its rule makes new device_states."""


_LARGE = 10.0
"""How many times its first a learning rate may be before a warning names its layer."""


@dataclass(frozen=True)
class ParamRecord:
    """A parameter of the optimizer: where it stands and what it is called."""

    parameter: Tensor
    group: int
    position: int
    """Where it stands among all parameters, in the order of registration."""
    name: str
    """Its name if the optimizer was given names, else "group.index"."""
    named: bool


class DeviceState:
    """All parameters of one device.

    Args:
        device: that of those which are trained.
        records: the parameters, in registration order. A frozen one has a rate here, which follows a layer as
            a bias does, and is neither stepped nor measured: it may be a tensor of any kind.
        groups: all parameter groups of the optimizer; ``ParamRecord.group`` is an index into them.
        state: the optimizer's state of each parameter; read now, written by ``write_back``.
        process_group: of the ranks that hold copies of the plain parameters, to share the epoch end with.
    """

    def __init__(
        self,
        device: torch.device,
        records: Sequence[ParamRecord],
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Tensor, State],
        process_group: Any = None,
    ) -> None:
        self.records = records
        self.device = device
        self._trained = [i for i, m in enumerate(records) if is_trained(m.parameter)]
        self._frozen = [m.parameter for m in records if not is_trained(m.parameter)]
        self._parameters = [torch.empty(0, device=device)] * len(records)
        for i in self._trained:
            self._parameters[i] = records[i].parameter
        self._spread = any(map(is_dtensor, self._parameters))
        self._states = [state[m.parameter] for m in records]
        self._backend = backend_for(self.device)
        self._build_step(groups)
        self._build_rates(groups)
        shared = process_group is not None or (self._spread and self._spectra)
        self._sharing = SharedMeasurement(self._spectra, process_group) if shared else None
        trained = [self._parameters[i] for i in self._trained]
        self._layouts = Layouts([*trained, *(b for b in self._kept if b is not None)])
        self._probing = self._probing_now(groups)

    def _build_step(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self._keepers = [self._states[i] for i in self._trained]
        self._keys = [buffer_key(groups[self.records[i].group]) for i in self._trained]
        self._kept = [state.get(key) for state, key in zip(self._keepers, self._keys, strict=True)]
        buffers: list[Tensor | None] = [None] * len(self.records)
        for i, buffer in zip(self._trained, self._kept, strict=True):
            buffers[i] = None if buffer is None else local(buffer)
        rates = [
            applied_rate(groups[m.group], state["rate"], state["decay"])
            for m, state in zip(self.records, self._states, strict=True)
        ]
        fresh = [state["fresh"] for state in self._states]
        place = torch.device("cpu") if self._backend.on_host else self.device
        self._eta = torch.tensor(rates, dtype=torch.float64, device=place)
        self._fresh = torch.tensor(fresh, dtype=torch.bool, device=place)
        self._known_fresh = sum(fresh)  # how many flags the state holds
        self._stepped, self._copies = dense_forms([local(p) for p in self._parameters])
        self._empty = [i for i in self._trained if self._stepped[i].numel() == 0]
        check_apart([local(p) for p in self._parameters], [m.name for m in self.records])
        self._stepper = self._backend.stepper(
            StepTables(self._stepped, buffers, [m.group for m in self.records], self._eta, self._fresh)
        )

    def _build_rates(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self._probed = [
            i
            for i, group in ((i, groups[self.records[i].group]) for i in self._trained)
            if not stands_still(group) and is_probed(self._parameters[i], group)
        ]
        self._spectra: list[tuple[Tensor, Unfolding]] = []
        begin, weight = [0], []
        column: list[int] = []
        for i in self._probed:
            p, rule = self._parameters[i], _rule(groups[self.records[i].group])
            self._spectra += [(p, u) for u in unfoldings(p.shape)]
            weight += rule.mode_weights(p.shape, groups[self.records[i].group]["lr0"])
            column += [rule.column] * (len(weight) - len(column))
            begin.append(len(self._spectra))

        layer_of = {i: layer for layer, i in enumerate(self._probed)}
        names = [self.records[i].name if self.records[i].named else None for i in self._probed]
        followers, leaders = [], []
        latest: dict[int, int] = {}  # group -> the last probed layer so far
        latest_of_all: int | None = None
        for i, m in enumerate(self.records):
            if i in layer_of:
                latest[m.group] = latest_of_all = layer_of[i]
                continue
            followers.append(i)
            if _rule(groups[m.group]).leaders_by_name:
                leaders.append(leader_of(m.name if m.named else None, latest.get(m.group), names))
            else:
                leaders.append(NO_LEADER if latest_of_all is None else latest_of_all)

        def tensor(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self._eta.device)

        # Of the metrics table, what s is made of, by runs of rows: a tensor of it would have to be kept from
        # whoever gets its memory while another stream works.
        self._measures = [(run, len(list(rows))) for run, rows in groupby(column)]
        self._tables = RateTables(
            parameter=tensor(self._probed, torch.int32),
            group=tensor([self.records[i].group for i in self._probed], torch.int32),
            spectrum_begin=tensor(begin, torch.int32),
            weight=tensor(weight, torch.float64),
            stable_rank=tensor([self._states[i]["stable_rank"] for i in self._probed], torch.float64),
            ready=tensor([int(self._states[i]["ready"]) for i in self._probed], torch.int32),
            unbounded=tensor([self._states[i]["rate"] for i in self._probed], torch.float64),
            eta=self._eta,
            follower=tensor(followers, torch.int32),
            leader=tensor(leaders, torch.int32),
            follower_group=tensor([self.records[i].group for i in followers], torch.int32),
        )
        lacking = [i for i in self._probed if math.isnan(self._states[i]["stable_rank"])]
        self._lacks_ranks = bool(lacking)
        self._first_measurement_due = any(
            groups[self.records[i].group]["initial_rank"] == "measure" for i in lacking
        )

    # -- whether it still holds ------------------------------------------------------------------

    def _probing_now(self, groups: Sequence[Mapping[str, Any]]) -> list[object]:
        with torch._C.DisableTorchFunctionSubclass():
            trainable = [m.parameter.requires_grad for m in self.records]
        return [trainable, [[group[key] for key in _PROBING] for group in groups]]

    def is_current(self) -> bool:
        """Whether parameters and buffers are where and what they were when this device_state was made."""
        return (
            self._layouts.hold()
            and all(map(is_, map(dict.get, self._keepers, self._keys), self._kept))
            and not have_gradients(self._frozen)
        )

    def probes_the_same(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the same parameters are to be measured as when this device_state was made."""
        return self._probing == self._probing_now(groups)

    # -- steps -----------------------------------------------------------------------------------

    def scaling(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> float | None:
        """See ``backends.base.Stepper``."""
        return self._stepper.scaling(grad_scale, found_inf)

    def check_gradients(self) -> None:
        """Raise RuntimeError for a gradient that no step can be taken along."""
        for record, p in zip(self.records, self._parameters, strict=True):
            if p.grad is not None:
                _check_gradient(p.grad, record.name)

    def step(self, groups: Sequence[StepGroup], grad_scale: float) -> None:
        """One step along the parameters' gradients."""
        if not self._copies and not self._spread:
            without = self._stepper.step_parameters(groups, grad_scale)
            if without is not None:
                _mark_written(self._parameters, without)
                return
        usable: list[Tensor | None] = []
        for record, p, stepped in zip(self.records, self._parameters, self._stepped, strict=True):
            grad = p.grad
            if grad is not None:
                grad = _usable(local_gradient(grad, p), stepped, record.name)
            usable.append(grad)
        for p, dense in self._copies:
            dense.copy_(p)
        self._stepper.step(usable, groups, grad_scale)
        for i in self._empty:  # an empty shard's gradient is another rank's: all their flags are alike
            self._fresh[i] &= usable[i] is None
        for p, dense in self._copies:
            p.copy_(dense)
        _mark_written(self._parameters, [i for i, grad in enumerate(usable) if grad is None])

    # -- epoch ends ------------------------------------------------------------------------------

    @property
    def on_host(self) -> bool:
        """Whether rates and metrics can be read without waiting for a device."""
        return self._backend.on_host

    def measure_first(self) -> None:
        """Take s(0) from the weights as they are, for layers that ask for it and have none yet."""
        if self._first_measurement_due and self.device.type != "meta":
            self._first_measurement_due = False
            # An epoch end may have come first, and still be at it.
            self._backend.wait_side_stream(self.device)
            self._fill_in(self._measure())

    def _measure(self) -> Tensor:
        if self._sharing is None:
            return self._backend.measure(self._spectra)
        # Ranks exchange what lies on the parameters' device.
        return self._sharing(lambda mine: self._backend.measure(mine).to(self.device)).to(self._eta.device)

    def _fill_in(self, metrics: Tensor) -> None:
        """Give the layers that have no s yet the one measured, NaN where a weight is not finite."""
        runs = metrics.split([count for _, count in self._measures])  # type: ignore[no-untyped-call]
        of_rule = [rows[:, column] for rows, (column, _) in zip(runs, self._measures, strict=True)]
        rows = torch.cat(of_rule) * self._tables.weight
        sizes = self._tables.spectrum_begin.diff()
        layers = torch.repeat_interleave(
            torch.arange(len(sizes), device=rows.device), sizes, output_size=len(rows)
        )
        measured = torch.zeros(len(sizes), dtype=rows.dtype, device=rows.device).index_add_(0, layers, rows)
        known = self._tables.stable_rank
        known.copy_(torch.where(known.isnan(), measured, known))
        if self._backend.on_host:
            self._lacks_ranks = bool(known.isnan().any())

    def check_epoch_end(self, groups: Sequence[RateGroup]) -> None:
        """Raise RuntimeError if layers cannot be measured: without values, or not the same on all ranks."""
        if self.device.type == "meta":
            name = self.records[self._trained[0]].name
            raise RuntimeError(
                f"{name} is on the meta device, without values: make RMSGD of the parameters that "
                "model.to_empty() leaves"
            )
        if self._sharing is not None:
            self._sharing.check_agreement(self._description(groups), self.device)

    def epoch_step(self, groups: Sequence[RateGroup]) -> Measurement:
        """Measure every layer and move the rates."""
        with self._backend.side_stream(self.device):
            metrics = self._measure()
            if self._lacks_ranks:
                self._fill_in(metrics)
            self._backend.update_rates(self._tables, groups, metrics)
        return Measurement(
            [self.records[i].position for i in self._probed],
            [self.records[i].name for i in self._probed],
            [tuple(self._parameters[i].shape) for i in self._probed],
            metrics,
            partial(self._backend.wait_side_stream, self.device),
        )

    def _description(self, groups: Sequence[RateGroup]) -> list[str]:
        """What all ranks have to hold alike, a line for each layer. Rates only where no wait is needed."""
        layers = [self.records[i] for i in self._probed]
        eta = self._tables.unbounded.tolist() if self._backend.on_host else [math.nan] * len(layers)
        return [
            f"{m.name} {tuple(m.parameter.shape)} {m.parameter.dtype} rate {rate} {groups[m.group]}"
            for m, rate in zip(layers, eta, strict=True)
        ]

    def rates(self) -> list[float]:
        """eta of every parameter, before its group's multiplier."""
        self._backend.wait_side_stream(self.device)
        return self._eta.tolist()

    def large_rates(self, groups: Sequence[Mapping[str, Any]]) -> list[tuple[ParamRecord, float]]:
        """The layers whose eta is more than ten times their first, and that eta."""
        eta = self._eta.tolist()
        layers = ((self.records[i], eta[i]) for i in self._probed)
        return [(m, rate) for m, rate in layers if rate > _LARGE * groups[m.group]["lr0"]]

    def write_back_first_gradients(self) -> None:
        """Bring the flags that a step has changed to the optimizer's state, where nothing is waited for."""
        if self.on_host and self._known_fresh and np.count_nonzero(self._fresh.numpy()) != self._known_fresh:
            self._write_back_flags()

    def _write_back_flags(self) -> None:
        fresh = self._fresh.tolist()
        for state, flag in zip(self._states, fresh, strict=True):
            state["fresh"] = flag
        self._known_fresh = sum(fresh)

    def write_back(self) -> None:
        """Bring rates, measurements and flags to the optimizer's state, as plain numbers."""
        self._backend.wait_side_stream(self.device)
        self._write_back_flags()
        for state, rate in zip(self._states, self._eta.tolist(), strict=True):
            state["rate"] = rate
        t = self._tables
        layers = zip(t.unbounded.tolist(), t.stable_rank.tolist(), t.ready.tolist(), strict=True)
        for i, (rate, s, ready) in zip(self._probed, layers, strict=True):
            self._states[i].update(rate=rate, stable_rank=s, ready=bool(ready))


def _rule(group: Mapping[str, Any]) -> Rule:
    return RULES[group["rule"]]


def is_probed(weight: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether an epoch end measures this parameter: a trainable floating weight with a spectrum.

    ``group`` is its parameter group: ``probe=False`` opts out, ``linear=False`` leaves 2-D weights out, and
    its rule measures what its source does.
    """
    if not (group["probe"] and weight.requires_grad and weight.is_floating_point()):
        return False
    return (group["linear"] or weight.ndim != 2) and _rule(group).probes(weight.shape)


def _check_gradient(grad: Tensor, name: str) -> None:
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"RMSGD does not support sparse gradients, and {name} has one ({grad.layout}); "
            "use a dense gradient (sparse=False in an embedding)"
        )


def _usable(grad: Tensor, p: Tensor, name: str) -> Tensor:
    """A gradient as steppers take it. It may have been scaled: half precision might not hold it then."""
    _check_gradient(grad, name)
    if grad.dtype != p.dtype:
        grad = grad.to(buffer_dtype(p))
    return same_layout(grad.resolve_neg(), p)


def _mark_written(parameters: Sequence[Tensor], without: Sequence[int]) -> None:
    """Tell autograd of the parameters that changed: all but these."""
    left_out = set(without)
    torch.autograd.graph.increment_version(
        [p for i, p in enumerate(parameters) if i not in left_out] if without else parameters
    )
