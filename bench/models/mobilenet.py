"""MobileNetV2 (Sandler et al., CVPR 2018), as published, and for 32x32 images, where early strides are 1."""

import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.blocks import conv, projection, scaled, strides

# expansion, channels, blocks, stride of the first block: the paper's Table 2
STAGES_IMAGENET = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), *STAGES_IMAGENET[2:])
"""The settings for 32x32 images, which leave the first reduction out."""


class Block(nn.Module):
    """A block that expands, filters every channel separately, and reduces. At stride 1 it has a shortcut."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        planes = inputs * expansion
        self.conv1 = conv(inputs, planes, 1)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3, stride, groups=planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = conv(planes, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = projection(inputs, outputs, 1) if stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return out if self.shortcut is None else out + self.shortcut(x)


class MobileNetV2(nn.Module):
    """Images (batch, in_channels, 32, 32) to logits (batch, classes)."""

    def __init__(self, classes: int, in_channels: int, width: float) -> None:
        super().__init__()
        channels, features = scaled(32, width), scaled(1280, width)
        self.conv1 = conv(in_channels, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        blocks = []
        for expansion, planes, count, first in STAGES:
            outputs = scaled(planes, width)
            for stride in strides(first, count):
                blocks.append(Block(channels, outputs, expansion, stride))
                channels = outputs
        self.layers = nn.Sequential(*blocks)
        self.conv2 = conv(channels, features, 1)
        self.bn2 = nn.BatchNorm2d(features)
        self.linear = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(F.relu(self.bn1(self.conv1(x))))
        out = F.relu(self.bn2(self.conv2(out)))
        return self.linear(out.mean((2, 3)))


def _norm(channels: int, activation: bool = True) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels), *([nn.ReLU6(inplace=True)] if activation else [])]


class InvertedResidual(nn.Module):
    """The published block: it does not expand at expansion 1, and its shortcut never has weights."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        planes = inputs * expansion
        expand = [conv(inputs, planes, 1), *_norm(planes)] if expansion > 1 else []
        self.layers = nn.Sequential(
            *expand,
            conv(planes, planes, 3, stride, groups=planes),
            *_norm(planes),
            conv(planes, outputs, 1),
            *_norm(outputs, activation=False),
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(x)
        return x + out if self.shortcut else out


class MobileNetV2ImageNet(nn.Module):
    """Images (batch, in_channels, 224, 224) to logits (batch, classes)."""

    def __init__(self, classes: int, in_channels: int, width: float) -> None:
        super().__init__()
        channels, features = scaled(32, width), scaled(1280, width)
        layers: list[nn.Module] = [conv(in_channels, channels, 3, 2), *_norm(channels)]
        for expansion, planes, count, first in STAGES_IMAGENET:
            outputs = scaled(planes, width)
            for stride in strides(first, count):
                layers.append(InvertedResidual(channels, outputs, expansion, stride))
                channels = outputs
        self.layers = nn.Sequential(*layers, conv(channels, features, 1), *_norm(features))
        self.dropout = nn.Dropout(0.2)
        self.linear = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.dropout(self.layers(x).mean((2, 3))))
