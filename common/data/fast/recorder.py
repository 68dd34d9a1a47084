"""The host's part of `--input fast`: decode and crop an image, and record what timm's transforms would do to it.

See the package's docstring for how the parts work together.
"""

from __future__ import annotations

import copy
import math
import random
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
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.functional import pil_to_tensor

from common.data.fast.decode import decode, read_jpeg_header
from common.data.fast.ops import ERASE, MAX_OP_PARAMS, NO_OP, OPERATIONS, DeferredBatch

# torch resizes no uint8 tensors with these
UNSUPPORTED_INTERPOLATION = (InterpolationMode.BOX, InterpolationMode.HAMMING, InterpolationMode.LANCZOS)
OP_INDEX = {name: float(index) for index, name in enumerate(OPERATIONS)}
DUMMY_PIXEL = torch.zeros(1)  # expanded to an image's shape, of which timm's crop asks the size


class OpRecorder:
    """Stands in for PIL's image in timm's operations, and records them instead.

    Args:
        side: of the image, in pixels.
    """

    def __init__(self, side: int):
        self.size = (side, side)
        self.rows: list[list[float]] = []

    def add(self, name: str, *params: float) -> OpRecorder:
        self.rows.append([OP_INDEX[name], *params, *[0.0] * (MAX_OP_PARAMS - len(params))])
        return self

    def transform(self, size: Any, method: Any, data: tuple[float, ...], resample: int, **_: Any) -> OpRecorder:
        """Image.transform, which timm calls with an affine matrix."""
        return self.add(Image.Resampling(resample).name.lower(), *data)

    def rotate(self, degrees: float, resample: int, **_: Any) -> OpRecorder:
        """Image.rotate, about the centre."""
        centre = self.size[0] / 2
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        matrix = (cos, -sin, centre - centre * (cos - sin), sin, cos, centre - centre * (cos + sin))
        return self.transform(self.size, None, matrix, resample)

    def filter(self, kernel: Any) -> OpRecorder:
        """Image.filter, which timm calls with a Gaussian blur."""
        return self.add("gaussian_blur", kernel.radius)


class EraseRecorder:
    """Stands in for a tensor in timm's random erasing, and records the regions that are assigned to."""

    dtype = torch.float32

    def __init__(self, recorder: OpRecorder):
        self.recorder = recorder

    def size(self) -> tuple[int, int, int]:
        return 3, self.recorder.size[1], self.recorder.size[0]

    def __setitem__(self, region: tuple[slice, slice, slice], value: Tensor) -> None:
        _, y, x = region
        self.recorder.add(ERASE, y.start, x.start, y.stop - y.start, x.stop - x.start)


def record(name: str, recorder: OpRecorder, *params: float, **_: Any) -> OpRecorder:
    return recorder.add(name, *params)


def record_posterize(recorder: OpRecorder, bits_to_keep: int, **_: Any) -> OpRecorder:
    return recorder if bits_to_keep >= 8 else recorder.add("posterize", bits_to_keep)


def record_desaturate(recorder: OpRecorder, factor: float, **_: Any) -> OpRecorder:
    return recorder.add("color", min(1.0, max(0.0, 1.0 - factor)))


# by the name of timm's function, what takes its place
RECORDED_OPS: dict[str, Callable[..., OpRecorder]] = {
    **{
        name: partial(record, name)
        for name in (
            "auto_contrast",
            "equalize",
            "invert",
            "solarize",
            "solarize_add",
            "color",
            "contrast",
            "brightness",
            "sharpness",
        )
    },
    "posterize": record_posterize,
    "desaturate": record_desaturate,
}
# timm's functions that only call methods of the image which `OpRecorder` has
PASSTHROUGH_OPS = {
    "shear_x",
    "shear_y",
    "translate_x_rel",
    "translate_y_rel",
    "translate_x_abs",
    "translate_y_abs",
    "rotate",
    "gaussian_blur",
    "gaussian_blur_rand",
}


class FastTransform:
    """An encoded or decoded image → its crop, and what is done to it on the device.

    Args:
        crop: timm's first stage: the random resized crop, or a simple crop in its place; and flips.
        change: the second: a policy, colour jitter.
        finish: the third: normalisation, erasing.

    Raises:
        ValueError: they hold an operation that the device lacks.
    """

    def __init__(self, crop: transforms.Compose, change: transforms.Compose, finish: transforms.Compose):
        self.crop, *flips = crop.transforms
        interpolation = getattr(self.crop, "interpolation", None)
        if interpolation in UNSUPPORTED_INTERPOLATION:
            raise ValueError(
                f"--train-interpolation {interpolation.value}: not supported by --input fast; use bicubic, bilinear, "
                "nearest or random"
            )
        if isinstance(self.crop, transforms.Compose):  # v2's resize works in uint8
            resize, shift = self.crop.transforms
            self.crop = transforms.Compose([v2.Resize(resize.size, resize.interpolation), shift])
        self.steps: list[Step] = []
        for part in (*flips, *change.transforms, *finish.transforms):
            self.steps += recording_steps(part)

    def __call__(self, image: Tensor | Image.Image | bytes | bytearray, numpy_rng: Any = np.random) -> DeferredBatch:
        """One image: (3, H, W) uint8, or PIL's, or a file's bytes → pixels (3, size, size) and ops (layers, 1 +
        MAX_OP_PARAMS).

        Args:
            numpy_rng: draws what timm draws from numpy.

        Raises:
            OSError, ValueError, Image.DecompressionBombError and others: as `decode`.
        """
        pixels = self.random_crop(image)
        recorder = OpRecorder(pixels.shape[2])
        layers = 0
        for record_step, max_layers in self.steps:
            record_step(recorder, numpy_rng)
            layers += max_layers
            while len(recorder.rows) < layers:
                recorder.add(NO_OP)
        ops = np.array(recorder.rows, dtype=np.float32)
        return DeferredBatch(pixels, torch.from_numpy(ops).view(-1, 1 + MAX_OP_PARAMS))

    def random_crop(self, image: Tensor | Image.Image | bytes | bytearray) -> Tensor:
        """timm's random resized crop, drawn as it draws and resized in uint8.

        The crop is copied with each pixel's channels together, the layout that torch has SIMD for; the result has it
        too.
        """
        crop, box = self.crop, None
        random_size = isinstance(crop, RandomResizedCropAndInterpolation)
        if isinstance(image, bytes | bytearray):
            header = read_jpeg_header(image)
            if header is not None and random_size:
                box = crop.get_params(DUMMY_PIXEL.expand(3, header.height, header.width), crop.scale, crop.ratio)
            image = decode(image, header, box[0] + box[2] if box else None)
        pixels = image if isinstance(image, Tensor) else pil_to_tensor(image)
        if not random_size:
            return crop(pixels)
        top, left, height, width = box or crop.get_params(pixels, crop.scale, crop.ratio)
        mode = random.choice(crop.interpolation) if isinstance(crop.interpolation, tuple) else crop.interpolation
        rows = pixels.permute(1, 2, 0).numpy()[top : top + height, left : left + width]
        cut = torch.from_numpy(np.ascontiguousarray(rows))  # (height, width, 3)
        batch = cut.permute(2, 0, 1).as_strided((1, 3, height, width), (cut.numel(), 1, 3 * width, 3))
        if mode is InterpolationMode.NEAREST:
            return functional.interpolate(batch, crop.size, mode="nearest-exact")[0]  # PIL's
        return functional.interpolate(batch, crop.size, mode=mode.value, antialias=True)[0]


# records a transform, drawing from a numpy generator; and how many layers of operations it makes at most
Step = tuple[Callable[[OpRecorder, Any], None], int]


def recording_steps(part: Any) -> list[Step]:
    """One of timm's or torchvision's transforms → what records it.

    Raises:
        ValueError: naming the operation that the device lacks.
    """
    part = copy.deepcopy(part)
    if isinstance(part, transforms.RandomHorizontalFlip | transforms.RandomVerticalFlip):
        name = "hflip" if isinstance(part, transforms.RandomHorizontalFlip) else "vflip"
        return [(partial(record_flip, name, part.p), 1)]
    if isinstance(part, RandAugment | AutoAugment):
        groups = [part.ops] if isinstance(part, RandAugment) else part.policy
        for operation in (operation for group in groups for operation in group):
            name = operation.aug_fn.__name__
            if name not in RECORDED_OPS and name not in PASSTHROUGH_OPS:
                raise ValueError(f"--aa: --input fast does not support {operation.name}; use --input pil")
            operation.aug_fn = RECORDED_OPS.get(name, operation.aug_fn)
        if isinstance(part, RandAugment):
            return [(partial(record_rand_augment, part), part.num_layers)]
        return [(partial(record_auto_augment, part), max(map(len, groups)))]
    if isinstance(part, transforms.ColorJitter):
        active = sum(factors is not None for factors in (part.brightness, part.contrast, part.saturation))
        return [(partial(record_color_jitter, part), active)] if active else []
    if isinstance(part, RandomErasing):
        part.per_pixel = part.rand_color = False  # colours are drawn on the device
        return [(partial(record_erasing, part), part.max_count)]
    if isinstance(part, transforms.Normalize) or type(part).__name__ == "MaybeToTensor":
        return []
    raise ValueError(f"--aa: --input fast does not support {type(part).__name__}; use --input pil")


def record_rand_augment(part: RandAugment, recorder: OpRecorder, numpy_rng: Any) -> None:
    """RandAugment.__call__ with another source of numpy's random numbers."""
    replace = part.choice_weights is None
    for index in numpy_rng.choice(len(part.ops), part.num_layers, replace=replace, p=part.choice_weights):
        part.ops[index](recorder)


def record_auto_augment(part: AutoAugment, recorder: OpRecorder, numpy_rng: Any) -> None:
    part(recorder)


def record_flip(name: str, probability: float, recorder: OpRecorder, numpy_rng: Any) -> None:
    if torch.rand(1).item() < probability:
        recorder.add(name)


def record_color_jitter(part: transforms.ColorJitter, recorder: OpRecorder, numpy_rng: Any) -> None:
    order, *factors = part.get_params(part.brightness, part.contrast, part.saturation, part.hue)
    names = ("brightness", "contrast", "color", "hue")
    for index in order.tolist():
        if factors[index] is not None:
            recorder.add(names[index], factors[index])


def record_erasing(part: RandomErasing, recorder: OpRecorder, numpy_rng: Any) -> None:
    part(EraseRecorder(recorder))


def fill_color(change: transforms.Compose) -> tuple[int, ...]:
    """The grey levels of R, G, B that rotations and shifts leave behind."""
    for part in change.transforms:
        if isinstance(part, RandAugment):
            return part.ops[0].kwargs["fillcolor"]
        if isinstance(part, AutoAugment):
            return part.policy[0][0].kwargs["fillcolor"]
    return 0, 0, 0
