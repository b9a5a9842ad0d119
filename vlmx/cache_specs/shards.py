"""What are the bytes of one shard file?

The `sharding_indexed` layout of Zarr v3, without compression: the tokens of each image and the CRC-32C of those
bytes, image after image, then for every slot its offset and length (little-endian uint64; both 2^64 - 1 for a slot that
holds nothing), then the CRC-32C of that index. The files are equal to the last byte to those that zarr-python writes.

Shapes: tokens_BND [images, tokens, channels] in storage dtype.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from vlmx.cache_specs.sizing import CRC_BYTES, index_bytes

ABSENT = 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class ShardDigest:
    """What the manifest remembers of a shard file."""

    bytes: int
    sha256: str


def write_shard(path: Path, tokens_BND: NDArray[Any], absent: Collection[int], slots: int) -> ShardDigest:
    """Write one shard file and bring it to the disk.

    Args:
        path: an unused name; the caller renames it.
        tokens_BND: C-contiguous, little endian, at most `slots` images.
        absent: positions in tokens_BND that are not stored.
        slots: images of a full shard.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    index = np.full((slots, 2), ABSENT, dtype="<u8")
    digest = hashlib.sha256()
    offset = 0
    with open(path, "wb") as file:
        for slot, tokens_ND in enumerate(tokens_BND):
            if slot in absent:
                continue
            crc = google_crc32c.value(tokens_ND).to_bytes(CRC_BYTES, "little")
            for part in (tokens_ND.data, crc):
                file.write(part)
                digest.update(part)
            index[slot] = (offset, tokens_ND.nbytes + CRC_BYTES)
            offset += tokens_ND.nbytes + CRC_BYTES
        tail = index.tobytes()
        tail += google_crc32c.value(tail).to_bytes(CRC_BYTES, "little")
        file.write(tail)
        digest.update(tail)
        file.flush()
        os.fsync(file.fileno())
    return ShardDigest(bytes=offset + len(tail), sha256=digest.hexdigest())


def read_index(descriptor: int, slots: int, chunk_bytes: int) -> list[int | None]:
    """The offset of each slot's chunk in an open shard file, None where there is none.

    Args:
        descriptor: the open file.
        slots: images of a full shard.
        chunk_bytes: length of one chunk, its checksum included.

    Raises:
        ValueError: the index is not what was written; the message says how.
        OSError: the file cannot be read.
    """
    size = os.fstat(descriptor).st_size
    length = index_bytes(slots)
    tail = os.pread(descriptor, length, max(0, size - length))
    if len(tail) != length:
        raise ValueError(f"it is {size} bytes, shorter than its index of {length}")
    if google_crc32c.value(tail[:-CRC_BYTES]) != int.from_bytes(tail[-CRC_BYTES:], "little"):
        raise ValueError("its index does not match its checksum")
    offsets: list[int | None] = []
    for offset, count in np.frombuffer(tail[:-CRC_BYTES], dtype="<u8").reshape(slots, 2).tolist():
        if offset == ABSENT and count == ABSENT:
            offsets.append(None)
        elif count == chunk_bytes and offset + count <= size - length:
            offsets.append(offset)
        else:
            raise ValueError(f"its index names {count} bytes at {offset} of {size}, a chunk is {chunk_bytes}")
    return offsets


def crc_matches(chunk: NDArray[Any], crc: bytes | bytearray) -> bool:
    """Whether the bytes of C-contiguous `chunk` have the stored checksum."""
    return bool(google_crc32c.value(chunk) == int.from_bytes(crc, "little"))
