"""Random crops, flips and holes for a whole batch at once, on the device that it is on."""

import torch
from torch import Tensor


def crop_and_flip(images: Tensor, pad: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Every image moved by up to `pad` pixels each way, zeros following, and mirrored by even odds.

    Args:
        images: (n, channels, height, width), any type.
        pad: most pixels to move by.
        flip: whether to mirror; some images, digits among them, mean something else then.
        generator: on the images' device.

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
    """One square hole of zeros per image (DeVries and Taylor, 2017), its centre anywhere in the image.

    Args:
        images: (n, channels, height, width), normalised: zero is the mean. Changed in place.
        size: side of the hole, of which a part may lie outside.
        generator: on the images' device.

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
