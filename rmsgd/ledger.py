"""The optimizer's books for one device: rates and measurements as arrays, and the backend at work.

``optimizer.state`` holds plain numbers per parameter, which is what checkpoints carry. While the
optimizer runs, the same numbers live here, in the order of registration, where the kernels read
and write them. ``write_back`` brings them to the state.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rmsgd.backends import backend_for
from rmsgd.backends.base import (
    CONDITION_NUMBER,
    MEASURED,
    NOISE_VARIANCE,
    RANK,
    STABLE_RANK,
    STATUS,
    RateGroup,
    RateTables,
    StepGroup,
    StepTables,
    same_layout,
)
from rmsgd.layers import Unfolding, is_probed, leader_of, measurement_weights, unfoldings
from rmsgd.metrics import LayerMetrics

State = dict[str, Any]


@dataclass(frozen=True)
class Member:
    """A parameter of the optimizer: where it stands and what it is called."""

    parameter: Tensor
    group: int
    name: str
    """Its name if the optimizer was given names, else "group.index"."""
    named: bool


def buffer_key(group: Mapping[str, Any]) -> str:
    """What a group's state calls its memory of past gradients."""
    return "velocity" if group["rule"] == "paper" else "momentum_buffer"


class Ledger:
    """All parameters of one device.

    Args:
        members: the parameters, in registration order.
        groups: all parameter groups of the optimizer; ``Member.group`` is an index into them.
        state: the optimizer's state of each parameter; read now, written by ``write_back``.
    """

    def __init__(
        self,
        members: Sequence[Member],
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Tensor, State],
    ) -> None:
        self.members = members
        self.device = members[0].parameter.device
        self._parameters = [m.parameter for m in members]
        self._states = [state[p] for p in self._parameters]
        self._layout = self._memory()
        self._trainable = self._requires_grad()
        self._backend = backend_for(self.device)
        self._build_step(groups)
        self._build_rates(groups)
        self.metrics: Tensor | None = None

    def _build_step(self, groups: Sequence[Mapping[str, Any]]) -> None:
        buffers = [
            state.get(buffer_key(groups[m.group]))
            for m, state in zip(self.members, self._states, strict=True)
        ]
        rates = [state["rate"] for state in self._states]
        fresh = [state["fresh"] for state in self._states]
        self._eta = torch.tensor(rates, dtype=torch.float64, device=self.device)
        self._fresh = torch.tensor(fresh, dtype=torch.bool)
        self._stepper = self._backend.stepper(
            StepTables(self._parameters, buffers, [m.group for m in self.members], self._eta, self._fresh)
        )

    def _build_rates(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self._probed = [i for i, m in enumerate(self.members) if is_probed(m.parameter, groups[m.group])]
        self._spectra: list[tuple[Tensor, Unfolding]] = []
        begin, weight = [0], []
        for i in self._probed:
            p, group = self._parameters[i], groups[self.members[i].group]
            self._spectra += [(p, u) for u in unfoldings(p.shape)]
            weight += measurement_weights(p.shape, group["rule"])
            begin.append(len(self._spectra))

        layer_of = {i: layer for layer, i in enumerate(self._probed)}
        names = [self.members[i].name if self.members[i].named else None for i in self._probed]
        followers, leaders = [], []
        latest: dict[int, int] = {}  # group -> the last probed layer so far
        latest_of_all: int | None = None
        for i, m in enumerate(self.members):
            if i in layer_of:
                latest[m.group] = latest_of_all = layer_of[i]
                continue
            followers.append(i)
            if groups[m.group]["rule"] == "paper":
                leaders.append(leader_of(m.name if m.named else None, latest.get(m.group), names))
            else:
                leaders.append(-2 if latest_of_all is None else latest_of_all)

        def tensor(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        self._tables = RateTables(
            parameter=tensor(self._probed, torch.int32),
            group=tensor([self.members[i].group for i in self._probed], torch.int32),
            spectrum_begin=tensor(begin, torch.int32),
            weight=tensor(weight, torch.float64),
            stable_rank=tensor([self._states[i]["stable_rank"] for i in self._probed], torch.float64),
            ready=tensor([int(self._states[i]["ready"]) for i in self._probed], torch.int32),
            eta=self._eta,
            follower=tensor(followers, torch.int32),
            leader=tensor(leaders, torch.int32),
            follower_lr=tensor([groups[self.members[i].group]["lr0"] for i in followers], torch.float64),
        )
        self._first_measurement_due = any(
            groups[self.members[i].group]["initial_rank"] == "measure"
            and math.isnan(self._states[i]["stable_rank"])
            for i in self._probed
        )

    def _memory(self) -> list[tuple[int, torch.device]]:
        return [(p.data_ptr(), p.device) for p in self._parameters]

    def _requires_grad(self) -> list[bool]:
        return [p.requires_grad for p in self._parameters]

    def is_current(self) -> bool:
        """Whether the parameters still lie where they lay when this ledger was made."""
        return self._layout == self._memory()

    def probes_the_same(self) -> bool:
        """Whether the same parameters are trainable as when this ledger was made."""
        return self._trainable == self._requires_grad()

    def step(self, groups: Sequence[StepGroup], grad_scale: float) -> None:
        """One step along the parameters' gradients."""
        gradients: list[Tensor | None] = []
        written: list[Tensor] = []
        for member, p in zip(self.members, self._parameters, strict=True):
            grad = p.grad
            if grad is not None:
                written.append(p)
                if grad.stride() != p.stride() or grad.dtype != p.dtype or grad.is_sparse:
                    grad = self._usable(grad, member)
            gradients.append(grad)
        self._stepper.step(gradients, groups, grad_scale)
        torch.autograd.graph.increment_version(written)

    def _usable(self, grad: Tensor, member: Member) -> Tensor:
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"RMSGD does not support sparse gradients, and {member.name} has one ({grad.layout}); "
                "use a dense gradient (sparse=False in an embedding)"
            )
        if grad.dtype != member.parameter.dtype:
            grad = grad.to(member.parameter.dtype)
        return same_layout(grad, member.parameter)

    def measure_first(self) -> None:
        """Take s(0) from the weights as they are, for layers that ask for it and have none yet."""
        if not self._first_measurement_due:
            return
        self._first_measurement_due = False
        measured = self._measurements(self._backend.measure(self._spectra))
        due = self._tables.stable_rank.isnan() & ~measured.isnan()
        self._tables.stable_rank[due] = measured[due]

    def _measurements(self, metrics: Tensor) -> Tensor:
        """The layers' s under the paper's rule, NaN where a weight is not finite; (layers,)."""
        rows = metrics[:, STABLE_RANK] * self._tables.weight
        sizes = self._tables.spectrum_begin.diff()
        layers = torch.repeat_interleave(torch.arange(len(sizes), device=rows.device), sizes)
        return torch.zeros(len(sizes), dtype=rows.dtype, device=rows.device).index_add_(0, layers, rows)

    def epoch_step(self, groups: Sequence[RateGroup]) -> None:
        """Measure every layer and move the rates; the metrics stay for the report."""
        self.metrics = self._backend.measure(self._spectra)
        self._backend.update_rates(self._tables, groups, self.metrics)

    def not_finite(self) -> list[str]:
        """Names of the layers whose last measurement met a NaN or an Inf."""
        if self.metrics is None:
            return []
        bad = (self.metrics[:, STATUS] != MEASURED).tolist()
        begin = self._tables.spectrum_begin.tolist()
        return [
            self.members[i].name
            for layer, i in enumerate(self._probed)
            if any(bad[begin[layer] : begin[layer + 1]])
        ]

    def rates(self) -> list[float]:
        """eta of every parameter, before its group's multiplier."""
        return self._eta.tolist()

    def layers(self) -> dict[int, LayerMetrics]:
        """What the last epoch end measured, by the index of the member."""
        assert self.metrics is not None
        rows = self.metrics.tolist()
        begin = self._tables.spectrum_begin.tolist()
        result = {}
        for layer, i in enumerate(self._probed):
            p, name = self._parameters[i], self.members[i].name
            mine = rows[begin[layer] : begin[layer + 1]]
            if any(row[STATUS] != MEASURED for row in mine):
                result[i] = LayerMetrics.skip(name, tuple(p.shape), "a weight is NaN or infinite")
                continue
            modes: list[str] = []
            columns: list[list[float]] = []
            for row, unfolding in zip(mine, unfoldings(p.shape), strict=True):
                modes += unfolding.modes
                columns += [row] * len(unfolding.modes)
            result[i] = LayerMetrics.from_modes(
                name,
                tuple(p.shape),
                tuple(modes),
                tuple(int(row[RANK]) for row in columns),
                tuple(row[NOISE_VARIANCE] for row in columns),
                tuple(row[STABLE_RANK] for row in columns),
                tuple(row[CONDITION_NUMBER] for row in columns),
            )
        return result

    def write_back(self) -> None:
        """Bring rates, measurements and flags to the optimizer's state, as plain numbers."""
        eta, fresh = self._eta.tolist(), self._fresh.tolist()
        for state, rate, flag in zip(self._states, eta, fresh, strict=True):
            state["rate"], state["fresh"] = rate, flag
        ranks, ready = self._tables.stable_rank.tolist(), self._tables.ready.tolist()
        for i, s, r in zip(self._probed, ranks, ready, strict=True):
            self._states[i]["stable_rank"], self._states[i]["ready"] = s, bool(r)
