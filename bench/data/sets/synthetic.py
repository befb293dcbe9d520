"""Synthetic samples in the form that a network reads, to time it and to see that it learns."""

import torch

from bench.data.dataset import DataSet, Request
from bench.data.source import Augmentation
from bench.data.split import Parts

SAMPLES = 2048


def read(request: Request) -> Parts:
    """Noisy images of their class, or tokens with a fixed successor each, and a quarter as many to test."""
    known, device = request.network, request.device
    generator = torch.Generator(device).manual_seed(0)
    kept = SAMPLES if request.limit is None else request.limit
    count = kept + kept // 4
    if known.reads_tokens:
        inputs = torch.randint(known.classes, (count, *known.sample), generator=generator, device=device)
        successor = torch.randperm(known.classes, generator=generator, device=device)
        targets = successor[inputs]
    else:
        targets = torch.randint(known.classes, (count,), generator=generator, device=device)
        prototypes = torch.randn(known.classes, *known.sample, generator=generator, device=device)
        inputs = torch.randn(count, *known.sample, generator=generator, device=device)
        inputs += 0.2 * prototypes[targets]
    return (inputs[:kept], targets[:kept]), (inputs[kept:], targets[kept:]), known.classes


DATASETS = {"synthetic": DataSet(read, augmentation=Augmentation(pad=4, flip=True), trains=True)}
