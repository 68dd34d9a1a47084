"""--input fast: the part of it that each image has to itself, on the host: decoding, the crop, and what is drawn.

torchvision decodes and resizes to uint8, with SIMD. timm's own policies then draw what is done to the image, by the
random numbers that they would draw for PIL's, and `common.device_augment` does it.
"""

from __future__ import annotations

import copy
import io
import math
import random
import struct
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.nn import functional
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.functional import pil_to_tensor

from common.device_augment import ERASE, NUMBERS, OPERATIONS, Raw

JPEG = b"\xff\xd8\xff"  # how it begins
FRAMES = (0xC0, 0xC1, 0xC2)  # markers: baseline, extended, progressive
DECODED = {("PNG", "RGB"), ("PNG", "L"), ("WEBP", "RGB")}  # PIL's names of what else torchvision decodes as PIL does
UNRESIZED = (InterpolationMode.BOX, InterpolationMode.HAMMING, InterpolationMode.LANCZOS)  # uint8 tensors, by torch
PLACES = {name: float(place) for place, name in enumerate(OPERATIONS)}


def decode(content: bytes | bytearray) -> Tensor | Image.Image:
    """A file's bytes → (3, H, W) uint8, or PIL's image in RGB where torchvision cannot or should not.

    Raises:
        OSError, ValueError, Image.DecompressionBombError and others: it is no image, cut short, or too large, where
            PIL says so.
    """
    image = None
    if not is_plain_jpeg(content):
        image = Image.open(io.BytesIO(content))  # no more than the header
        if (image.format, image.mode) not in DECODED:
            return image.convert("RGB")
    try:
        buffer = content if isinstance(content, bytearray) else bytearray(content)
        pixels = decode_image(torch.frombuffer(buffer, dtype=torch.uint8), mode=ImageReadMode.RGB)
        if pixels.dtype is torch.uint8:
            return pixels
    except RuntimeError:
        pass  # PIL has the last word
    return (image or Image.open(io.BytesIO(content))).convert("RGB")


def is_plain_jpeg(content: bytes | bytearray) -> bool:
    """Whether it begins as a JPEG of 8 bits in one or three channels, of no more pixels than PIL warns of.

    PIL's own reader of headers takes a thirtieth of the time that a photograph of 500 x 375 pixels does.
    """
    place = 2
    try:
        while content[:3] == JPEG:
            start, marker, length = struct.unpack_from(">BBH", content, place)
            if start != 0xFF or marker == 0xFF:
                return False
            if marker in FRAMES:
                bits, height, width, channels = struct.unpack_from(">BHHB", content, place + 4)
                within = Image.MAX_IMAGE_PIXELS is None or height * width <= Image.MAX_IMAGE_PIXELS
                return bits == 8 and channels in (1, 3) and within
            place += 2 + length
    except struct.error:
        pass
    return False


class Plan:
    """Stands in for PIL's image in timm's operations, and notes what they would do to it.

    Args:
        side: of the image, in pixels.
    """

    def __init__(self, side: int):
        self.size = (side, side)
        self.rows: list[list[float]] = []

    def add(self, name: str, *numbers: float) -> Plan:
        self.rows.append([PLACES[name], *numbers, *[0.0] * (NUMBERS - len(numbers))])
        return self

    def pad(self, layers: int) -> None:
        """With nothing, to so many layers."""
        while len(self.rows) < layers:
            self.add("nothing")

    def transform(self, size: Any, method: Any, data: tuple[float, ...], resample: int, **_: Any) -> Plan:
        """PIL's, of which timm uses the affine one."""
        return self.add(Image.Resampling(resample).name.lower(), *data)

    def rotate(self, degrees: float, resample: int, **_: Any) -> Plan:
        """PIL's, about the centre."""
        centre = self.size[0] / 2
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        away = (cos, -sin, centre - centre * (cos - sin), sin, cos, centre - centre * (cos + sin))
        return self.transform(self.size, None, away, resample)

    def filter(self, kernel: Any) -> Plan:
        """PIL's, of which timm uses the Gaussian blur."""
        return self.add("gaussian_blur", kernel.radius)


class Boxes:
    """Stands in for a tensor in timm's random erasing, and adds the regions that it would fill to a plan."""

    dtype = torch.float32

    def __init__(self, plan: Plan):
        self.plan = plan

    def size(self) -> tuple[int, int, int]:
        return 3, self.plan.size[1], self.plan.size[0]

    def __setitem__(self, where: tuple[slice, slice, slice], value: Tensor) -> None:
        _, y, x = where
        self.plan.add(ERASE, y.start, x.start, y.stop - y.start, x.stop - x.start)


def add_plain(name: str, plan: Plan, **_: Any) -> Plan:
    return plan.add(name)


def add_number(name: str, plan: Plan, number: float, **_: Any) -> Plan:
    return plan.add(name, number)


def add_posterize(plan: Plan, bits_to_keep: int, **_: Any) -> Plan:
    return plan if bits_to_keep >= 8 else plan.add("posterize", bits_to_keep)


def add_desaturate(plan: Plan, factor: float, **_: Any) -> Plan:
    return plan.add("color", min(1.0, max(0.0, 1.0 - factor)))


# by the name of timm's function; those that are not here take a plan for an image as they stand
NOTED: dict[str, Callable[..., Plan]] = {
    **{name: partial(add_plain, name) for name in ("auto_contrast", "equalize", "invert")},
    **{name: partial(add_number, name)
       for name in ("solarize", "solarize_add", "color", "contrast", "brightness", "sharpness")},
    "posterize": add_posterize,
    "desaturate": add_desaturate,
}  # fmt: skip
AS_THEY_STAND = {"shear_x", "shear_y", "translate_x_rel", "translate_y_rel", "translate_x_abs", "translate_y_abs",
                 "rotate", "gaussian_blur", "gaussian_blur_rand"}  # fmt: skip


class FastTransform:
    """A decoded image → its crop, and the plan of what is done to it on the device.

    Args:
        crop: the first of timm's three stages, or a simple crop in place of its random resized one; and flips.
        change: the second: a policy, colour jitter.
        finish: the third: normalisation, erasing.

    Raises:
        ValueError: there is an operation in them that the device lacks.
    """

    def __init__(self, crop: transforms.Compose, change: transforms.Compose, finish: transforms.Compose):
        self.crop, *flips = crop.transforms
        if getattr(self.crop, "interpolation", None) in UNRESIZED:
            how = self.crop.interpolation.value
            raise ValueError(f"--input fast has no --train-interpolation {how}: bicubic, bilinear, nearest or random "
                             "would do")  # fmt: skip
        if isinstance(self.crop, transforms.Compose):  # v2's resizes in uint8
            resize, shift = self.crop.transforms
            self.crop = transforms.Compose([v2.Resize(resize.size, resize.interpolation), shift])
        self.steps: list[Step] = []
        for part in (*flips, *change.transforms, *finish.transforms):
            self.steps += steps_of(part)

    def __call__(self, image: Tensor | Image.Image, numpy: Any = np.random) -> Raw:
        """image: (3, H, W) uint8, or PIL's → pixels (3, size, size). `numpy` draws what timm has numpy draw."""
        pixels = self.crop_of(image if isinstance(image, Tensor) else pil_to_tensor(image))
        plan = Plan(pixels.shape[2])
        layers = 0
        for step, most in self.steps:
            step(plan, numpy)
            layers += most
            plan.pad(layers)
        return Raw(pixels, torch.from_numpy(np.array(plan.rows, dtype=np.float32)).view(-1, 1 + NUMBERS))

    def crop_of(self, pixels: Tensor) -> Tensor:
        """timm's random resized crop, drawn as it draws, and resized in uint8: a copy of the crop with each pixel's
        channels together is what torch has SIMD for. Its result lies in memory in the same way."""
        crop = self.crop
        if not isinstance(crop, RandomResizedCropAndInterpolation):
            return crop(pixels)
        top, left, height, width = crop.get_params(pixels, crop.scale, crop.ratio)
        how = random.choice(crop.interpolation) if isinstance(crop.interpolation, tuple) else crop.interpolation
        rows = pixels.permute(1, 2, 0).numpy()[top : top + height, left : left + width]
        cut = torch.from_numpy(np.ascontiguousarray(rows))
        batch = cut.permute(2, 0, 1).as_strided((1, 3, height, width), (cut.numel(), 1, 3 * width, 3))
        if how is InterpolationMode.NEAREST:
            return functional.interpolate(batch, crop.size, mode="nearest-exact")[0]  # PIL's
        return functional.interpolate(batch, crop.size, mode=how.value, antialias=True)[0]


# draws what is done to an image and notes it, and in how many layers at most
Step = tuple[Callable[[Plan, Any], None], int]


def steps_of(part: Any) -> list[Step]:
    """One of timm's or torchvision's transforms → those that stand for it.

    Raises:
        ValueError: naming the operation that the device lacks.
    """
    part = copy.deepcopy(part)
    if isinstance(part, transforms.RandomHorizontalFlip | transforms.RandomVerticalFlip):
        name = "hflip" if isinstance(part, transforms.RandomHorizontalFlip) else "vflip"
        return [(partial(flip, name, part.p), 1)]
    if isinstance(part, RandAugment | AutoAugment):
        groups = [part.ops] if isinstance(part, RandAugment) else part.policy
        for operation in (operation for group in groups for operation in group):
            name = operation.aug_fn.__name__
            if name not in NOTED and name not in AS_THEY_STAND:
                raise ValueError(f"--input fast has no {operation.name}, which --aa draws: --input pil has it")
            operation.aug_fn = NOTED.get(name, operation.aug_fn)
        if isinstance(part, RandAugment):
            return [(partial(rand_augment, part), part.num_layers)]
        return [(partial(auto_augment, part), max(map(len, groups)))]
    if isinstance(part, transforms.ColorJitter):
        active = sum(factors is not None for factors in (part.brightness, part.contrast, part.saturation))
        return [(partial(jitter, part), active)] if active else []
    if isinstance(part, RandomErasing):
        part.per_pixel = part.rand_color = False  # colours are drawn on the device
        return [(partial(erase, part), part.max_count)]
    if isinstance(part, transforms.Normalize) or type(part).__name__ == "MaybeToTensor":
        return []
    raise ValueError(f"--input fast has no {type(part).__name__}, which --aa makes: --input pil has it")


def rand_augment(part: RandAugment, plan: Plan, numpy: Any) -> None:
    """As the policy itself, but for where numpy's random numbers come from."""
    free = part.choice_weights is None
    for place in numpy.choice(len(part.ops), part.num_layers, replace=free, p=part.choice_weights):
        part.ops[place](plan)


def auto_augment(part: AutoAugment, plan: Plan, numpy: Any) -> None:
    part(plan)


def flip(name: str, share: float, plan: Plan, numpy: Any) -> None:
    if torch.rand(1).item() < share:
        plan.add(name)


def jitter(part: transforms.ColorJitter, plan: Plan, numpy: Any) -> None:
    order, *factors = part.get_params(part.brightness, part.contrast, part.saturation, part.hue)
    names = ("brightness", "contrast", "color", "hue")
    for place in order.tolist():
        if factors[place] is not None:
            plan.add(names[place], factors[place])


def erase(part: RandomErasing, plan: Plan, numpy: Any) -> None:
    part(Boxes(plan))


def fill_of(change: transforms.Compose) -> tuple[int, ...]:
    """The colour of what rotations and shifts leave empty, in grey levels."""
    for part in change.transforms:
        if isinstance(part, RandAugment):
            return part.ops[0].kwargs["fillcolor"]
        if isinstance(part, AutoAugment):
            return part.policy[0][0].kwargs["fillcolor"]
    return 0, 0, 0
