"""Decodes the file of an image to (3, H, W) uint8, as PIL does to the bit.

simplejpeg decodes a JPEG, no further down than its crop where its coding allows that. PIL decodes all else, and decides
whether a JPEG that simplejpeg refuses is readable.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.data.images import open_image, to_rgb

JPEG_START = b"\xff\xd8\xff"
# markers of JPEG segments (ITU-T T.81, table B.1)
SEQUENTIAL = (0xC0, 0xC1)  # frames that are coded from top to bottom, baseline and extended
PROGRESSIVE, RESTART_INTERVAL, START_OF_SCAN = 0xC2, 0xDD, 0xDA
MARGIN = 4  # rows below a crop that its last rows may share colours with
SKIPPED_ROWS = re.compile(r"Corrupt JPEG data: \d+ extraneous bytes before marker 0xd9")


class JpegHeader(NamedTuple):
    height: int  # in pixels
    width: int
    height_offset: int  # of the two bytes that hold the height
    top_down: bool  # coded from top to bottom, without restart markers


def read_jpeg_header(content: bytes | bytearray) -> JpegHeader | None:
    """The header of a JPEG with 8 bits in one or three channels, of no more pixels than PIL warns of; else None.

    Written here because PIL's takes a thirtieth of the time of decoding a photograph of 500 x 375 pixels.
    """
    offset, header, restarts = 2, None, False
    try:
        while content[:3] == JPEG_START:
            start, marker, length = struct.unpack_from(">BBH", content, offset)
            if start != 0xFF or marker == 0xFF:
                return None
            if marker == START_OF_SCAN:
                return header and header._replace(top_down=header.top_down and not restarts)
            if marker in SEQUENTIAL or marker == PROGRESSIVE:
                bits, height, width, channels = struct.unpack_from(">BHHB", content, offset + 4)
                allowed = Image.MAX_IMAGE_PIXELS is None or height * width <= Image.MAX_IMAGE_PIXELS
                if header or bits != 8 or channels not in (1, 3) or not allowed:
                    return None
                header = JpegHeader(height, width, offset + 5, marker in SEQUENTIAL)
            restarts = restarts or marker == RESTART_INTERVAL
            offset += 2 + length
    except struct.error:
        pass
    return None


def decode(content: bytes | bytearray, header: JpegHeader | None, rows: int | None = None) -> Tensor | Image.Image:
    """A file's bytes → (3, H, W) uint8, or PIL's image in RGB where simplejpeg does not decode it.

    Args:
        header: from `read_jpeg_header`.
        rows: how many are needed, from the top; there may be more.

    Raises:
        OSError: the file is no image, truncated or too large.
    """
    if header is not None:
        pixels = decode_rows(content, header, rows if rows is not None and header.top_down else header.height)
        if pixels is not None:
            return pixels
    return to_rgb(open_image(content))


def decode_rows(content: bytes | bytearray, header: JpegHeader, rows: int) -> Tensor | None:
    """simplejpeg's pixels, which are PIL's to the bit: (3, at least `rows`, W); None for any error in the file.

    Most of the time goes into Huffman decoding, which begins at the top: a copy of the file whose header has the image
    end below the crop saves what is below. The decoder then reports the skipped data, and nothing else if the rest is
    valid.
    """
    import simplejpeg  # needed by `--input fast` alone

    height = min(rows + MARGIN, header.height)
    if height < header.height:
        content = bytearray(content)
        struct.pack_into(">H", content, header.height_offset, height)
    pixels = np.empty((height, header.width, 3), np.uint8)
    try:
        simplejpeg.decode_jpeg(content, buffer=pixels)
    except ValueError as error:
        if height == header.height or not SKIPPED_ROWS.fullmatch(str(error)):
            return None
    return torch.from_numpy(pixels).permute(2, 0, 1)
