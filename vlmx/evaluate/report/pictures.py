"""How do images get into a page that needs no network? Mini scenes and maps as PNG, photos as small JPEG, in the page.

Shapes: pixels_HW3 is an image of H rows, W columns and red, green, blue, 0..255.
"""

from __future__ import annotations

import base64
import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vlmx.console import note
from vlmx.data.records import Question
from vlmx.errors import DataError

Pixels = npt.NDArray[np.uint8]
MOST_PX = 480  # longer side of a photo in the page
_QUALITY = 82


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image inside the page.

    Attributes:
        uri: the `src` of an image.
        source_wh: width and height of the original in pixels.
        pixelated: whether single pixels are meant to be seen.
    """

    uri: str
    source_wh: tuple[int, int]
    pixelated: bool


def picture_of(question: Question, data_root: Path) -> Picture | None:
    """The question's image where it is at hand: drawn by the mini study, or a photo below the data root.

    Of a file that is there and is no image, or a damaged one, this is noted.
    """
    from vlmx.data.mini.study import BENCHMARKS, image_bytes_of
    from vlmx.evaluate.maps_plot import pixels_of

    if question.benchmark in BENCHMARKS:
        pixels_HW3 = _pixels_of_ppm(image_bytes_of(question.image))
        return Picture(uri=data_uri(png_of(pixels_HW3)), source_wh=_wh(pixels_HW3), pixelated=True)
    path = data_root / question.image
    if not path.is_file():
        return None
    try:
        pixels_HW3 = pixels_of(path.read_bytes(), name=str(path))
    except DataError as error:
        note(f"{error.what}: {error.why}; the page goes without this photo")
        return None
    return Picture(uri=_jpeg_uri(smaller(pixels_HW3, MOST_PX)), source_wh=_wh(pixels_HW3), pixelated=False)


def _wh(pixels_HW3: Pixels) -> tuple[int, int]:
    return pixels_HW3.shape[1], pixels_HW3.shape[0]


def _pixels_of_ppm(ppm: bytes) -> Pixels:
    """A binary PPM (`P6`, maximum 255, header without comments), as the mini study's images are."""
    magic, size, maximum, pixels = ppm.split(b"\n", maxsplit=3)
    assert (magic, maximum) == (b"P6", b"255"), ppm[:20]
    width, height = map(int, size.split())
    return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)


def smaller(pixels_HW3: Pixels, most_px: int) -> Pixels:
    """The image with whole blocks of pixels averaged, so that no side is above `most_px`; a rest at the edge is cut."""
    height, width, _ = pixels_HW3.shape
    block = -(-max(height, width) // most_px)
    if block == 1:
        return pixels_HW3
    rows, columns = height // block, width // block
    if not (rows and columns):  # a strip narrower than a block
        return pixels_HW3
    blocks = pixels_HW3[: rows * block, : columns * block].reshape(rows, block, columns, block, 3)
    means: Pixels = np.round(blocks.mean(axis=(1, 3), dtype=np.float32)).astype(np.uint8)
    return means


def png_of(pixels_HW3: Pixels) -> bytes:
    """An 8-bit RGB PNG, with zlib alone."""
    height, width, _ = pixels_HW3.shape
    lines = np.zeros((height, 1 + 3 * width), np.uint8)  # each line begins with its filter, 0 for none
    lines[:, 1:] = pixels_HW3.reshape(height, 3 * width)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def data_uri(png: bytes) -> str:
    """The PNG as the `src` of an image."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _jpeg_uri(pixels_HW3: Pixels) -> str:
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, pixels_HW3, format="jpg", pil_kwargs={"quality": _QUALITY})
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
