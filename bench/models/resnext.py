"""ResNeXt-29 for 32x32 images (Xie et al., CVPR 2017)."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.blocks import conv, scaled, strides
from bench.models.resnet import Bottleneck


class Block(Bottleneck):
    expansion = 2


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
                stage.append(Block(channels, planes, stride, groups))
                channels = planes * Block.expansion
            stages.append(nn.Sequential(*stage))
        self.layers = nn.Sequential(*stages)
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.linear(out.mean((2, 3)))


resnext29_1x64d = partial(ResNeXt29, groups=1)
resnext29_2x64d = partial(ResNeXt29, groups=2)
