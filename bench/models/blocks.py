"""Pieces that the convolutional families share."""

from torch import nn


def scaled(channels: int, width: float, multiple: int = 8) -> int:
    """`channels` times `width`, rounded to a multiple that every family can split; never 0."""
    return channels if width == 1 else max(multiple, round(channels * width / multiple) * multiple)


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution that keeps the image size at stride 1. It has no bias, since a norm layer follows."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """The shortcut of a residual block: empty where shapes agree, else a 1x1 convolution and a norm."""
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


def strides(first: int, blocks: int) -> list[int]:
    """The stride of every block in a stage, of which only the first reduces the image."""
    return [first] + [1] * (blocks - 1)
