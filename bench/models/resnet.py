"""ResNets (He et al., CVPR 2016), with a 3x3 stem for small images, else with a 7x7 stem and pooling."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.blocks import conv, projection, scaled, strides


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(inputs, planes, 3, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = projection(inputs, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int, groups: int = 1) -> None:
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


class ResNet(nn.Module):
    """Residual network for images (batch, in_channels, height, width) to logits (batch, classes).

    Args:
        block: `BasicBlock` or `Bottleneck`.
        blocks: blocks per stage; every stage after the first halves the image.
        planes: channels of the first stage, doubled by every later one.
        classes: number of logits.
        in_channels: channels of the images.
        width: factor on every channel count inside.
        large: whether the stem reduces the image four times, for images of 224x224.
        stem_stride: the stride of the first convolution where the stem is not large.

    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: Sequence[int],
        planes: int,
        classes: int,
        in_channels: int,
        width: float,
        large: bool = False,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        channels = scaled(planes, width)
        kernel, stride = (7, 2) if large else (3, stem_stride)
        self.conv1 = conv(in_channels, channels, kernel, stride)
        self.pool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        self.bn1 = nn.BatchNorm2d(channels)
        stages = []
        for index, count in enumerate(blocks):
            stage = []
            stage_planes = scaled(planes << index, width)
            for stride in strides(1 if index == 0 else 2, count):
                stage.append(block(channels, stage_planes, stride))
                channels = stage_planes * block.expansion
            stages.append(nn.Sequential(*stage))
        self.layers = nn.Sequential(*stages)
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(self.pool(F.relu(self.bn1(self.conv1(x)))))
        return self.linear(out.mean((2, 3)))


def resnet18(classes: int, in_channels: int, width: float) -> ResNet:
    return ResNet(BasicBlock, (2, 2, 2, 2), 64, classes, in_channels, width)


def resnet34(classes: int, in_channels: int, width: float) -> ResNet:
    return ResNet(BasicBlock, (3, 4, 6, 3), 64, classes, in_channels, width)


def resnet50(classes: int, in_channels: int, width: float) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), 64, classes, in_channels, width)


def resnet101(classes: int, in_channels: int, width: float) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 23, 3), 64, classes, in_channels, width)


def resnet18_imagenet(classes: int, in_channels: int, width: float) -> ResNet:
    return ResNet(BasicBlock, (2, 2, 2, 2), 64, classes, in_channels, width, large=True)


def resnet34_imagenet(classes: int, in_channels: int, width: float) -> ResNet:
    return ResNet(BasicBlock, (3, 4, 6, 3), 64, classes, in_channels, width, large=True)


def resnet50_imagenet(classes: int, in_channels: int, width: float) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), 64, classes, in_channels, width, large=True)


def resnet14_digits(classes: int, in_channels: int, width: float) -> ResNet:
    """The 6n + 2 layers of He et al., section 4.2, with n = 2: stages of 16, 32 and 64 channels."""
    return ResNet(BasicBlock, (2, 2, 2), 16, classes, in_channels, width)


def resnet8_stride2(classes: int, in_channels: int, width: float) -> ResNet:
    """The 6n + 2 layers of He et al., section 4.2, with n = 1, on images halved by the first convolution.

    On CIFAR an epoch takes half a minute of one CPU core.
    """
    return ResNet(BasicBlock, (1, 1, 1), 16, classes, in_channels, width, stem_stride=2)
