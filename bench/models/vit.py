"""ViT-B/16 for 224x224 images (Dosovitskiy et al., ICLR 2021)."""

import torch
from torch import Tensor, nn

from bench.models.blocks import scaled
from bench.models.transformer import HEAD, Block

DEPTH, DIM, IMAGE, PATCH = 12, 768, 224, 16


class VisionTransformer(nn.Module):
    """Images (batch, in_channels, 224, 224) to logits (batch, classes).

    Weights are drawn from a normal distribution of standard deviation .02. Biases and the class token begin
    at zero.
    """

    def __init__(self, classes: int, in_channels: int, width: float) -> None:
        super().__init__()
        dim = scaled(DIM, width, HEAD)
        self.patches = nn.Conv2d(in_channels, dim, PATCH, PATCH)
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.empty(1, (IMAGE // PATCH) ** 2 + 1, dim).normal_(std=0.02))
        self.blocks = nn.Sequential(*(Block(dim, eps=1e-6) for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(dim, 1e-6)
        self.head = nn.Linear(dim, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (IMAGE, IMAGE):
            raise ValueError(f"ViT-B/16 takes {IMAGE}x{IMAGE} images, got {tuple(x.shape)}")
        patches = self.patches(x).flatten(2).transpose(1, 2)
        out = torch.cat((self.token.expand(len(x), -1, -1), patches), 1) + self.positions
        return self.head(self.norm(self.blocks(out))[:, 0])
