"""The blocks that the vision transformer and the GPT share: pre-norm, with heads of 64 channels."""

import torch.nn.functional as F
from torch import Tensor, nn

HEAD = 64


class Attention(nn.Module):
    """Multi-head self-attention on (batch, length, dim)."""

    def __init__(self, dim: int, *, bias: bool, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.qkv = nn.Linear(dim, 3 * dim, bias)
        self.out = nn.Linear(dim, dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        query, key, value = self.qkv(x).view(batch, length, 3, dim // HEAD, HEAD).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out(out.transpose(1, 2).reshape(batch, length, dim))


class Block(nn.Module):
    """Attention, then an MLP of four times the width. Each reads through a norm and adds to its input."""

    def __init__(self, dim: int, *, bias: bool = True, causal: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps, bias=bias)
        self.attention = Attention(dim, bias=bias, causal=causal)
        self.norm2 = nn.LayerNorm(dim, eps, bias=bias)
        self.expand = nn.Linear(dim, 4 * dim, bias)
        self.reduce = nn.Linear(4 * dim, dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.reduce(F.gelu(self.expand(self.norm2(x))))
