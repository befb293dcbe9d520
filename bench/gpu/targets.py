"""The figures that the CUDA kernels must reach, and whether they do."""

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.gpu.measurements import (
    EPOCH_END_NETWORKS,
    RELEASE,
    RELEASE_NETWORKS,
    STEP_NETWORKS,
    WEIGHTS,
)

COPY, FUSED, PER_LAYER = 0.9, 0.95, 10.0
EPOCH_END_MS = {"resnet18": (10.0, 3.0), "resnet50": (20.0, 6.0), "vit-b16": (50.0, 15.0)}
TIMES_RELEASE = 300.0
MEMORY_NETWORK, MEMORY_MIB = "resnet101", 256.0
EPOCH = 1.01


@dataclass(frozen=True)
class Target:
    """One figure.

    Attributes:
        name: the name of the figure.
        wanted: the limit, in words.
        measured: the figure; None where it was not measured.
        met: whether it is within the limit; None where it was not measured.

    """

    name: str
    wanted: str
    measured: float | None
    met: bool | None


def judge(result: Mapping[str, Any]) -> list[Target]:
    """Every target, from the sections that `bench gpu` has measured; see `command`."""
    return [*_steps(result), *_epoch_ends(result), *_epochs(result)]


def _target(name: str, wanted: str, measured: float | None, holds: Callable[[float], bool]) -> Target:
    return Target(name, wanted, measured, None if measured is None else holds(measured))


def _rows(result: Mapping[str, Any], section: str, **wanted: str) -> list[Mapping[str, Any]]:
    """Rows of a section with these entries, without those that were not measured."""
    rows = result.get(section, {}).get("rows", [])
    return [
        row
        for row in rows
        if not {"error", "absent"} & row.keys() and all(row.get(k) == v for k, v in wanted.items())
    ]


def _steps(result: Mapping[str, Any]) -> Iterator[Target]:
    for network in STEP_NETWORKS:
        row = next(iter(_rows(result, "step", network=network)), None)
        copy = None if row is None else row["of_copy"]["median"]
        fused = None if row is None else row["device_ratio_to"]["sgd-fused"]["median"]
        faster = None if row is None else 1 / row["wall_ratio_to"]["sgd-per-layer"]["median"]
        yield _target(
            f"step, {network}: of a copy's bandwidth", f">= {COPY}", copy, lambda found: found >= COPY
        )
        yield _target(
            f"step, {network}: device time / fused SGD", f"<= {FUSED}", fused, lambda found: found <= FUSED
        )
        yield _target(
            f"step, {network}: times faster than a group per layer",
            f">= {PER_LAYER:.0f}",
            faster,
            lambda found: found >= PER_LAYER,
        )


def _of_both_weights(result: Mapping[str, Any], network: str) -> list[Mapping[str, Any]]:
    """The rows of initial and of trained-like weights; none unless both were measured."""
    rows = [row for row in _rows(result, "epoch-end", network=network) if "peer" not in row]
    return rows if len(rows) == len(WEIGHTS) else []


def _epoch_ends(result: Mapping[str, Any]) -> Iterator[Target]:
    slowest = {
        network: max(row["device_seconds"]["median"] for row in rows)
        for network in EPOCH_END_NETWORKS
        if (rows := _of_both_weights(result, network))
    }
    for network, (limit, aim) in EPOCH_END_MS.items():
        yield _target(
            f"epoch end, {network}: ms",
            f"<= {limit:.0f} (aim {aim:.0f})",
            1e3 * slowest[network] if network in slowest else None,
            partial(operator.ge, limit),
        )
    for network in RELEASE_NETWORKS:
        peer = _rows(result, "epoch-end", network=network, peer=RELEASE)
        yield _target(
            f"epoch end, {network}: times faster than {RELEASE}",
            f">= {TIMES_RELEASE:.0f}",
            peer[0]["seconds"] / slowest[network] if peer and network in slowest else None,
            lambda found: found >= TIMES_RELEASE,
        )
    extra = [row["extra_bytes"] / 2**20 for row in _of_both_weights(result, MEMORY_NETWORK)]
    yield _target(
        f"epoch end, {MEMORY_NETWORK}: extra MiB",
        f"<= {MEMORY_MIB:.0f}",
        max(extra, default=None),
        lambda found: found <= MEMORY_MIB,
    )


def _epochs(result: Mapping[str, Any]) -> Iterator[Target]:
    rows = _rows(result, "epoch-time", optimizer="rmsgd")
    yield _target(
        "epoch, resnet18, batch 128: time / SGD",
        f"<= {EPOCH}",
        rows[0]["ratio"]["median"] if rows else None,
        lambda found: found <= EPOCH,
    )
