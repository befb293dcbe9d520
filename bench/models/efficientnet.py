"""EfficientNet-B0 for 32x32 images (Tan and Le, ICML 2019), without the 1280-channel head."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.blocks import conv, scaled, strides

# expansion, channels, blocks, kernel, stride of the first block
STAGES = (
    (1, 16, 1, 3, 1),
    (6, 24, 2, 3, 2),
    (6, 40, 2, 5, 2),
    (6, 80, 3, 3, 2),
    (6, 112, 3, 5, 1),
    (6, 192, 4, 5, 2),
    (6, 320, 1, 3, 1),
)
DROPOUT = 0.2
DROP_CONNECT = 0.2


class Block(nn.Module):
    """A block that expands, filters every channel separately, weighs the channels, and reduces."""

    def __init__(
        self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int, drop: float
    ) -> None:
        super().__init__()
        planes, squeezed = inputs * expansion, max(1, inputs // 4)
        self.expands = expansion > 1
        self.residual = stride == 1 and inputs == outputs
        self.drop = drop
        if self.expands:
            self.conv1 = conv(inputs, planes, 1)
            self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, kernel, stride, groups=planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.fc1 = nn.Conv2d(planes, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, planes, 1)
        self.conv3 = conv(planes, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out = F.silu(self.bn1(self.conv1(x))) if self.expands else x
        out = F.silu(self.bn2(self.conv2(out)))
        weight = self.fc2(F.silu(self.fc1(out.mean((2, 3), keepdim=True)))).sigmoid()
        out = self.bn3(self.conv3(out * weight))
        if not self.residual:
            return out
        if self.training and self.drop:
            kept = torch.rand(len(out), 1, 1, 1, device=out.device, dtype=out.dtype) >= self.drop
            out = out * kept / (1 - self.drop)
        return out + x


class EfficientNetB0(nn.Module):
    """Images (batch, in_channels, 32, 32) to logits (batch, classes)."""

    def __init__(self, classes: int, in_channels: int, width: float) -> None:
        super().__init__()
        channels = scaled(32, width)
        self.conv1 = conv(in_channels, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        total = sum(count for _, _, count, _, _ in STAGES)
        blocks: list[nn.Module] = []
        for expansion, planes, count, kernel, first in STAGES:
            outputs = scaled(planes, width)
            for stride in strides(first, count):
                drop = DROP_CONNECT * len(blocks) / total
                blocks.append(Block(channels, outputs, expansion, kernel, stride, drop))
                channels = outputs
        self.layers = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(DROPOUT)
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(F.silu(self.bn1(self.conv1(x))))
        return self.linear(self.dropout(out.mean((2, 3))))
