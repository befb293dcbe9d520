"""SENet-18 for 32x32 images (Hu et al., CVPR 2018): pre-activation blocks that weigh their channels."""

import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.blocks import conv, scaled, strides


class Block(nn.Module):
    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        squeezed = max(1, planes // 16)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv(inputs, planes, 3, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes)
        self.shortcut = None if stride == 1 and inputs == planes else conv(inputs, planes, 1, stride)
        self.fc1 = nn.Conv2d(planes, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, planes, 1)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        weight = self.fc2(F.relu(self.fc1(out.mean((2, 3), keepdim=True)))).sigmoid()
        return out * weight + (x if self.shortcut is None else self.shortcut(active))


class SENet18(nn.Module):
    """Images (batch, in_channels, 32, 32) to logits (batch, classes)."""

    def __init__(self, classes: int, in_channels: int, width: float) -> None:
        super().__init__()
        channels = scaled(64, width)
        self.conv1 = conv(in_channels, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        blocks = []
        for index in range(4):
            planes = scaled(64 << index, width)
            for stride in strides(1 if index == 0 else 2, 2):
                blocks.append(Block(channels, planes, stride))
                channels = planes
        self.layers = nn.Sequential(*blocks)
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.linear(out.mean((2, 3)))
