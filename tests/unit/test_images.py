"""Images of all kinds → RGB with 8 bits, in both pipelines: a test for each row of docs/images.md."""

from __future__ import annotations

import io
import re
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from torch import Tensor
from torchvision import datasets

from common.args import parse
from common.data.bad_samples import NO_IMAGE
from common.data.datasets import FileDataset, LibraryDataset
from common.data.fast.decode import decode, read_jpeg_header
from common.data.fast.recorder import FastTransform
from common.data.images import open_image, to_rgb
from common.data.loader import AugmentedDataset, FastAugmentedDataset
from common.data.transforms import training_stages, training_transform
from common.data_config import augment_config
from deit.recipe import RECIPE
from tests.commands import ROOT

GREY = np.linspace(0, 255, 48 * 32).reshape(32, 48).round().astype(np.uint8)
COLOURS = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=2)
PHOTO = Image.fromarray(COLOURS)
ALPHA = Image.fromarray(np.where(GREY < 100, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, format, **options)
    return content.getvalue()


def grey_tiff(values: np.ndarray) -> bytes:
    return encoded(Image.fromarray(values), "TIFF")


def rgb16_png(values: np.ndarray) -> bytes:
    """A PNG with 16 bits in three channels, which PIL does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def of_size(width: int, height: int) -> bytes:
    """A PNG whose header says so."""
    content = bytearray(encoded(PHOTO))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def of_grey(values: np.ndarray) -> np.ndarray:
    return np.stack([values] * 3, axis=2)


def oriented() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show it
    return encoded(PHOTO, "PNG", exif=exif)


def palette() -> Image.Image:
    """The colour of each pixel is that of its index: (index, 255 - index, 7)."""
    image = Image.fromarray(GREY).convert("P")
    image.putpalette([level for index in range(256) for level in (index, 255 - index, 7)])
    return image


PALETTE_COLOURS = np.stack([GREY, 255 - GREY, np.full_like(GREY, 7)], axis=2)
BITS = np.where(GREY < 100, 0, 255).astype(np.uint8)
UINT16 = np.linspace(0, 65535, 48 * 32).reshape(32, 48).round().astype(np.uint16)
FLOATS = np.linspace(0, 1, 48 * 32, dtype=np.float32).reshape(32, 48)
CMYK = PHOTO.convert("CMYK")
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
REFUSED = None
# by the first column of docs/images.md: files, and the pixels that they become
KINDS: dict[str, list[tuple[bytes, np.ndarray | None]]] = {
    "grey, 8 bits": [(encoded(Image.fromarray(GREY), format), of_grey(GREY)) for format in ("PNG", "BMP", "TIFF")],
    "black and white, 1 bit": [
        (encoded(Image.fromarray(BITS).convert("1")), of_grey(BITS)),
        (encoded(Image.fromarray(BITS).convert("1"), "TIFF", compression="group4"), of_grey(BITS)),
    ],
    "palette": [(encoded(palette()), PALETTE_COLOURS), (encoded(palette(), "BMP"), PALETTE_COLOURS)],
    "palette with transparency": [
        (encoded(palette(), transparency=3), PALETTE_COLOURS),
        (encoded(palette(), transparency=bytes([0, 128] + [255] * 254)), PALETTE_COLOURS),
    ],
    "grey or RGB with alpha": [
        (encoded(Image.merge("LA", (Image.fromarray(GREY), ALPHA))), of_grey(GREY)),
        (encoded(Image.merge("RGBA", (*PHOTO.split(), ALPHA))), COLOURS),
        (encoded(Image.merge("RGBA", (*PHOTO.split(), ALPHA)), "WEBP", lossless=True, exact=True), COLOURS),
    ],
    "CMYK": [(encoded(CMYK, "TIFF"), 255 - np.asarray(CMYK)[..., :3])],  # PIL's has no black
    "grey, 16 bits": [
        (encoded(Image.fromarray(UINT16)), of_grey(GREY)),
        (grey_tiff(UINT16), of_grey(GREY)),
        (grey_tiff(UINT16.astype(">u2")), of_grey(GREY)),
        (encoded(Image.fromarray(GREY.astype(np.uint16))), of_grey((GREY / 257).round().astype(np.uint8))),
    ],
    "grey, 32-bit integers within 0 … 65535": [(grey_tiff(UINT16.astype(np.int32)), of_grey(GREY))],
    "grey, 32-bit integers outside": [
        (grey_tiff(UINT16.astype(np.int32) + 1), REFUSED),
        (grey_tiff(UINT16.astype(np.int32) - 1), REFUSED),
    ],
    "grey, floats within [0, 1]": [(grey_tiff(FLOATS), of_grey(GREY))],
    "grey, floats within [0, 255]": [
        (grey_tiff(GREY.astype(np.float32)), of_grey(GREY)),
        (grey_tiff(GREY * np.float32(0.9)), of_grey((GREY * np.float32(0.9)).round().astype(np.uint8))),
    ],
    "grey, floats outside or NaN": [
        (grey_tiff(GREY + np.float32(0.4)), REFUSED),
        (grey_tiff(FLOATS - np.float32(0.01)), REFUSED),
        (grey_tiff(np.where(GREY == 9, np.float32("nan"), FLOATS)), REFUSED),
    ],
    "RGB, 16 bits": [(rgb16_png(COLOURS.astype(np.uint16) * 256 + 200), COLOURS)],
    "EXIF orientation": [(oriented(), COLOURS)],
    "colour profile": [(encoded(PHOTO, icc_profile=PROFILE), COLOURS)],
    "animation": [
        (encoded(PHOTO, "WEBP", lossless=True, save_all=True, append_images=[PHOTO.rotate(180)]), COLOURS),
        (encoded(palette(), "GIF", save_all=True, append_images=[palette().rotate(180)]), PALETTE_COLOURS),
    ],
    "named after another format": [(encoded(PHOTO, "TIFF"), COLOURS), (encoded(palette(), "GIF"), PALETTE_COLOURS)],
    "truncated": [(encoded(PHOTO, format)[:-60], REFUSED) for format in ("JPEG", "PNG", "WEBP", "BMP", "TIFF")],
    "more than 178,956,970 pixels": [(of_size(20_000, 9_000), REFUSED)],
}


@pytest.mark.parametrize("pipeline", ["pil", "fast"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_becomes_what_the_page_says(kind, pipeline, tmp_path):
    """All files are called .jpg, whatever they are."""
    paths = [tmp_path / f"{number}.jpg" for number in range(len(KINDS[kind]))]
    for path, (content, _) in zip(paths, KINDS[kind]):
        path.write_bytes(content)
    views = create_views(FileDataset([(str(path), 0) for path in paths], ["x"]), pipeline)
    for number, (path, (_, expected)) in enumerate(zip(paths, KINDS[kind])):
        _, label, unreadable = views[number, 0]
        if expected is None:
            assert label == NO_IMAGE and [name for name, _ in unreadable] == [str(path)]
        else:
            assert (label, unreadable) == (0, ())
            np.testing.assert_array_equal(pixels_of(views, number), expected)


def create_views(data: Any, pipeline: str) -> AugmentedDataset:
    args = parse(RECIPE, ["--data-path", "x", "--input-size", "32", "--input", pipeline])
    if pipeline == "fast":
        return FastAugmentedDataset(data, FastTransform(*training_stages(augment_config(args))), replace=False)
    return AugmentedDataset(data, training_transform(augment_config(args)), replace=False)


def pixels_of(views: AugmentedDataset, number: int) -> np.ndarray:
    """Those that a pipeline augments, (H, W, 3)."""
    image, _ = views.read(number)
    if isinstance(image, bytes | bytearray):
        image = decode(image, read_jpeg_header(image))
    return image.permute(1, 2, 0).numpy() if isinstance(image, Tensor) else np.asarray(image)


def test_the_page_has_these_kinds():
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \|$", (ROOT / "docs" / "images.md").read_text(), re.MULTILINE)
    assert rows == ["kind", *KINDS]


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_jpegs_of_all_kinds_are_converted_as_by_pil_and_not_turned(mode):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(PHOTO.convert(mode), "JPEG", exif=exif, icc_profile=b"not a profile" * 20)
    theirs = Image.open(io.BytesIO(content)).convert("RGB")
    assert theirs.size == PHOTO.size
    for pixels in (decode(content, read_jpeg_header(content)), to_rgb(open_image(content))):
        ours = pixels.permute(1, 2, 0).numpy() if isinstance(pixels, Tensor) else np.asarray(pixels)
        np.testing.assert_array_equal(ours, np.asarray(theirs))


@pytest.mark.parametrize(("values", "words"), [
    (np.array([[-1, 5]], np.int32), "int32 values from -1 to 5; expected [0, 65535]"),
    (np.array([[0, 70000]], np.int32), "int32 values from 0 to 70000; expected [0, 65535]"),
    (np.array([[0, 256.5]], np.float32), "float32 values from 0 to 256.5; expected [0, 1] or [0, 255]"),
])  # fmt: skip
def test_values_that_have_no_white_are_refused_with_their_range(values, words):
    with pytest.raises(OSError, match=re.escape(words)):
        to_rgb(open_image(grey_tiff(values)))


def test_an_image_of_16_bits_is_never_stretched():
    """Values that end at 255 are nearly black, in an image of integers; a float image that ends at 0.5 is grey."""
    assert np.asarray(to_rgb(open_image(encoded(Image.fromarray(GREY.astype(np.uint16)))))).max() == 1
    assert np.asarray(to_rgb(open_image(grey_tiff(FLOATS / 2)))).max() == 128


def test_torchvisions_datasets_are_converted_too(tmp_path):
    """Its loader would make them white."""
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "x.png").write_bytes(encoded(Image.fromarray(UINT16)))
    library = LibraryDataset(datasets.ImageFolder(str(tmp_path / "train")))
    np.testing.assert_array_equal(np.asarray(to_rgb(library[0][0])), of_grey(GREY))
