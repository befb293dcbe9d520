"""ShuffleNetV2 for 32x32 images (Ma et al., ECCV 2018), with a 3x3 stem of stride 1 and no pooling."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.blocks import conv, scaled

# From network size to the channels of the three stages and of the last convolution.
SIZES = {1.0: (116, 232, 464, 1024), 1.5: (176, 352, 704, 1024)}
BLOCKS = (3, 7, 3)  # per stage, after the block that reduces the image


def branch(inputs: int, planes: int, stride: int) -> nn.Sequential:
    """A 1x1 convolution, a 3x3 convolution of every channel separately, and a 1x1 convolution."""
    return nn.Sequential(
        conv(inputs, planes, 1),
        nn.BatchNorm2d(planes),
        nn.ReLU(),
        conv(planes, planes, 3, stride, groups=planes),
        nn.BatchNorm2d(planes),
        conv(planes, planes, 1),
        nn.BatchNorm2d(planes),
        nn.ReLU(),
    )


class DownBlock(nn.Module):
    """Two branches of stride 2 side by side."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        planes = outputs // 2
        self.left = nn.Sequential(
            conv(inputs, inputs, 3, 2, groups=inputs),
            nn.BatchNorm2d(inputs),
            conv(inputs, planes, 1),
            nn.BatchNorm2d(planes),
            nn.ReLU(),
        )
        self.right = branch(inputs, planes, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.channel_shuffle(torch.cat((self.left(x), self.right(x)), 1), 2)


class Block(nn.Module):
    """Half of the channels pass through; the other half takes the branch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.right = branch(channels // 2, channels // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return F.channel_shuffle(torch.cat((left, self.right(right)), 1), 2)


class ShuffleNetV2(nn.Module):
    """Images (batch, in_channels, 32, 32) to logits (batch, classes).

    RMSGD's authors train size 1.5, which is what `shufflenetv2` builds.
    """

    def __init__(self, classes: int, in_channels: int, width: float, *, size: float) -> None:
        super().__init__()
        *planes, features = (scaled(channels, width) for channels in SIZES[size])
        channels = scaled(24, width)
        self.conv1 = conv(in_channels, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        stages = []
        for outputs, count in zip(planes, BLOCKS, strict=True):
            blocks = [Block(outputs) for _ in range(count)]
            stages.append(nn.Sequential(DownBlock(channels, outputs), *blocks))
            channels = outputs
        self.layers = nn.Sequential(*stages)
        self.conv2 = conv(channels, features, 1)
        self.bn2 = nn.BatchNorm2d(features)
        self.linear = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(F.relu(self.bn1(self.conv1(x))))
        out = F.relu(self.bn2(self.conv2(out)))
        return self.linear(out.mean((2, 3)))


shufflenetv2_1x = partial(ShuffleNetV2, size=1.0)
shufflenetv2_1_5x = partial(ShuffleNetV2, size=1.5)
