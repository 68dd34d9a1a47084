"""An image of any kind → RGB with 8 bits a channel.

PIL's conversion, which is torchvision's, but for grey levels of more than 8 bits: PIL cuts those off at 255, so that an
image of 16 bits becomes white. docs/images.md says what becomes of each kind.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

MAX_UINT8, MAX_UINT16 = 255, 65535


def open_image(content: bytes | bytearray) -> Image.Image:
    """A file's bytes → PIL's image, whose pixels are decoded later.

    Raises:
        OSError: it is no image.
    """
    with decoding_errors():
        return Image.open(io.BytesIO(content))


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an image and convert it to RGB.

    Raises:
        OSError: it cannot be decoded, or its values do not say what is white.
    """
    with decoding_errors():
        if image.mode == "F" or image.mode.startswith("I"):  # I, I;16, I;16B
            image = Image.fromarray(to_uint8(np.asarray(image)))
        image.info.pop("transparency", None)  # which the conversion ignores, but warns of
        return image.convert("RGB")


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Grey levels of 16 or 32 bits → of 8 bits, by their type: 65535 is white among integers; among floats it is 1, or
    255 where one is above 1.

    Raises:
        ValueError: a value is outside these ranges.
    """
    least, most = pixels.min(), pixels.max()
    if pixels.dtype.kind != "f":
        scale, white = MAX_UINT8 / MAX_UINT16, "[0, 65535]"
        valid = least >= 0 and most <= MAX_UINT16
    else:
        scale, white = MAX_UINT8 if most <= 1 else 1, "[0, 1] or [0, 255]"
        valid = least >= 0 and most <= MAX_UINT8  # false for NaN
    if not valid:
        raise ValueError(f"{pixels.dtype} values from {least:g} to {most:g}; expected {white}")
    return np.rint(pixels * scale).astype(np.uint8)


@contextmanager
def decoding_errors() -> Iterator[None]:
    """Turn what PIL raises for damaged files, errors of many kinds, into OSError with the reason."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        plain = isinstance(error, ValueError | SyntaxError | Image.DecompressionBombError) and str(error)
        raise OSError(str(error) if plain else f"{type(error).__name__}: {error}") from error
