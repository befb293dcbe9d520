"""The weights of a network, of which some are stored in parts."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from rmsgd.inspection.reading.stored import CheckpointError, NotMeasurableError, Source, StoredTensor
from rmsgd.inspection.weights import (
    bitsandbytes,
    compressed_tensors,
    gptq,
    leftovers,
    lora,
    mlx,
    parametrised,
    scaled,
)
from rmsgd.inspection.weights.rule import Rule, Stored, Weight

RULES: tuple[Rule, ...] = (
    scaled.torchao,
    scaled.quanto,
    bitsandbytes.four_bits,
    bitsandbytes.eight_bits,
    mlx.packed,
    mlx.channels_last,
    gptq.gptq_and_awq,
    compressed_tensors.compressed_tensors,
    scaled.eight_bits,
    leftovers.packed,
    parametrised.weight_norm,
    parametrised.pruned_or_normed,
    parametrised.parametrizations,
)
"""The kinds of weights, in the order of precedence: a tensor belongs to the first weight that claims it."""


def effective_weights(source: Source) -> list[StoredTensor]:
    """The tensors of a source, in which a weight replaces the first of the parts that it is stored in.

    Other parts of two or more dimensions are skipped, with the name of their weight as the reason.
    """
    free = {stored.name: stored for stored in source.tensors}
    names = set(free)
    instead: dict[str, StoredTensor | None] = {}
    for rule in RULES:
        for weight in rule(Stored(free, source.settings)):
            _claim(weight, free, instead, names)
        free = {name: stored for name, stored in free.items() if name not in instead}
    tensors = (instead.get(stored.name, stored) for stored in source.tensors)
    return [stored for stored in tensors if stored is not None]


def _claim(
    weight: Weight, free: dict[str, StoredTensor], instead: dict[str, StoredTensor | None], names: set[str]
) -> None:
    """Replace the parts of a weight by the weight. ``names`` are the names that are taken already."""
    first, *others = (name for name in weight.parts if name in free)
    if first in instead:
        return
    stored = free[first]
    named = weight.name if weight.skip is None else first
    taken = named != first and named in names
    if weight.skip is not None or taken:
        why = weight.skip or f"{weight.parts[first]} of {named}, which is here too"
        instead[first] = replace(stored, skip=stored.skip or why)
    elif not stored.skip:
        role = "parameter" if others else stored.role
        instead[first] = StoredTensor(named, weight.shape, partial(_made, weight), role=role)
        names.add(named)
    for name in others:
        if name not in instead:
            what = f"{weight.parts[name].removeprefix('the ')} of {named}"
            part = replace(free[name], skip=free[name].skip or what)
            instead[name] = part if len(part.shape) > 1 else None


def _made(weight: Weight) -> Tensor:
    """A weight made of its parts, which in a damaged file may have shapes and numbers of any kind."""
    try:
        return weight.read()
    except (NotMeasurableError, CheckpointError):
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise NotMeasurableError(f"its parts do not fit together ({reason})") from None


def lora_products(tensors: Sequence[StoredTensor]) -> list[StoredTensor]:
    """The product of every LoRA pair among the tensors, in their order."""
    known = {stored.name: stored for stored in tensors}
    return [
        StoredTensor(product.name, product.shape, partial(_made, product), role="parameter")
        for product in lora.products(Stored(known, {}))
        if product.name not in known
    ]
