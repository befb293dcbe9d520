"""Random crops, flips and holes for a whole batch at once, on its own device."""

import torch
from torch import Tensor


def crop_and_flip(images: Tensor, pad: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Moves every image by up to `pad` pixels, fills with zeros, and mirrors it with probability 1/2.

    Args:
        images: (n, channels, height, width), any type.
        pad: the most pixels to move by.
        flip: whether to mirror; mirrored, some images such as digits would mean something else.
        generator: a generator on the images' device.

    Returns:
        A new tensor of the same shape and type.

    """
    n, channels, height, width = images.shape
    device = images.device

    def draw(high: int) -> Tensor:
        return torch.randint(high, (n, 1), generator=generator, device=device)

    rows = torch.arange(height, device=device) + draw(2 * pad + 1)
    columns = torch.arange(width, device=device)
    if flip:
        columns = torch.where(draw(2) == 1, columns.flip(0), columns)
    columns = columns + draw(2 * pad + 1)
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    index = torch.arange(n, device=device).view(n, 1, 1, 1)
    channel = torch.arange(channels, device=device).view(1, channels, 1, 1)
    return padded[index, channel, rows.view(n, 1, height, 1), columns.view(n, 1, 1, width)]


def cutout(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Sets a square hole in every image to zero (DeVries and Taylor, 2017), its centre anywhere in the image.

    Args:
        images: (n, channels, height, width), normalised, so that zero is the mean; changed in place.
        size: the side of the hole in pixels; a part of the hole may lie outside of the image.
        generator: a generator on the images' device.

    Returns:
        `images`.

    """
    n, _, height, width = images.shape
    device = images.device

    def inside(length: int) -> Tensor:
        centre = torch.randint(length, (n, 1), generator=generator, device=device)
        place = torch.arange(length, device=device)
        return (place >= centre - size // 2) & (place < centre - size // 2 + size)

    hole = inside(height).view(n, 1, height, 1) & inside(width).view(n, 1, 1, width)
    return images.masked_fill_(hole, 0.0)
