"""How does an image file become the numbers that a backbone takes: decode, letterbox, normalise.

Legend: C channels (3, RGB), H x W pixels.

The steps are the reference's (prismatic-vlms: `letterbox`, then timm's evaluation transform), so two things are
deliberate: the rotation that EXIF data ask for is not applied, and transparency is dropped.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vlmx.cache_specs.geometry import Geometry

if TYPE_CHECKING:
    from numpy.typing import NDArray

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC}
MAX_CANVAS_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # where Pillow itself refuses to decode
# What Pillow's decoders are known to raise on damaged files.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class UndecodableImage(Exception):
    """A file that is not a whole image; `reason` is one line for the user."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def source_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) in pixels that a file's header states; None if it has none. The pixels are not decoded."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except DAMAGE:
        return None


def decode(data: bytes) -> Image.Image:
    """Decode all pixels of a file (the first frame of an animation) to RGB.

    Raises:
        UndecodableImage: the file is empty, truncated, no image, or has no pixels, or none with a known range.
    """
    if not data:
        raise UndecodableImage("the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if 0 in image.size:
                raise UndecodableImage(f"the image has no pixels ({image.size[0]}x{image.size[1]})")
            return _eight_bits(image).convert("RGB")
    except DAMAGE as error:
        reason = "not an image that Pillow knows" if "cannot identify" in str(error) else str(error) or repr(error)
        raise UndecodableImage(reason.splitlines()[0]) from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image of more than 8 bits a channel with its values divided, where Pillow would clip them: all white.

    Raises:
        UndecodableImage: its numbers have no range that could be called black to white.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # both reach from 0 to 65535
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise UndecodableImage(f"its pixels are {kind}, of which none is known to be white")
    return image


def place(image: Image.Image, geometry: Geometry) -> Image.Image:
    """Pad at native size, resize, and cut (width, height) of `geometry` out, as `Geometry.place` says.

    Raises:
        UndecodableImage: the image is so elongated that its padded canvas would have more pixels than Pillow decodes.
    """
    placement = geometry.place(image.size)
    canvas_wh = placement.padded_wh
    if canvas_wh[0] * canvas_wh[1] > MAX_CANVAS_PIXELS:
        raise UndecodableImage(f"{image.size[0]}x{image.size[1]} is too elongated to be padded to {canvas_wh}")
    if canvas_wh != image.size:
        canvas = Image.new("RGB", canvas_wh, geometry.fill)
        canvas.paste(image, (placement.pad_left, placement.pad_top))
        image = canvas
    if image.size != placement.resized_wh:
        image = image.resize(placement.resized_wh, RESAMPLING[geometry.resampling])
    if image.size == (geometry.width, geometry.height):
        return image
    left, top = placement.crop_left, placement.crop_top
    return image.crop((left, top, left + geometry.width, top + geometry.height))


def normalise(image: Image.Image, mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """(value / 255 - mean) / std per channel, as float32 of shape (3, H, W)."""
    pixels_CHW = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / np.float32(255)
    pixels_CHW -= np.asarray(mean, dtype=np.float32)[:, None, None]
    pixels_CHW /= np.asarray(std, dtype=np.float32)[:, None, None]
    return np.ascontiguousarray(pixels_CHW)


def prepare(data: bytes, geometry: Geometry, mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """A file's bytes -> float32 (3, H, W), ready for the backbone.

    Raises:
        UndecodableImage: see `decode` and `place`.
    """
    return normalise(place(decode(data), geometry), mean, std)
