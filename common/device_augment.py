"""Augmentation on the device, a batch at a time: each operation once for all the images that drew it.

What an image gets is its plan, drawn where it is read (`common.fast`). The operations are PIL's as timm calls them,
down to how they round, so that the images of `--input fast` are distributed as those of `--input pil`:
https://github.com/python-pillow/Pillow/tree/12.3.0/src/libImaging (Geometry.c, Blend.c, BoxBlur.c, Filter.c).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

NUMBERS = 6  # of an operation, at most
BLUR_PASSES = 3


class Raw(NamedTuple):
    """Images before augmentation, and what becomes of them.

    Args:
        pixels: (3, H, W), or (B, 3, H, W) of a batch, uint8.
        plan: (layers, 1 + NUMBERS), or (B, layers, 1 + NUMBERS), float32: the place in `OPERATIONS` of what is done
            in each layer, and its numbers. It stays on the host.
    """

    pixels: Tensor
    plan: Tensor


def nothing(images: Tensor, numbers: Tensor) -> Tensor:
    """A layer of an image that drew fewer operations than others."""
    return images


def hflip(images: Tensor, numbers: Tensor) -> Tensor:
    return images.flip(-1)


def vflip(images: Tensor, numbers: Tensor) -> Tensor:
    return images.flip(-2)


def invert(images: Tensor, numbers: Tensor) -> Tensor:
    return 255 - images


def posterize(images: Tensor, numbers: Tensor) -> Tensor:
    """numbers: bits to keep, 0 to 7."""
    return images & (256 - 2 ** (8 - column(numbers, 0))).to(torch.uint8)


def solarize(images: Tensor, numbers: Tensor) -> Tensor:
    """numbers: grey level from which on pixels are inverted, 0 to 256."""
    return torch.where(images < column(numbers, 0), images, 255 - images)


def solarize_add(images: Tensor, numbers: Tensor) -> Tensor:
    """numbers: what is added to pixels below 128."""
    brighter = (images + column(numbers, 0)).clamp(max=255).to(torch.uint8)
    return torch.where(images < 128, brighter, images)


def auto_contrast(images: Tensor, numbers: Tensor) -> Tensor:
    """By a table in float64, as PIL's, since a product that should be whole may end just below."""
    least, most = (extreme(images.flatten(2), dim=2, keepdim=True).double() for extreme in (torch.amin, torch.amax))
    levels = torch.arange(256, dtype=torch.float64, device=images.device)
    scale = 255 / (most - least).clamp(min=1)
    table = (levels * scale - least * scale).clamp(0, 255)
    table = torch.where(most > least, table, levels).to(torch.uint8)
    return table.gather(2, images.flatten(2).long()).view_as(images)


def equalize(images: Tensor, numbers: Tensor) -> Tensor:
    return vision.equalize(images)


def brightness(images: Tensor, numbers: Tensor) -> Tensor:
    """numbers: factor; at 0 the image is black, at 1 unchanged."""
    return blend(torch.zeros_like(images[:, :1]), images, numbers)


def color(images: Tensor, numbers: Tensor) -> Tensor:
    """numbers: factor; at 0 the image is grey, at 1 unchanged."""
    return blend(grey(images), images, numbers)


def contrast(images: Tensor, numbers: Tensor) -> Tensor:
    """numbers: factor; at 0 the image is its mean grey level, at 1 unchanged."""
    mean = (grey(images).double().mean((1, 2, 3), keepdim=True) + 0.5).floor()
    return blend(mean, images, numbers)


def sharpness(images: Tensor, numbers: Tensor) -> Tensor:
    """numbers: factor; at 0 the image is smoothed by a 3x3 kernel whose centre weighs five times, at 1 unchanged."""
    values = images.float()
    rows = values[..., :-2, :] + values[..., 1:-1, :] + values[..., 2:, :]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * values[..., 1:-1, 1:-1]
    smooth = values.clone()  # the border stays
    smooth[..., 1:-1, 1:-1] = (sums / 13 + 0.5).floor()
    return blend(smooth, images, numbers)


def gaussian_blur(images: Tensor, numbers: Tensor) -> Tensor:
    """numbers: standard deviation in pixels, at most 2.

    PIL's: box blurs of fractional width, three along each row and then three along each column, rounded after each
    (Gwosdek et al. 2011, Theoretical Foundations of Gaussian Convolution by Extended Box Filtering).
    """
    variance = numbers[:, 0] * numbers[:, 0] / BLUR_PASSES
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) * (whole + 1)))
    # 32 bits of fixed point, of which the highest 8 are the grey level; a sum may reach the sign, which goes again
    inner = (2**24 / (2 * (whole + part) + 1)).int()
    outer = ((2**24 - (2 * whole.int() + 1) * inner) / 2).int()
    weights = [torch.where(whole >= k, inner, torch.where(whole + 1 >= k, outer, 0)) for k in range(3)]
    centre, near, far = (weight.view(-1, 1, 1, 1) for weight in weights)
    values = images.int()
    for dim in (3, 2):
        size = values.shape[dim]
        for _ in range(BLUR_PASSES):
            first, last = values.narrow(dim, 0, 1), values.narrow(dim, size - 1, 1)
            padded = torch.cat([first, first, values, last, last], dim)  # F.pad's replicate is for floats on a GPU
            a, b, c, d, e = (padded.narrow(dim, k, size) for k in range(5))
            values = (centre * c + near * (b + d) + far * (a + e) + 2**23) >> 24 & 255
    return values.to(torch.uint8)


def column(numbers: Tensor, place: int) -> Tensor:
    """numbers: (n, NUMBERS) → one of them for each image, (n, 1, 1, 1)."""
    return numbers[:, place].view(-1, 1, 1, 1)


def grey(images: Tensor) -> Tensor:
    """ITU-R 601-2 luma, (n, 1, H, W), whole numbers in float32, in PIL's fixed point."""
    red, green, blue = images.float().unbind(1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 32768) / 65536).floor().unsqueeze(1)


def blend(degenerate: Tensor, images: Tensor, numbers: Tensor) -> Tensor:
    """From a degenerate image, at factor 0, to the image, at 1, and beyond; PIL cuts off what is behind the point."""
    start = degenerate.float()
    return (start + column(numbers, 0) * (images.float() - start)).clamp(0, 255).to(torch.uint8)


def between_two(pixels: Sequence[Tensor], d: Tensor) -> Tensor:
    """Linear. pixels: each (n, 3, H, W), in order; d: (n, 1, H, W), from the one before."""
    a, b = pixels
    return a + (b - a) * d


def between_four(pixels: Sequence[Tensor], d: Tensor) -> Tensor:
    """Cubic, with a = -1, which in PIL is that of Image.transform alone; as `between_two`.

    By differences from one of the pixels: where all are alike the result is they, which weights whose rounded sum is
    below 1 would miss.
    """
    before, a, b, after = pixels
    e = 1 - d
    return a + (before - a) * (-d * e * e) + (b - a) * (d + d * d * e) + (after - a) * (-d * d * e)


def nearest(pixels: Sequence[Tensor], d: Tensor) -> Tensor:
    """As `between_two`."""
    return pixels[0]


class Filter(NamedTuple):
    """How a pixel is made of those around a position along an axis.

    Args:
        offsets: of the pixels that count, from the one whose centre (or, of the nearest, whose edge) is before.
        centre: of a pixel, 0.5, or 0 where its edges count.
        mix: of so many pixels and the distance from the one before.
    """

    offsets: Sequence[int]
    centre: float
    mix: Callable[[Sequence[Tensor], Tensor], Tensor]


def affine(images: Tensor, numbers: Tensor, filtering: Filter, fill: Tensor) -> Tensor:
    """Each pixel comes from where numbers = (a, b, c, d, e, f) say, (ax + by + c, dx + ey + f), or is `fill` where
    that is outside. Pixels' centres are at halves.

    torch's grid_sample would do, but for its cubic, which has a = -0.75.
    """
    n, channels, height, width = images.shape
    x = torch.arange(width, device=images.device) + 0.5
    y = torch.arange(height, device=images.device).unsqueeze(1) + 0.5
    a, b, c, d, e, f = (column(numbers, k).squeeze(1) for k in range(NUMBERS))
    across, down = a * x + b * y + c, d * x + e * y + f  # (n, H, W)
    inside = (across >= 0) & (across < width) & (down >= 0) & (down < height)
    left, top = ((position - filtering.centre).floor() for position in (across, down))
    beyond, below = (
        (position - filtering.centre - before).unsqueeze(1) for position, before in ((across, left), (down, top))
    )
    columns = [(left.long() + k).clamp(0, width - 1) for k in filtering.offsets]
    pixels = images.flatten(2)
    lines = []
    for k in filtering.offsets:
        row = (top.long() + k).clamp(0, height - 1) * width
        indices = ((row + at).view(n, 1, -1).expand(n, channels, -1) for at in columns)
        lines.append(filtering.mix([pixels.gather(2, index).view_as(images).float() for index in indices], beyond))
    values = filtering.mix(lines, below).clamp(0, 255).to(torch.uint8)  # PIL cuts off what is behind the point
    return torch.where(inside.unsqueeze(1), values, fill)


AFFINE = {
    "nearest": Filter((0,), 0.0, nearest),
    "bilinear": Filter((0, 1), 0.5, between_two),
    "bicubic": Filter((-1, 0, 1, 2), 0.5, between_four),
}
PIXELS = {function.__name__: function for function in (
    nothing, hflip, vflip, invert, posterize, solarize, solarize_add, auto_contrast, equalize, brightness, color,
    contrast, sharpness, gaussian_blur,
)}  # fmt: skip
ERASE = "erase"  # acts on what is normalised
OPERATIONS = (*PIXELS, *AFFINE, ERASE)


class DeviceAugment:
    """Images and their plans → normalised images.

    Colours that erased regions are filled with come from the device's generator. The host does not wait for the device:
    which images drew which operation is seen from the plan while it is on the host.

    Args:
        device: where to augment.
        mean: of the channels, to subtract.
        std: of the channels, to divide by.
        fill: colour of what an affine transform leaves empty, in grey levels.
        erase_mode: "const" erases to 0, "rand" to a random colour a region, "pixel" to one a pixel.
    """

    def __init__(self, device: torch.device, mean: Sequence[float], std: Sequence[float], fill: Sequence[int],
                 erase_mode: str):  # fmt: skip
        self.device, self.erase_mode = device, erase_mode
        self.mean, self.std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))
        self.fill = torch.tensor(fill, dtype=torch.uint8, device=device).view(3, 1, 1)

    @torch.no_grad()
    def __call__(self, raw: Raw) -> Tensor:
        """A batch, (B, 3, H, W), in float32 on the device."""
        images = self.on_device(raw.pixels).clone(memory_format=torch.contiguous_format)
        # a stable order by operation, so that the images of each lie together
        order = raw.plan[:, :, 0].argsort(dim=0, stable=True)  # (B, layers)
        numbers = raw.plan[:, :, 1:].gather(0, order.unsqueeze(2).expand(-1, -1, NUMBERS))
        where, numbers = self.on_device(order.T.contiguous()), self.on_device(numbers)
        erasing = []
        for layer, drawn in enumerate(raw.plan[:, :, 0].T):
            start = 0
            for kind, count in enumerate(torch.bincount(drawn.long(), minlength=len(OPERATIONS)).tolist()):
                chosen, theirs = where[layer, start : start + count], numbers[start : start + count, layer]
                start += count
                name = OPERATIONS[kind]
                if not count or name == nothing.__name__:
                    continue
                if name == ERASE:
                    erasing.append((chosen, theirs))
                    continue
                part = images[chosen]
                filtering = AFFINE.get(name)
                changed = affine(part, theirs, filtering, self.fill) if filtering else PIXELS[name](part, theirs)
                images.index_copy_(0, chosen, changed)
        values = images.float().div_(255).sub_(self.mean).div_(self.std)
        for chosen, boxes in erasing:
            values.index_copy_(0, chosen, self.erase(values[chosen], boxes))
        return values

    def erase(self, values: Tensor, boxes: Tensor) -> Tensor:
        """values: (n, 3, H, W); boxes: (n, NUMBERS), the first of which are top, left, height and width in pixels."""
        n, channels, height, width = values.shape
        top, left, tall, wide = (column(boxes, k) for k in range(4))
        y = torch.arange(height, device=values.device).unsqueeze(1)
        x = torch.arange(width, device=values.device)
        inside = (y >= top) & (y < top + tall) & (x >= left) & (x < left + wide)
        if self.erase_mode == "pixel":
            fill = torch.randn(values.shape, device=values.device)
        elif self.erase_mode == "rand":
            fill = torch.randn((n, channels, 1, 1), device=values.device)
        else:
            fill = torch.zeros((), device=values.device)
        return torch.where(inside, fill, values)

    def on_device(self, tensor: Tensor) -> Tensor:
        """A copy that the host does not wait for."""
        if self.device.type == "cuda" and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)
