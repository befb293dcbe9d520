"""The learning rates of all parameters of an optimizer, on all their devices, and its epoch ends.

This is all of RMSGD but its step, and it knows nothing of steps. It can move the rates of any optimizer,
given groups with RMSGD's options for them and states that ``rmsgd.optim.state.complete_rates`` has completed.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rmsgd.inspection.report.report import Report
from rmsgd.optim.device_rates import DeviceRates
from rmsgd.optim.layouts import is_fake
from rmsgd.optim.measurement import Measurement, TailMeasurement
from rmsgd.optim.options import decayed, is_trained, multiplier, rate_group, stands_still
from rmsgd.optim.ratio_rules import RatioRule, checked_ratios, measures_tails
from rmsgd.optim.records import ParamRecord, parameter_names
from rmsgd.optim.state import State
from rmsgd.tails import TailReport

Groups = Sequence[Mapping[str, Any]]
States = Mapping[Tensor, State]


class Rates:
    """The rates of an optimizer's parameters.

    In every method ``groups`` are the optimizer's parameter groups, which it may change between calls, and
    ``states`` holds the state of every parameter.
    """

    def __init__(self) -> None:
        self.devices: list[DeviceRates] = []
        self._measured: list[Measurement] | list[TailMeasurement] | None = None
        self._of_tails = False
        self._named_as_large: set[Tensor] = set()
        self._warned_of_nothing_to_measure = False

    def build(
        self,
        records: Mapping[torch.device, Sequence[ParamRecord]],
        groups: Groups,
        states: States,
        process_group: Any,
    ) -> None:
        """Make the tables of these parameters anew, from their states.

        Raises:
            RuntimeError: a parameter is a fake tensor, or FakeTensorMode is active and every table would be.
        """
        _check_not_fake([record for on_device in records.values() for record in on_device])
        self.devices = [
            DeviceRates(device, on_device, groups, states, process_group)
            for device, on_device in records.items()
        ]

    def probe_the_same(self, groups: Groups) -> bool:
        """Whether the same parameters are to be measured as when the tables were made."""
        return all(device.probes_the_same(groups) for device in self.devices)

    def write_back(self, wait: bool = True) -> None:
        """Write the numbers to the states; those of a GPU, which have to be waited for, only if ``wait``."""
        for device in self.devices:
            if wait or device.on_host:
                device.write_back()

    def epoch_step(self, groups: Groups, states: States, rule: RatioRule | None = None) -> list[str]:
        """Measure every layer and move its rate, by the rules of the groups or by one for all layers.

        Returns:
            The texts of warnings for the user.

        Raises:
            RuntimeError: layers have no values, or are not the same on all ranks. Nothing has changed then.
            TypeError or ValueError: ``rule`` returned something else than ratios. No rate has changed then.
        """
        counts = [_epochs_and_decay([states[p] for p in group["params"]]) for group in groups]
        rate_groups = [rate_group(group, *count) for group, count in zip(groups, counts, strict=True)]
        for device in self.devices:
            device.check_epoch_end(rate_groups)
        with self._all_or_nothing(groups, states):
            if rule is None:
                self._measured = [device.epoch_step(rate_groups) for device in self.devices]
            else:
                self._apply_rule(rule, groups)
            for group, moved, (epoch, decay) in zip(groups, rate_groups, counts, strict=True):
                for p in () if stands_still(group) else group["params"]:
                    states[p].update(epoch=epoch + 1, decay=decayed(decay, moved.decay))
            self.write_back(wait=False)
        large = self.large(groups, wait=False) if rule is None else []
        return [*self._nothing_measured(groups), *large, *self._not_finite()]

    @contextmanager
    def _all_or_nothing(self, groups: Groups, states: States) -> Iterator[None]:
        """A context that undoes an epoch end which Ctrl-C or an error ends early, where the host drives it.

        Else rates might have moved without being counted, or those of one device alone.
        """
        measured, of_tails = self._measured, self._of_tails
        moving = [(device, device.moving()) for device in self.devices if device.on_host]
        counted = [(states[p], states[p]["epoch"], states[p]["decay"]) for g in groups for p in g["params"]]
        try:
            yield
        except BaseException:
            self._measured, self._of_tails = measured, of_tails
            for device, values in moving:
                device.restore(values)
            for state, epoch, decay in counted:
                state.update(epoch=epoch, decay=decay)
            self.write_back(wait=False)
            raise

    def _apply_rule(self, rule: RatioRule, groups: Groups) -> None:
        measured: list[Measurement] | list[TailMeasurement]
        if measures_tails(rule):
            measured = [device.measure_tails() for device in self.devices]
        else:
            measured = [device.measure() for device in self.devices]
        report = _report(measured, measures_tails(rule))
        ratios = checked_ratios(rule(report), [layer.name for layer in report.layers])
        for device in self.devices:
            device.set_ratios(ratios, groups)
        self._measured, self._of_tails = measured, measures_tails(rule)

    def _nothing_measured(self, groups: Groups) -> list[str]:
        """A warning, once, that there is no layer to measure, if that may surprise the user.

        It does not for an optimizer of biases alone, for example where every parameter has an optimizer of
        its own.
        """
        if self._warned_of_nothing_to_measure or any(part.names for part in self._measured or ()):
            return []
        asked = [group for group in groups if group["probe"] and not stands_still(group)]
        parameters = [p for group in asked for p in group["params"]]
        flat = any(getattr(p, "_fsdp_flattened", False) for p in parameters if is_trained(p))
        if not flat and all(is_trained(p) and p.ndim <= 1 for p in parameters):
            return []
        self._warned_of_nothing_to_measure = True
        return [_NOTHING_TO_MEASURE + (_FLATTENED if flat else "")]

    def _not_finite(self) -> list[str]:
        names = [
            name
            for measurement in self._measured or ()
            if measurement.metrics.device.type == "cpu"  # no wait for other devices
            for name in measurement.not_finite()
        ]
        if not names:
            return []
        return [f"NaN or infinite weights in {', '.join(names)}: not measured, the learning rate stays"]

    def large(self, groups: Groups, wait: bool = True) -> list[str]:
        """A warning that names the layers whose rate has grown tenfold, each layer once."""
        large = [
            (record, rate)
            for device in self.devices
            if wait or device.on_host
            for record, rate in device.large_rates(groups)
            if record.parameter not in self._named_as_large
        ]
        if not large:
            return []
        self._named_as_large.update(record.parameter for record, _ in large)
        rates = ", ".join(
            f"{record.name} ({rate * multiplier(groups[record.group]):.3g})" for record, rate in large
        )
        return [_LARGE_RATES.format(rates)]

    def rates(self) -> dict[Tensor, float]:
        """The rate of every parameter before its group's multiplier."""
        return {p: rate for device in self.devices for p, rate in device.rates().items()}

    def by_name(self, groups: Groups, rates: Mapping[Tensor, float] | None = None) -> dict[str, float]:
        """The rate applied to every parameter, by its name, in the order of the groups.

        ``rates`` takes the place of ``self.rates()``.
        """
        rates = self.rates() if rates is None else rates
        return {
            name: rates[p] * factor
            for group, names in zip(groups, parameter_names(groups), strict=True)
            for factor in (multiplier(group),)
            for p, name in zip(group["params"], names, strict=True)
        }

    @property
    def measured(self) -> bool:
        """Whether there was an epoch end, so that ``report`` can be called."""
        return self._measured is not None

    def report(self) -> Any:
        """The ``Report`` of what the last ``epoch_step`` measured, a ``TailReport`` for a rule that asks for
        it.

        Raises:
            RuntimeError: there was no ``epoch_step`` yet.
        """
        if self._measured is None:
            raise RuntimeError("report() needs an epoch_step() first: nothing has been measured yet")
        return _report(self._measured, self._of_tails)


def _check_not_fake(records: Sequence[ParamRecord]) -> None:
    trained = [record for record in records if is_trained(record.parameter)]
    names = [record.name for record in trained if is_fake(record.parameter)]
    if names or is_fake(torch.empty(0, device="cpu")):
        what = f"parameter {names[0]} is a fake tensor" if names else "tensors that are made now are fake"
        raise RuntimeError(
            f"{what}, without values: make, step and measure the optimizer outside FakeTensorMode"
        )


def _report(measured: Sequence[Measurement] | Sequence[TailMeasurement], tails: bool) -> Report | TailReport:
    layers: dict[int, Any] = {at: layer for part in measured for at, layer in part.layers().items()}
    in_order = tuple(layer for _, layer in sorted(layers.items()))
    return TailReport(in_order) if tails else Report(in_order)


_NOTHING_TO_MEASURE = (
    "no layer is measured, so every learning rate stays as it is: what is measured are convolutions and, "
    "unless linear=False, matrices that are trained"
)
_FLATTENED = "; FullyShardedDataParallel has flattened them: use torch.distributed.fsdp.fully_shard"

_LARGE_RATES = (
    "learning rates have grown to more than ten times their first: {}. The stable rank of a layer of few "
    "rows moves in large steps, and this rule puts no bound on the rate: use the default rule, or a smaller "
    "zeta; for pretrained weights also initial_rank='measure'"
)


def _epochs_and_decay(states: Sequence[State]) -> tuple[int, float]:
    """A group's epoch ends so far and its product of gammas. Parameters that joined later have seen fewer."""
    if not states:
        return 1, 1.0
    oldest = max(states, key=lambda state: state["epoch"])
    return oldest["epoch"], oldest["decay"]
