"""A small GPT: six layers of 384 channels, a context of 256 characters, and a head tied to the embedding."""

import math

import torch
from torch import Tensor, nn

from bench.models.blocks import scaled
from bench.models.transformer import HEAD, Block

DEPTH, DIM, CONTEXT = 6, 384, 256


class GPT(nn.Module):
    """Tokens (batch, length <= 256), int64, to logits of the next token (batch, length, classes).

    Weights are drawn from a normal distribution of standard deviation .02. Those that write to the residual
    stream are divided by sqrt(2 x layers), as in GPT-2.
    """

    def __init__(self, classes: int, width: float) -> None:
        super().__init__()
        dim = scaled(DIM, width, HEAD)
        self.tokens = nn.Embedding(classes, dim)
        self.positions = nn.Embedding(CONTEXT, dim)
        self.blocks = nn.Sequential(*(Block(dim, bias=False, causal=True) for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(dim, bias=False)
        self.head = nn.Linear(dim, classes, bias=False)
        self.head.weight = self.tokens.weight
        for name, weight in self.named_parameters():
            if weight.ndim > 1:
                writes = name.endswith(("attention.out.weight", "reduce.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * DEPTH) if writes else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[-1] > CONTEXT:
            raise ValueError(f"the context is {CONTEXT} tokens, got {tuple(tokens.shape)}")
        places = torch.arange(tokens.shape[-1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(places))))
