"""GPTs whose head is tied to the embedding: a small one, and the smallest GPT-2."""

import math

import torch
from torch import Tensor, nn

from bench.models.blocks import scaled
from bench.models.transformer import HEAD, Block

DEPTH, DIM, CONTEXT = 6, 384, 256


class GPT(nn.Module):
    """Tokens (batch, length), int64, to logits of the next token (batch, length, classes).

    As it is, it has six layers of 384 channels without biases, and reads up to 256 characters. Weights are
    drawn from a normal distribution of standard deviation .02. Those that write to the residual stream are
    divided by sqrt(2 x layers), as in GPT-2.
    """

    def __init__(
        self,
        classes: int,
        width: float,
        *,
        depth: int = DEPTH,
        dim: int = DIM,
        context: int = CONTEXT,
        bias: bool = False,
    ) -> None:
        super().__init__()
        dim = scaled(dim, width, HEAD)
        self.tokens = nn.Embedding(classes, dim)
        self.positions = nn.Embedding(context, dim)
        self.blocks = nn.Sequential(*(Block(dim, bias=bias, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, bias=bias)
        self.head = nn.Linear(dim, classes, bias=False)
        self.head.weight = self.tokens.weight
        for name, weight in self.named_parameters():
            if weight.ndim > 1:
                writes = name.endswith(("attention.out.weight", "reduce.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * depth) if writes else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, tokens: Tensor) -> Tensor:
        context = self.positions.num_embeddings
        if tokens.shape[-1] > context:
            raise ValueError(f"the context is {context} tokens, got {tuple(tokens.shape)}")
        places = torch.arange(tokens.shape[-1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(places))))


def gpt2(classes: int, width: float) -> GPT:
    """The smallest GPT-2: twelve layers of 768 channels with biases, which read up to 1024 tokens."""
    return GPT(classes, width, depth=12, dim=768, context=1024, bias=True)
