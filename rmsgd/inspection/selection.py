"""Which layers of a network are measured, and where: what ``probe``, ``spectra`` and the command share."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase

import torch

from rmsgd.backends import backend_for


@dataclass(frozen=True)
class Selection:
    """The arguments that choose layers and a device; ``probe.probe`` says what each of them means."""

    filter: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None
    key: str | None = None
    include_buffers: bool = False
    merge_lora: bool = False
    device: torch.device | str | None = None

    def is_wanted(self, name: str) -> bool:
        """Whether a layer's name matches the filter."""
        return self.filter is None or matches(name, self.filter)

    def is_excluded(self, name: str) -> bool:
        """Whether a layer's name matches what is to be left out."""
        return self.exclude is not None and matches(name, self.exclude)

    def given_for_networks(self) -> list[str]:
        """The names of the arguments that were given and choose among the layers of a network."""
        return [field.name for field in fields(self) if field.name != "device" and getattr(self, field.name)]


EVERYTHING = Selection()
"""Every layer, where its weight lies."""


def matches(name: str, patterns: str | Sequence[str]) -> bool:
    """Whether a name matches one of the shell patterns, or contains one without wildcards."""
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return any(
        fnmatchcase(name, pattern) if re.search(r"[*?\[]", pattern) else pattern in name
        for pattern in patterns
    )


def usable_device(device: torch.device | str) -> torch.device:
    """The device, if tensors can be on it and a backend runs there.

    Raises:
        ValueError: it is unknown or not available here, or RMSGD_BACKEND names a backend for another device.
        BackendUnavailable: RMSGD_BACKEND names a backend that cannot run here.
    """
    try:
        zero = torch.zeros(1, device=device)
        zero.item()  # the meta device has no values
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} is not available: {reason}") from None
    backend_for(zero.device)
    return zero.device
