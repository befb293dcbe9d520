"""ResNeXt-29 for 32x32 images (Xie et al., CVPR 2017)."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.blocks import conv, projection, scaled, strides


class Block(nn.Module):
    expansion = 2

    def __init__(self, inputs: int, planes: int, groups: int, stride: int) -> None:
        super().__init__()
        outputs = planes * self.expansion
        self.conv1 = conv(inputs, planes, 1)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3, stride, groups)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = conv(planes, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class ResNeXt29(nn.Module):
    """Three stages of three blocks with `groups` groups of 64 channels, after a 1x1 stem.

    RMSGD's authors train the form with one group, which is what `resnext29` builds.
    """

    def __init__(self, classes: int, in_channels: int, width: float, *, groups: int) -> None:
        super().__init__()
        channels = scaled(64, width)
        self.conv1 = conv(in_channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        stages = []
        for index in range(3):
            stage = []
            planes = groups * scaled(64 << index, width)
            for stride in strides(1 if index == 0 else 2, 3):
                stage.append(Block(channels, planes, groups, stride))
                channels = planes * Block.expansion
            stages.append(nn.Sequential(*stage))
        self.layers = nn.Sequential(*stages)
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.linear(out.mean((2, 3)))


resnext29_1x64d = partial(ResNeXt29, groups=1)
resnext29_2x64d = partial(ResNeXt29, groups=2)
