"""Tasks that are classified: random teachers, handwritten digits, CIFAR-10."""

from pathlib import Path

import torch
from torch import nn

from bench import data, models
from bench.data.split import Split
from bench.same_lr.training import MakeOptimizer, Outcome, epoch_of, train

LR = 0.03


def _classify(
    model: nn.Module,
    training: Split,
    held_out: Split,
    make: MakeOptimizer,
    seed: int,
    *,
    batch: int,
    epochs: int,
) -> Outcome:
    generator = torch.Generator().manual_seed(seed)
    drawn = (pair for _ in range(epochs) for pair in epoch_of(training, batch, generator))
    each = len(training) // batch
    return train(
        model,
        make(model, LR),
        LR,
        drawn,
        steps=epochs * each,
        measure_every=each,
        training=Split(training.inputs[:4096], training.targets[:4096]),
        held_out=held_out,
    )


def teacher(classes: int, seed: int, make: MakeOptimizer) -> Outcome:
    """Normal vectors of 64 numbers, the class that a random linear teacher gives them under noise.

    A network of one hidden layer of 512, 8 epochs of 2048 samples (8192 for 1000 classes), 4096 held out.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = 2048 if classes <= 100 else 8192
    inputs = torch.randn(kept + 4096, 64, generator=generator)
    logits = inputs @ torch.randn(64, classes, generator=generator)
    targets = (logits + torch.randn(logits.shape, generator=generator)).argmax(1)
    training, held_out = (Split(inputs[part], targets[part]) for part in (slice(kept), slice(kept, None)))
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, classes))
    return _classify(model, training, held_out, make, seed, batch=64, epochs=8)


def digits(seed: int, make: MakeOptimizer) -> Outcome:
    """The small ResNet of half its width on half of the digits; the seed draws which half is held out."""
    loaded = data.load("digits", "resnet14-digits")
    inputs = torch.cat([loaded.train.inputs, loaded.test.inputs])
    targets = torch.cat([loaded.train.targets, loaded.test.targets])
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    training, held_out = (Split(inputs[part], targets[part]) for part in order.chunk(2))
    torch.manual_seed(seed)
    model = models.build("resnet14-digits", loaded.classes, 1, 0.5)
    return _classify(model, training, held_out, make, seed, batch=64, epochs=8)


def cifar10(archive: Path, seed: int, make: MakeOptimizer) -> Outcome:
    """The ResNet of three blocks and width 16 on 12,000 images, 4 epochs; all test images are held out."""
    loaded = data.load(str(archive), "resnet8-stride2", cache=Path(".out/data"))
    order = torch.randperm(len(loaded.train), generator=torch.Generator().manual_seed(0))[:12_000]
    training = Split(loaded.train.inputs[order], loaded.train.targets[order])
    torch.manual_seed(seed)
    model = models.build("resnet8-stride2", loaded.classes)
    return _classify(model, training, loaded.test, make, seed, batch=128, epochs=4)
