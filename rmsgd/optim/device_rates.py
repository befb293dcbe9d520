"""The learning rates of the parameters of one device, and the epoch end that moves them.

Nothing here depends on steps: ``eta`` is a table that a fused step may read on its device, or any other code.
The state of a parameter holds plain numbers, which checkpoints carry. While the optimizer runs, the same
numbers are kept here, in the order of registration, where the kernels read and write them. ``write_back``
writes them to the state.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from rmsgd.backends import backend_for
from rmsgd.backends.base import RateGroup, RateTables
from rmsgd.layers import MEAN_OF_ALL, NO_LEADER, Unfolding, leader_of, unfoldings
from rmsgd.optim.distributed import SharedMeasurement, is_dtensor
from rmsgd.optim.measurement import Measurement, TailMeasurement
from rmsgd.optim.options import applied_rate, fault, stands_still
from rmsgd.optim.records import ParamRecord, trained_tensors
from rmsgd.optim.state import State
from rmsgd.rules import RULES, Rule
from rmsgd.tails import Slices, tail_exponents

_PROBING = ("probe", "linear", "rule")
"""The options of a group that decide which of its parameters are measured."""

_LARGE = 10.0
"""A warning names a layer whose learning rate is more than so many times its first one."""


class DeviceRates:
    """The rates of all parameters of one device.

    Args:
        device: the device of the parameters that are trained.
        records: the parameters, in registration order. A frozen one has a rate here, which follows a layer as
            a bias does, and is not measured: it may be a tensor of any kind.
        groups: the options of all parameter groups; ``ParamRecord.group`` is an index into them.
        states: the state of each parameter, which is read now and written by ``write_back``.
        process_group: the ranks that hold copies of the plain parameters and share the epoch end.

    Attributes:
        eta: (parameters,) float64, the rate of each before its group's multiplier, on the host or the device,
            whichever the backend uses.
    """

    def __init__(
        self,
        device: torch.device,
        records: Sequence[ParamRecord],
        groups: Sequence[Mapping[str, Any]],
        states: Mapping[Tensor, State],
        process_group: Any = None,
    ) -> None:
        self.device = device
        self.records = records
        self._trained, self._parameters = trained_tensors(records, device)
        self._states = [states[m.parameter] for m in records]
        self._backend = backend_for(device)
        rates = [
            applied_rate(groups[m.group], state["rate"], state["decay"])
            for m, state in zip(records, self._states, strict=True)
        ]
        place = torch.device("cpu") if self._backend.on_host else device
        self.eta = torch.tensor(rates, dtype=torch.float64, device=place)
        self._probed = [i for i in self._trained if is_probed(self._parameters[i], groups[records[i].group])]
        self._probing = self._probing_now(groups)
        self._spectra: list[tuple[Tensor, Unfolding]] = [
            (self._parameters[i], u) for i in self._probed for u in unfoldings(self._parameters[i].shape)
        ]
        self._tables = self._make_tables(groups)
        lacking = [i for i in self._probed if math.isnan(self._states[i]["stable_rank"])]
        self._lacks_ranks = bool(lacking)
        self._first_measurement_due = any(
            groups[records[i].group]["initial_rank"] == "measure" for i in lacking
        )
        spread = any(map(is_dtensor, self._parameters))
        self._process_group = process_group
        self._shares = bool(process_group is not None or (spread and self._spectra))
        self._sharing = SharedMeasurement(self._spectra, process_group) if self._shares else None

    def _make_tables(self, groups: Sequence[Mapping[str, Any]]) -> RateTables:
        layers = [(self._parameters[i], groups[self.records[i].group]) for i in self._probed]
        begin, weight = [0], []
        column: list[int] = []
        for p, group in layers:
            weight += _rule(group).mode_weights(p.shape, group["lr0"])
            column += [_rule(group).column] * (len(weight) - len(column))
            begin.append(len(weight))
        # The columns of the metrics table from which s is computed, by runs of rows. A tensor of indices
        # would have to be kept alive while another stream works.
        self._measures = [(run, len(list(rows))) for run, rows in groupby(column)]
        followers, leaders = self._followers(groups)
        self._leaders = dict(zip(followers, leaders, strict=True))
        states = [self._states[i] for i in self._probed]

        def tensor(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self.eta.device)

        return RateTables(
            parameter=tensor(self._probed, torch.int32),
            group=tensor([self.records[i].group for i in self._probed], torch.int32),
            spectrum_begin=tensor(begin, torch.int32),
            weight=tensor(weight, torch.float64),
            stable_rank=tensor([state["stable_rank"] for state in states], torch.float64),
            ready=tensor([int(state["ready"]) for state in states], torch.int32),
            unbounded=tensor([state["rate"] for state in states], torch.float64),
            eta=self.eta,
            follower=tensor(followers, torch.int32),
            leader=tensor(leaders, torch.int32),
            follower_group=tensor([self.records[i].group for i in followers], torch.int32),
        )

    def _followers(self, groups: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
        """The parameters that are not measured, and the layer that each of them follows."""
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
        return followers, leaders

    def leaders(self) -> dict[Tensor, Tensor | None]:
        """The layer whose ratio every parameter takes, itself for a layer; None for none in particular."""
        layers = [self.records[i].parameter for i in self._probed]
        own = dict(zip(self._probed, range(len(layers)), strict=True)) | self._leaders
        return {m.parameter: layers[own[i]] if own[i] >= 0 else None for i, m in enumerate(self.records)}

    # -- whether it still holds ------------------------------------------------------------------

    def _probing_now(self, groups: Sequence[Mapping[str, Any]]) -> list[object]:
        with torch._C.DisableTorchFunctionSubclass():
            trainable = [m.parameter.requires_grad for m in self.records]
        return [trainable, [[group[key] for key in _PROBING] for group in groups]]

    def probes_the_same(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the same parameters are to be measured as when this was made."""
        return self._probing == self._probing_now(groups)

    @property
    def on_host(self) -> bool:
        """Whether rates and metrics can be read without waiting for a device."""
        return self._backend.on_host

    # -- epoch ends ------------------------------------------------------------------------------

    def measure_first(self) -> None:
        """Take s(0) from the weights as they are, for layers that ask for it and have none yet.

        Raises:
            RuntimeError: see ``check_first_measurement``.
        """
        if self._first_measurement_due and self.device.type != "meta":
            self.check_first_measurement()
            self._first_measurement_due = False
            # An epoch end may have come first, and may still be running.
            self._backend.wait_side_stream(self.device)
            self._fill_in(self._measure())

    def check_first_measurement(self) -> None:
        """Raise RuntimeError if s(0) is due and a CUDA graph is being captured, which cannot hold that."""
        if not self._first_measurement_due:
            return
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the first step measures the weights, which a CUDA graph cannot hold: take one step before "
                "the capture, or use initial_rank='zero'. Nothing has changed"
            )

    def _measure(self) -> Tensor:
        if self._sharing is None:
            return self._backend.measure(self._spectra)
        # Ranks exchange tensors on the parameters' device.
        return self._sharing(lambda mine: self._backend.measure(mine).to(self.device)).to(self.eta.device)

    def _fill_in(self, metrics: Tensor) -> None:
        """Set s of the layers that have none yet to the measured one: NaN where a weight is not finite."""
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
                f"{name} is on the meta device, without values: make the optimizer of the parameters that "
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
        return self._measurement(metrics)

    def measure(self) -> Measurement:
        """Measure every layer, and move no rate."""
        with self._backend.side_stream(self.device):
            metrics = self._measure()
        return self._measurement(metrics)

    def measure_tails(self) -> TailMeasurement:
        """Measure the tail exponent of every layer; waits for a GPU."""
        weights = [(self._parameters[i], Slices.of(self._parameters[i].shape)) for i in self._probed]
        if self._shares:
            sharing = SharedMeasurement(weights, self._process_group, columns=2)
            table = sharing(lambda mine: tail_exponents(mine).to(self.device)).cpu()
        else:
            table = tail_exponents(weights)
        return TailMeasurement(*self._layers(), table)

    def set_ratios(self, ratios: Mapping[str, float], groups: Sequence[Mapping[str, Any]]) -> None:
        """Give layers rates by name, as multiples of their lr0, and their followers the same multiples."""
        self._backend.wait_side_stream(self.device)
        eta, of_layers = self.eta.tolist(), self._tables.unbounded.tolist()
        shares = []
        for layer, i in enumerate(self._probed):
            lr0 = groups[self.records[i].group]["lr0"]
            if self.records[i].name in ratios:
                eta[i] = of_layers[layer] = lr0 * ratios[self.records[i].name]
            shares.append(eta[i] / lr0)
        for i, leader in self._leaders.items():
            if leader != NO_LEADER and shares:
                share = sum(shares) / len(shares) if leader == MEAN_OF_ALL else shares[leader]
                eta[i] = groups[self.records[i].group]["lr0"] * share
        self.eta.copy_(torch.tensor(eta, dtype=self.eta.dtype))
        self._tables.unbounded.copy_(torch.tensor(of_layers, dtype=self.eta.dtype))

    def _layers(self) -> tuple[list[int], list[str], list[tuple[int, ...]]]:
        """Where the measured layers stand, what they are called and their shapes."""
        layers = [self.records[i] for i in self._probed]
        shapes = [tuple(self._parameters[i].shape) for i in self._probed]
        return [m.position for m in layers], [m.name for m in layers], shapes

    def _measurement(self, metrics: Tensor) -> Measurement:
        return Measurement(*self._layers(), metrics, partial(self._backend.wait_side_stream, self.device))

    def _description(self, groups: Sequence[RateGroup]) -> list[str]:
        """A line for each layer on what all ranks must have in common; rates only where no wait is needed."""
        layers = [self.records[i] for i in self._probed]
        eta = self._tables.unbounded.tolist() if self._backend.on_host else [math.nan] * len(layers)
        return [
            f"{m.name} {tuple(m.parameter.shape)} {m.parameter.dtype} rate {rate} {groups[m.group]}"
            for m, rate in zip(layers, eta, strict=True)
        ]

    def moving(self) -> list[Tensor]:
        """A copy of what an epoch end moves, for ``restore``."""
        return [values.clone() for values in self._moved()]

    def restore(self, moving: Sequence[Tensor]) -> None:
        """Go back to what ``moving`` has copied."""
        for now, before in zip(self._moved(), moving, strict=True):
            now.copy_(before)
        self._lacks_ranks = bool(self._tables.stable_rank.isnan().any())

    def _moved(self) -> tuple[Tensor, ...]:
        t = self._tables
        return t.eta, t.unbounded, t.stable_rank, t.ready

    # -- results ---------------------------------------------------------------------------------

    def rates(self) -> dict[Tensor, float]:
        """eta of every parameter, before its group's multiplier."""
        self._backend.wait_side_stream(self.device)
        return dict(zip((m.parameter for m in self.records), self.eta.tolist(), strict=True))

    def large_rates(self, groups: Sequence[Mapping[str, Any]]) -> list[tuple[ParamRecord, float]]:
        """The layers whose eta is more than ten times their first, and that eta, before the multiplier."""
        self._backend.wait_side_stream(self.device)
        eta = self.eta.tolist()
        layers = ((self.records[i], eta[i]) for i in self._probed)
        return [(m, rate) for m, rate in layers if rate > _LARGE * groups[m.group]["lr0"]]

    def write_back(self) -> None:
        """Write rates and measurements to the parameters' state, as plain numbers."""
        self._backend.wait_side_stream(self.device)
        for state, rate in zip(self._states, self.eta.tolist(), strict=True):
            state["rate"] = rate
        t = self._tables
        layers = zip(t.unbounded.tolist(), t.stable_rank.tolist(), t.ready.tolist(), strict=True)
        for i, (rate, s, ready) in zip(self._probed, layers, strict=True):
            self._states[i].update(rate=rate, stable_rank=s, ready=bool(ready))


def _rule(group: Mapping[str, Any]) -> Rule:
    return RULES[group["rule"]]


def is_probed(weight: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether an epoch end measures this parameter: a trainable weight of a known type with a spectrum.

    ``group`` is its parameter group. ``probe=False`` opts out, ``linear=False`` leaves 2-D weights out, a
    rule measures the same weights as its source, and a group that stands still has no rates to move.
    """
    if stands_still(group) or not (group["probe"] and weight.requires_grad and fault(weight) is None):
        return False
    return (group["linear"] or weight.ndim != 2) and _rule(group).probes(weight.shape)
