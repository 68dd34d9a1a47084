"""Augmentation on the device, a batch at a time: each operation once for all the images that drew it.

The operations are PIL's as timm calls them, down to how they round, so that the images of `--input fast` are
distributed as those of `--input pil`: https://github.com/python-pillow/Pillow/tree/12.3.0/src/libImaging (Geometry.c,
Blend.c, BoxBlur.c, Filter.c). See the package's docstring for how the parts work together.

Shapes: images (n, 3, H, W) uint8, of those that drew an operation; params (n, MAX_OP_PARAMS).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

MAX_OP_PARAMS = 6  # of an affine matrix
BLUR_PASSES = 3


class DeferredBatch(NamedTuple):
    """Images before augmentation, and what is to be done to them; of one image without the first dimension.

    Args:
        pixels: (B, 3, H, W) uint8.
        ops: (B, layers, 1 + MAX_OP_PARAMS) float32: for each layer an index into `OPERATIONS`, and the operation's
            parameters. It stays on the host.
    """

    pixels: Tensor
    ops: Tensor


def hflip(images: Tensor, params: Tensor) -> Tensor:
    return images.flip(-1)


def vflip(images: Tensor, params: Tensor) -> Tensor:
    return images.flip(-2)


def invert(images: Tensor, params: Tensor) -> Tensor:
    return 255 - images


def posterize(images: Tensor, params: Tensor) -> Tensor:
    """params: bits to keep, 0 to 7."""
    return images & (256 - 2 ** (8 - column(params, 0))).to(torch.uint8)


def solarize(images: Tensor, params: Tensor) -> Tensor:
    """params: grey level from which on pixels are inverted, 0 to 256."""
    return torch.where(images < column(params, 0), images, 255 - images)


def solarize_add(images: Tensor, params: Tensor) -> Tensor:
    """params: what is added to pixels below 128."""
    brighter = (images + column(params, 0)).clamp(max=255).to(torch.uint8)
    return torch.where(images < 128, brighter, images)


def auto_contrast(images: Tensor, params: Tensor) -> Tensor:
    """By a table in float64, as PIL's: a product that should be a whole number may be just below in float32."""
    least, most = (reduce(images.flatten(2), dim=2, keepdim=True).double() for reduce in (torch.amin, torch.amax))
    levels = torch.arange(256, dtype=torch.float64, device=images.device)
    scale = 255 / (most - least).clamp(min=1)
    table = (levels * scale - least * scale).clamp(0, 255)
    table = torch.where(most > least, table, levels).to(torch.uint8)
    return table.gather(2, images.flatten(2).long()).view_as(images)


def equalize(images: Tensor, params: Tensor) -> Tensor:
    return vision.equalize(images)


def brightness(images: Tensor, params: Tensor) -> Tensor:
    """params: factor; at 0 the image is black, at 1 unchanged."""
    return blend(torch.zeros_like(images[:, :1]), images, params)


def color(images: Tensor, params: Tensor) -> Tensor:
    """params: factor; at 0 the image is grey, at 1 unchanged."""
    return blend(grey(images), images, params)


def contrast(images: Tensor, params: Tensor) -> Tensor:
    """params: factor; at 0 the image is its mean grey level, at 1 unchanged."""
    mean = (grey(images).double().mean((1, 2, 3), keepdim=True) + 0.5).floor()
    return blend(mean, images, params)


def sharpness(images: Tensor, params: Tensor) -> Tensor:
    """params: factor; at 0 the image is smoothed by a 3x3 kernel whose centre weighs five times, at 1 unchanged."""
    values = images.float()
    rows = values[..., :-2, :] + values[..., 1:-1, :] + values[..., 2:, :]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * values[..., 1:-1, 1:-1]
    smooth = values.clone()  # the border stays
    smooth[..., 1:-1, 1:-1] = (sums / 13 + 0.5).floor()
    return blend(smooth, images, params)


def gaussian_blur(images: Tensor, params: Tensor) -> Tensor:
    """params: standard deviation in pixels, at most 2.

    PIL's: box blurs of fractional width, three along each row and then three along each column, rounded after each
    (Gwosdek et al. 2011, Theoretical Foundations of Gaussian Convolution by Extended Box Filtering).
    """
    variance = params[:, 0] * params[:, 0] / BLUR_PASSES
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) * (whole + 1)))
    # 32 bits of fixed point, of which the highest 8 are the grey level; `& 255` undoes an overflow into the sign
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


def column(params: Tensor, index: int) -> Tensor:
    """One parameter of each image, (n, 1, 1, 1)."""
    return params[:, index].view(-1, 1, 1, 1)


def grey(images: Tensor) -> Tensor:
    """ITU-R 601-2 luma, (n, 1, H, W), whole numbers in float32, in PIL's fixed point."""
    red, green, blue = images.float().unbind(1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 32768) / 65536).floor().unsqueeze(1)


def blend(degenerate: Tensor, images: Tensor, params: Tensor) -> Tensor:
    """From a degenerate image, at factor 0, to the image, at 1, and beyond; truncated as in PIL."""
    start = degenerate.float()
    return (start + column(params, 0) * (images.float() - start)).clamp(0, 255).to(torch.uint8)


def lerp(pixels: Sequence[Tensor], d: Tensor) -> Tensor:
    """Linear interpolation. pixels: each (n, 3, H, W), in order; d: (n, 1, H, W), distance from the one before."""
    a, b = pixels
    return a + (b - a) * d


def cubic(pixels: Sequence[Tensor], d: Tensor) -> Tensor:
    """Cubic interpolation with a = -1, which PIL uses in Image.transform only; arguments as `lerp`.

    By differences from one of the pixels, so that equal pixels give exactly their value: weights would sum to less than
    1 after rounding.
    """
    before, a, b, after = pixels
    e = 1 - d
    return a + (before - a) * (-d * e * e) + (b - a) * (d + d * d * e) + (after - a) * (-d * d * e)


def nearest(pixels: Sequence[Tensor], d: Tensor) -> Tensor:
    """Arguments as `lerp`."""
    return pixels[0]


class Filter(NamedTuple):
    """Interpolation along an axis.

    Args:
        offsets: of the pixels that are used, from the one whose reference point is before the position.
        centre: a pixel's reference point: 0.5 is its centre, 0 its edge.
        interpolate: values of these pixels, and the distance from the first reference point → a value.
    """

    offsets: Sequence[int]
    centre: float
    interpolate: Callable[[Sequence[Tensor], Tensor], Tensor]


def affine(images: Tensor, params: Tensor, filtering: Filter, fill: Tensor) -> Tensor:
    """The pixel at (x, y) comes from (ax + by + c, dx + ey + f), with params = (a, b, c, d, e, f), or is `fill` where
    that is outside. Pixels' centres are at halves.

    torch's grid_sample is no substitute: its cubic has a = -0.75.
    """
    n, channels, height, width = images.shape
    x = torch.arange(width, device=images.device) + 0.5
    y = torch.arange(height, device=images.device).unsqueeze(1) + 0.5
    a, b, c, d, e, f = (column(params, k).squeeze(1) for k in range(MAX_OP_PARAMS))
    source_x, source_y = a * x + b * y + c, d * x + e * y + f  # (n, H, W)
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    left, top = (source_x - filtering.centre).floor(), (source_y - filtering.centre).floor()
    dx, dy = (source_x - filtering.centre - left).unsqueeze(1), (source_y - filtering.centre - top).unsqueeze(1)
    columns = [(left.long() + k).clamp(0, width - 1) for k in filtering.offsets]
    pixels = images.flatten(2)
    rows = []
    for k in filtering.offsets:
        row = (top.long() + k).clamp(0, height - 1) * width
        indices = ((row + column_index).view(n, 1, -1).expand(n, channels, -1) for column_index in columns)
        neighbours = [pixels.gather(2, index).view_as(images).float() for index in indices]
        rows.append(filtering.interpolate(neighbours, dx))
    values = filtering.interpolate(rows, dy).clamp(0, 255).to(torch.uint8)  # truncated, as in PIL
    return torch.where(inside.unsqueeze(1), values, fill)


AFFINE_FILTERS = {
    "nearest": Filter((0,), 0.0, nearest),
    "bilinear": Filter((0, 1), 0.5, lerp),
    "bicubic": Filter((-1, 0, 1, 2), 0.5, cubic),
}
PIXEL_OPS = {
    function.__name__: function
    for function in (
        hflip,
        vflip,
        invert,
        posterize,
        solarize,
        solarize_add,
        auto_contrast,
        equalize,
        brightness,
        color,
        contrast,
        sharpness,
        gaussian_blur,
    )
}
NO_OP = "no_op"  # a layer of an image that drew fewer operations than others
ERASE = "erase"  # acts on normalised images
OPERATIONS = (NO_OP, *PIXEL_OPS, *AFFINE_FILTERS, ERASE)


class DeviceAugment:
    """Carries out the operations of a `DeferredBatch`, and normalises.

    Colours of erased regions come from the device's generator. The host does not wait for the device: which images drew
    which operation is read from `ops` on the host.

    Args:
        device: where to augment.
        mean: of the channels, to subtract.
        std: of the channels, to divide by.
        fill: colour of what an affine transform leaves empty, in grey levels.
        erase_mode: "const" erases to 0, "rand" to a random colour a region, "pixel" to one a pixel.
    """

    def __init__(
        self, device: torch.device, mean: Sequence[float], std: Sequence[float], fill: Sequence[int], erase_mode: str
    ):
        self.device, self.erase_mode = device, erase_mode
        self.mean, self.std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))
        self.fill = torch.tensor(fill, dtype=torch.uint8, device=device).view(3, 1, 1)

    @torch.no_grad()
    def __call__(self, batch: DeferredBatch) -> Tensor:
        """A batch → (B, 3, H, W) float32 on the device."""
        images = self.on_device(batch.pixels).clone(memory_format=torch.contiguous_format)
        kinds, params = batch.ops[:, :, 0], batch.ops[:, :, 1:]
        order = kinds.argsort(dim=0, stable=True)  # (B, layers); brings the images of each operation together
        params = self.on_device(params.gather(0, order.unsqueeze(2).expand(-1, -1, MAX_OP_PARAMS)))
        order = self.on_device(order.T.contiguous())  # (layers, B)
        erasing = []
        for layer, layer_kinds in enumerate(kinds.T):
            start = 0
            for kind, count in enumerate(torch.bincount(layer_kinds.long(), minlength=len(OPERATIONS)).tolist()):
                chosen, chosen_params = order[layer, start : start + count], params[start : start + count, layer]
                start += count
                name = OPERATIONS[kind]
                if not count or name == NO_OP:
                    continue
                if name == ERASE:
                    erasing.append((chosen, chosen_params))
                elif name in AFFINE_FILTERS:
                    changed = affine(images[chosen], chosen_params, AFFINE_FILTERS[name], self.fill)
                    images.index_copy_(0, chosen, changed)
                else:
                    images.index_copy_(0, chosen, PIXEL_OPS[name](images[chosen], chosen_params))
        values = images.float().div_(255).sub_(self.mean).div_(self.std)
        for chosen, boxes in erasing:
            values.index_copy_(0, chosen, self.erase(values[chosen], boxes))
        return values

    def erase(self, values: Tensor, boxes: Tensor) -> Tensor:
        """values: (n, 3, H, W); boxes: (n, MAX_OP_PARAMS), beginning with top, left, height and width in pixels."""
        n, channels, height, width = values.shape
        top, left, box_height, box_width = (column(boxes, k) for k in range(4))
        y = torch.arange(height, device=values.device).unsqueeze(1)
        x = torch.arange(width, device=values.device)
        inside = (y >= top) & (y < top + box_height) & (x >= left) & (x < left + box_width)
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
