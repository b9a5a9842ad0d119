"""How do the mini study's images get into a page without an image library? Binary PPM -> PNG, with zlib alone."""

from __future__ import annotations

import base64
import struct
import zlib


def png_of_ppm(ppm: bytes) -> bytes:
    """An 8-bit RGB PNG of a binary PPM (`P6`, maximum 255, header without comments), as the mini study's images are."""
    magic, size, maximum, pixels = ppm.split(b"\n", maxsplit=3)
    assert (magic, maximum) == (b"P6", b"255"), ppm[:20]
    width, height = size.split()
    row = 3 * int(width)
    lines = b"".join(b"\x00" + pixels[start : start + row] for start in range(0, row * int(height), row))
    header = struct.pack(">IIBBBBB", int(width), int(height), 8, 2, 0, 0, 0)
    chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(lines, 9)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def data_uri(png: bytes) -> str:
    """The PNG as the `src` of an image."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
