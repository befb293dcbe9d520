"""Tasks in which the next character is predicted: a small GPT without epochs, and LoRA on top of one."""

import math
import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from bench import models
from bench.data.split import Split
from bench.same_lr.training import MakeOptimizer, Outcome, train

# SGD's best of .03, .05 and .1. From .05 on some runs of SGD itself explode.
GPT_LR = 0.03
LORA_LR = 0.1
CHARACTERS, CONTEXT, BATCH = 128, 64, 8
WIDTH = 1 / 6  # 64 channels
RANK = 8


@cache
def corpus(part: str) -> Tensor:
    """ASCII codes, int64, of at most two million characters of Python's own sources.

    Args:
        part: "library", the modules at the top of the standard library, or "tests", those of its test suite.

    """
    folder = Path(sysconfig.get_path("stdlib")) / ("test" if part == "tests" else "")
    text = "".join(path.read_text("ascii", "ignore") for path in sorted(folder.glob("*.py")))[:2_000_000]
    return torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8).long()


def _windows(text: Tensor, count: int, generator: torch.Generator) -> Split:
    """Stretches of text, and the character after each of theirs; both (count, CONTEXT)."""
    starts = torch.randint(len(text) - CONTEXT - 1, (count, 1), generator=generator)
    windows = text[starts + torch.arange(CONTEXT + 1)]
    return Split(windows[:, :-1], windows[:, 1:])


def _fit(
    model: nn.Module, part: str, make: MakeOptimizer, lr: float, seed: int, *, steps: int, measurements: int
) -> Outcome:
    """Steps on the first nine tenths of a text; the rest is held out."""
    text = corpus(part)
    training, held_out = text.split([len(text) * 9 // 10, len(text) - len(text) * 9 // 10])
    drawn = _windows(training, steps * BATCH, torch.Generator().manual_seed(seed))
    looked_at = torch.Generator().manual_seed(0)
    return train(
        model,
        make(model, lr),
        lr,
        zip(drawn.inputs.split(BATCH), drawn.targets.split(BATCH), strict=True),
        steps=steps,
        measure_every=steps // measurements,
        training=_windows(training, 256, looked_at),
        held_out=_windows(held_out, 512, looked_at),
    )


def _network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return models.build("gpt", classes=CHARACTERS, width=WIDTH)


def gpt(seed: int, make: MakeOptimizer) -> Outcome:
    """A GPT of 64 channels on the standard library, 500 steps, measured 100 times."""
    return _fit(_network(seed), "library", make, GPT_LR, seed, steps=500, measurements=100)


class LoRA(nn.Module):
    """A linear layer that is frozen, and a product of rank 8 that is trained beside it (Hu et al., 2021)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(torch.empty(RANK, layer.in_features))
        self.up = nn.Parameter(torch.zeros(layer.out_features, RANK))
        nn.init.kaiming_uniform_(self.down, math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 2.0 * (x @ self.down.T) @ self.up.T


def _adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr)


@cache
def _pretrained(seed: int) -> dict[str, Tensor]:
    """Weights of the GPT after 500 steps of AdamW on the standard library."""
    model = _network(seed)
    _fit(model, "library", _adamw, 2e-3, seed, steps=500, measurements=1)
    return model.state_dict()


def lora(seed: int, make: MakeOptimizer) -> Outcome:
    """A GPT that has learned the standard library, adapted to its test suite in 300 steps."""
    model = _network(seed)
    model.load_state_dict(_pretrained(seed))
    model.requires_grad_(False)
    torch.manual_seed(seed)
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear) and layer.out_features != CHARACTERS:
                setattr(module, name, LoRA(layer))
    return _fit(model, "tests", make, LORA_LR, seed, steps=300, measurements=10)
