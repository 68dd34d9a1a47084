"""--input fast: the part of it that each image has to itself, on the host: decoding, the crop, and what is drawn.

A JPEG is decoded as far down as its crop reaches where simplejpeg is installed, and else as a whole by torchvision,
to the same pixels. torch resizes to uint8, with SIMD. timm's own policies then draw what is done to the image, by the
random numbers that they would draw for PIL's, and `common.device_augment` does it.
"""

from __future__ import annotations

import copy
import io
import math
import random
import re
import struct
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

JPEG = b"\xff\xd8\xff"  # how it begins
SEQUENTIAL = (0xC0, 0xC1)  # markers: of frames that are coded from top to bottom, baseline and extended
PROGRESSIVE, RESTARTS, SCAN = 0xC2, 0xDD, 0xDA
MARGIN = 4  # rows below a crop that its last rows may share colours with
SKIPPED = re.compile(r"Corrupt JPEG data: \d+ extraneous bytes before marker 0xd9")
DECODED = {("PNG", "RGB"), ("PNG", "L"), ("WEBP", "RGB")}  # PIL's names of what else torchvision decodes as PIL does
UNRESIZED = (InterpolationMode.BOX, InterpolationMode.HAMMING, InterpolationMode.LANCZOS)  # uint8 tensors, by torch
PLACES = {name: float(place) for place, name in enumerate(OPERATIONS)}
POINT = torch.zeros(1)


class Frame(NamedTuple):
    """What the header of a JPEG says.

    Args:
        height: in pixels.
        width: in pixels.
        place: of the two bytes that hold the height.
        ordered: whether it is coded from top to bottom, without marks to start again from.
    """

    height: int
    width: int
    place: int
    ordered: bool


def frame_of(content: bytes | bytearray) -> Frame | None:
    """Of a JPEG of 8 bits in one or three channels, of no more pixels than PIL warns of; else None.

    PIL's own reader of headers takes a thirtieth of the time that a photograph of 500 x 375 pixels does.
    """
    place, frame, restarts = 2, None, False
    try:
        while content[:3] == JPEG:
            start, marker, length = struct.unpack_from(">BBH", content, place)
            if start != 0xFF or marker == 0xFF:
                return None
            if marker == SCAN:
                return frame and frame._replace(ordered=frame.ordered and not restarts)
            if marker in SEQUENTIAL or marker == PROGRESSIVE:
                bits, height, width, channels = struct.unpack_from(">BHHB", content, place + 4)
                within = Image.MAX_IMAGE_PIXELS is None or height * width <= Image.MAX_IMAGE_PIXELS
                if frame or bits != 8 or channels not in (1, 3) or not within:
                    return None
                frame = Frame(height, width, place + 5, marker in SEQUENTIAL)
            restarts = restarts or marker == RESTARTS
            place += 2 + length
    except struct.error:
        pass
    return None


def decode(content: bytes | bytearray, frame: Frame | None, rows: int | None = None) -> Tensor | Image.Image:
    """A file's bytes → (3, H, W) uint8, or PIL's image in RGB where torchvision cannot or should not.

    Args:
        frame: of the file, if it has one.
        rows: as many from the top as are needed; there may be more.

    Raises:
        OSError, ValueError, Image.DecompressionBombError and others: it is no image, cut short, or too large, where
            PIL says so.
    """
    if simplejpeg is not None and frame is not None and frame.ordered:
        pixels = decode_rows(content, frame, frame.height if rows is None else rows)
        if pixels is not None:
            return pixels
    image = None
    if frame is None:
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


def decode_rows(content: bytes | bytearray, frame: Frame, rows: int) -> Tensor | None:
    """simplejpeg's pixels, which are PIL's to the bit; None where it finds anything wrong.

    Most of the time goes into undoing Huffman's code, which begins at the top: a copy of the file whose header says
    that the image ends below the crop spares what is below. That the rest is skipped is then the first thing that the
    decoder complains of, and the last.
    """
    height = min(rows + MARGIN, frame.height)
    if height < frame.height:
        content = bytearray(content)
        struct.pack_into(">H", content, frame.place, height)
    pixels = np.empty((height, frame.width, 3), np.uint8)
    try:
        simplejpeg.decode_jpeg(content, buffer=pixels)
    except ValueError as error:
        if height == frame.height or not SKIPPED.fullmatch(str(error)):
            return None
    return torch.from_numpy(pixels).permute(2, 0, 1)


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

    def __call__(self, image: Tensor | Image.Image | bytes | bytearray, numpy: Any = np.random) -> Raw:
        """image: (3, H, W) uint8, or PIL's, or a file's bytes → pixels (3, size, size). `numpy` draws what timm has
        numpy draw.

        Raises:
            OSError, ValueError, Image.DecompressionBombError and others: as `decode`.
        """
        pixels = self.crop_of(image)
        plan = Plan(pixels.shape[2])
        layers = 0
        for step, most in self.steps:
            step(plan, numpy)
            layers += most
            plan.pad(layers)
        return Raw(pixels, torch.from_numpy(np.array(plan.rows, dtype=np.float32)).view(-1, 1 + NUMBERS))

    def crop_of(self, image: Tensor | Image.Image | bytes | bytearray) -> Tensor:
        """timm's random resized crop, drawn as it draws, and resized in uint8: a copy of the crop with each pixel's
        channels together is what torch has SIMD for. Its result lies in memory in the same way."""
        crop, box = self.crop, None
        random_size = isinstance(crop, RandomResizedCropAndInterpolation)
        if isinstance(image, bytes | bytearray):
            frame = frame_of(image)
            if frame is not None and random_size:
                box = crop.get_params(POINT.expand(3, frame.height, frame.width), crop.scale, crop.ratio)
            image = decode(image, frame, box[0] + box[2] if box else None)
        pixels = image if isinstance(image, Tensor) else pil_to_tensor(image)
        if not random_size:
            return crop(pixels)
        top, left, height, width = box or crop.get_params(pixels, crop.scale, crop.ratio)
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
