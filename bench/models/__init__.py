"""The networks that runs and timings use, by name.

Convolutional networks are in the CIFAR form (3x3 or 1x1 stem of stride 1, 32x32 images) that RMSGD's authors
train. Those with "-imagenet" are as published for 224x224. `bench.models.build("resnet18")` makes a network.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from bench.errors import UsageError
from bench.models import efficientnet, gpt, mobilenet, resnet, resnext, senet, shufflenet, vit
from bench.names import look_up


@dataclass(frozen=True)
class Architecture:
    """How a network is made, and what it reads.

    Attributes:
        create: makes the network from classes, in_channels (images only) and width.
        sample: shape of one sample: (channels, height, width), or (length,) for tokens.
        classes: number of logits unless the caller wants another.
        any_size: whether images of another height and width can be read too.

    """

    create: Callable[..., nn.Module]
    sample: tuple[int, ...] = (3, 32, 32)
    classes: int = 10
    any_size: bool = True

    @property
    def reads_tokens(self) -> bool:
        return len(self.sample) == 1

    def accepts(self, sample: tuple[int, ...]) -> bool:
        """Whether samples of this shape can be read, given the right number of input channels."""
        return len(sample) == len(self.sample) and (self.any_size or sample[1:] == self.sample[1:])


ARCHITECTURES: dict[str, Architecture] = {
    "resnet14-digits": Architecture(resnet.resnet14_digits, sample=(1, 8, 8)),
    "resnet8-stride2": Architecture(resnet.resnet8_stride2),
    "resnet18": Architecture(resnet.resnet18),
    "resnet34": Architecture(resnet.resnet34),
    "resnet50": Architecture(resnet.resnet50),
    "resnet101": Architecture(resnet.resnet101),
    "resnext29": Architecture(resnext.resnext29_1x64d),
    "resnext29-2x64d": Architecture(resnext.resnext29_2x64d),
    "mobilenetv2": Architecture(mobilenet.MobileNetV2),
    "senet18": Architecture(senet.SENet18),
    "efficientnetb0": Architecture(efficientnet.EfficientNetB0),
    "shufflenetv2": Architecture(shufflenet.shufflenetv2_1_5x),
    "shufflenetv2-1x": Architecture(shufflenet.shufflenetv2_1x),
    "resnet18-imagenet": Architecture(resnet.resnet18_imagenet, (3, 224, 224), 1000),
    "resnet34-imagenet": Architecture(resnet.resnet34_imagenet, (3, 224, 224), 1000),
    "resnet50-imagenet": Architecture(resnet.resnet50_imagenet, (3, 224, 224), 1000),
    "mobilenetv2-imagenet": Architecture(mobilenet.MobileNetV2ImageNet, (3, 224, 224), 1000),
    "vit-b16": Architecture(vit.VisionTransformer, (3, vit.IMAGE, vit.IMAGE), 1000, any_size=False),
    "gpt": Architecture(gpt.GPT, sample=(gpt.CONTEXT,), classes=65),
    "gpt2": Architecture(gpt.gpt2, sample=(gpt.CONTEXT,), classes=50_257),
}


def architecture(name: str) -> Architecture:
    """The architecture called `name`; raises UsageError with a suggestion when there is none."""
    return look_up("model", name, ARCHITECTURES)


def build(
    name: str, classes: int | None = None, in_channels: int | None = None, width: float = 1.0
) -> nn.Module:
    """Makes the network called `name`, with fresh weights from torch's global generator.

    Args:
        name: a key of `ARCHITECTURES`.
        classes: number of logits (the vocabulary of a GPT); the architecture's own by default.
        in_channels: channels of the images; the architecture's own by default.
        width: factor on every channel count, which is rounded so that the architecture can split it.

    Raises:
        UsageError: the name is unknown, or a count or width is not positive.

    """
    known = architecture(name)
    options: dict[str, float] = {"classes": known.classes if classes is None else classes, "width": width}
    if not known.reads_tokens:
        options["in_channels"] = known.sample[0] if in_channels is None else in_channels
    elif in_channels is not None:
        raise UsageError(f"{name} reads tokens: in_channels must be left out, got {in_channels}")
    for option, value in options.items():
        if not value > 0:
            raise UsageError(f"{option} must be positive, got {value}")
    return known.create(**options)
