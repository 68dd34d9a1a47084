"""Transforms of training and evaluation images: timm's, as the settings of a run ask for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from common.data.fast.ops import DeviceAugment
from common.data.fast.recorder import fill_color


@dataclass(frozen=True)
class Preprocessing:
    """What a model expects of its images, as timm's pretrained_cfg has it."""

    input_size: int  # side, in pixels
    mean: Sequence[float]  # a channel, of values in [0, 1]
    std: Sequence[float]  # a channel
    interpolation: str  # of evaluation; timm's name
    crop_ratio: float  # share of the resized image's side that evaluation crops; timm's crop_pct
    crop_mode: str  # timm's: "center", "squash" or "border"


@dataclass(frozen=True)
class AugmentConfig:
    """How training images are augmented."""

    input_size: int  # side of the result, in pixels
    mean: Sequence[float]  # a channel, of values in [0, 1]
    std: Sequence[float]  # a channel
    scale: Sequence[float]  # from, to: area of the random crop, as shares of the image
    ratio: Sequence[float]  # from, to: aspect ratio of the random crop
    hflip: float  # probability
    vflip: float  # probability
    color_jitter: float | None  # strength
    auto_augment: str | None  # timm's policy
    interpolation: str  # of the crop; timm's name
    simple_crop: bool  # a resize and a crop after padding by 4 pixels, in place of the random resized crop
    erase_prob: float
    erase_mode: str  # "const" erases to 0, "rand" to a random colour a region, "pixel" to one a pixel
    erase_count: int  # regions an image, at most
    fast: bool  # augment on the device, in batches; else by PIL on the host


def training_transform(config: AugmentConfig) -> Callable[[Image.Image], Tensor]:
    """timm's training transform: PIL image → (3, H, W)."""
    return transforms.Compose(training_stages(config))


def training_stages(config: AugmentConfig) -> tuple[transforms.Compose, transforms.Compose, transforms.Compose]:
    """timm's training transform in three: crop and flips; policy and colour jitter; normalisation and erasing."""
    crop, change, finish = create_transform(
        config.input_size,
        is_training=True,
        scale=config.scale,
        ratio=config.ratio,
        hflip=config.hflip,
        vflip=config.vflip,
        color_jitter=config.color_jitter,
        auto_augment=config.auto_augment,
        interpolation=config.interpolation,
        re_prob=config.erase_prob,
        re_mode=config.erase_mode,
        re_count=config.erase_count,
        mean=config.mean,
        std=config.std,
        separate=True,
    )
    if config.simple_crop:
        crop.transforms[0] = transforms.Compose(
            [
                transforms.Resize(config.input_size, interpolation=InterpolationMode.BICUBIC),
                transforms.RandomCrop(config.input_size, padding=4, padding_mode="reflect"),
            ]
        )
    return crop, change, finish


def create_augment(config: AugmentConfig, device: torch.device) -> DeviceAugment | None:
    """The part of the augmentation that is left to the device; None where PIL does it all."""
    if not config.fast:
        return None
    _, change, finish = training_stages(config)
    normalize = next(part for part in finish.transforms if isinstance(part, transforms.Normalize))
    mean, std = (torch.as_tensor(values).tolist() for values in (normalize.mean, normalize.std))
    return DeviceAugment(device, mean, std, fill_color(change), config.erase_mode)


def evaluation_transform(preprocessing: Preprocessing) -> Callable[[Image.Image], Tensor]:
    """Resize to int(input_size / crop_ratio), crop and normalise, as timm does: PIL image → (3, H, W)."""
    return create_transform(
        preprocessing.input_size,
        interpolation=preprocessing.interpolation,
        crop_pct=preprocessing.crop_ratio,
        crop_mode=preprocessing.crop_mode,
        mean=preprocessing.mean,
        std=preprocessing.std,
    )
