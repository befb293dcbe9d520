"""The benchmark networks are the published ones, by parameter count, and can be trained."""

import pytest
import torch

from bench import models

# kuangliu/pytorch-cifar's forms, which the authors train, and torchvision's forms for ImageNet.
# EfficientNet-B0: that repository's 3,599,686 include a first expansion (1,088) that is never used.
# ResNeXt-29 1x64d and ShuffleNetV2 1.5x are the sizes in the authors' code: counted from its layers.
PUBLISHED = {
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "resnet50": 23_520_842,
    "resnet101": 42_512_970,
    "resnext29": 3_458_634,
    "resnext29-2x64d": 9_128_778,
    "mobilenetv2": 2_296_922,
    "senet18": 11_260_354,
    "efficientnetb0": 3_599_686 - 1_088,
    "shufflenetv2": 2_488_874,
    "shufflenetv2-1x": 1_263_854,
    "resnet18-imagenet": 11_689_512,
    "resnet34-imagenet": 21_797_672,
    "resnet50-imagenet": 25_557_032,
    "mobilenetv2-imagenet": 3_504_872,
    "vit-b16": 86_567_656,
    # nanoGPT's 10,646,784 for six layers of 384, 65 characters and no biases leave out positions.
    "gpt": 10_646_784 + 256 * 384,
    "gpt2": 124_439_808,
}
# He et al. report 0.27 M for n = 3 (20 layers) with three input channels.
UNPUBLISHED = {"resnet14-digits": 174_970, "resnet8-stride2": 78_042}


def parameters(name, **options):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in models.build(name, **options).parameters())


def samples(name, batch):
    known = models.architecture(name)
    if known.reads_tokens:
        return torch.randint(known.classes, (batch, *known.sample))
    return torch.randn(batch, *known.sample)


@pytest.mark.parametrize(("name", "count"), (PUBLISHED | UNPUBLISHED).items())
def test_the_parameter_count_is_the_published_one(name, count):
    assert parameters(name) == count


def test_every_network_has_its_count_written_down():
    assert set(models.ARCHITECTURES) == set(PUBLISHED | UNPUBLISHED)


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_one_backward_pass_reaches_every_parameter(name):
    torch.manual_seed(0)
    network = models.build(name, width=0.25)
    logits = network(samples(name, 2))
    assert logits.shape[-1] == models.architecture(name).classes
    logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())


@pytest.mark.parametrize("name", ["resnet18", "resnext29", "shufflenetv2", "vit-b16"])
def test_the_full_width_reads_one_sample(name):
    network = models.build(name).eval()
    with torch.no_grad():
        assert network(samples(name, 1)).shape == (1, models.architecture(name).classes)


def test_the_gpt_ties_its_embedding_to_its_head():
    network = models.build("gpt", width=0.25)
    assert network.head.weight is network.tokens.weight


def test_the_gpt_cannot_see_the_future():
    network = models.build("gpt", width=0.25).eval()
    tokens = samples("gpt", 1)
    changed = tokens.clone()
    changed[0, 100:] = 0
    with torch.no_grad():
        before, after = network(tokens)[0, :100], network(changed)[0, :100]
    torch.testing.assert_close(before, after)


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_half_the_width_is_well_under_half_the_parameters(name):
    assert parameters(name, width=0.5) < parameters(name) * 0.45


def test_classes_channels_and_width_are_the_callers():
    network = models.build("resnet18", classes=7, in_channels=1, width=0.25)
    assert network(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert network.conv1.weight.shape == (16, 1, 3, 3)


def test_an_unknown_name_is_answered_with_the_nearest_and_the_list():
    with pytest.raises(ValueError, match=r"unknown model 'resnet81'. Did you mean 'resnet\d+'") as caught:
        models.build("resnet81")
    assert all(name in str(caught.value) for name in models.ARCHITECTURES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet18", "width": 0.0}, "width must be positive"),
        ({"name": "resnet18", "width": float("nan")}, "width must be positive"),
        ({"name": "resnet18", "classes": 0}, "classes must be positive"),
        ({"name": "gpt", "in_channels": 3}, "gpt reads tokens"),
    ],
)
def test_a_network_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        models.build(**options)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="224x224"):
        models.build("vit-b16", width=0.1)(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="context is 256"):
        models.build("gpt", width=0.1)(torch.zeros(1, 300, dtype=torch.int64))
