"""What are the bytes of one shard file?

The `sharding_indexed` layout of Zarr v3: the chunk of each image, image after image, then for every slot the offset and
the length of its chunk (little-endian uint64; both 2^64 - 1 for a slot that holds nothing), then the CRC-32C of that
index. A chunk is the image's tokens, or what Blosc makes of them, and the CRC-32C of those bytes. The files are equal
to the last byte to those that zarr-python writes.

Shapes: tokens_BND [images, tokens, channels] in storage dtype; index_S2 [slots, (offset, length)].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlmx.cache_specs.checksum import crc32c
from vlmx.cache_specs.places import Place
from vlmx.cache_specs.sizing import CRC_BYTES, index_bytes
from vlmx.cache_specs.spec import Codec

if TYPE_CHECKING:
    from typing_extensions import Buffer

ABSENT = 2**64 - 1
NOTHING = -1  # in an index that was read: offset and length of a slot that holds nothing
BLOSC = {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0}


@dataclass(frozen=True, kw_only=True)
class ShardDigest:
    """What the manifest remembers of a shard file.

    Attributes:
        bytes: its size.
        digest: see `digest_of`.
    """

    bytes: int
    digest: str


def write_shard(
    place: Place,
    key: str,
    tokens_BND: NDArray[Any],
    absent: Collection[int],
    slots: int,
    codec: Codec,
    before_end: Callable[[], None] | None = None,
) -> ShardDigest:
    """Write one shard file; when this returns, it is whole and survives a power loss.

    Args:
        place: of the cache.
        key: of the shard in it.
        tokens_BND: C-contiguous, little endian, at most `slots` images.
        absent: positions in tokens_BND that are not stored.
        slots: images of a full shard.
        codec: of the cache.
        before_end: called when all but the index is written; the file does not come to be if it raises.

    Raises:
        OutOfSpaceError: the disk is full.
    """
    crcs: list[bytes] = []
    tail = b""

    def parts() -> Iterator[Buffer]:
        nonlocal tail
        index_S2 = np.full((slots, 2), ABSENT, dtype="<u8")
        offset = 0
        for slot, tokens_ND in enumerate(tokens_BND):
            if slot in absent:
                continue
            content: Any = encode_chunk(tokens_ND, codec)
            crcs.append(crc32c(content).to_bytes(CRC_BYTES, "little"))
            yield content
            yield crcs[-1]
            length = memoryview(content).nbytes + CRC_BYTES
            index_S2[slot] = (offset, length)
            offset += length
        tail = index_S2.tobytes()
        tail += crc32c(tail).to_bytes(CRC_BYTES, "little")
        if before_end is not None:
            before_end()
        yield tail

    written = place.write_stream(key, parts())
    return ShardDigest(bytes=written, digest=digest_of(tail, crcs))


def digest_of(tail: bytes, crcs: Iterable[bytes]) -> str:
    """The digest of a shard: SHA-256 of its index (with its checksum), then of the checksum of each chunk, in order.

    It changes with every change of the file that the checksums notice, and costs nothing, where SHA-256 of all bytes
    costs twice as much as writing them.
    """
    digest = hashlib.sha256(tail)
    for crc in crcs:
        digest.update(crc)
    return digest.hexdigest()


def encode_chunk(tokens_ND: NDArray[Any], codec: Codec) -> NDArray[Any] | bytes:
    """The bytes of one image's chunk, without their checksum."""
    if codec == "crc32c":
        return tokens_ND
    compressed: bytes = _blosc(tokens_ND.itemsize).encode(tokens_ND)
    return compressed


def decode_chunk(content: Buffer, codec: Codec, out_ND: NDArray[Any]) -> None:
    """The inverse of `encode_chunk`, into `out_ND` (C-contiguous).

    Raises:
        ValueError: the bytes are not what `encode_chunk` gives for such tokens.
    """
    if codec == "crc32c":
        out_ND.data.cast("B")[:] = memoryview(content).cast("B")
        return
    try:
        _blosc(out_ND.itemsize).decode(content, out=out_ND)
    except RuntimeError as error:
        raise ValueError(f"Blosc cannot decompress it: {error}") from error


@cache
def _blosc(item_bytes: int) -> Any:
    from numcodecs.blosc import BITSHUFFLE, Blosc

    return Blosc(
        cname=BLOSC["cname"],
        clevel=BLOSC["clevel"],
        shuffle=BITSHUFFLE,
        blocksize=BLOSC["blocksize"],
        typesize=item_bytes,
    )


def read_index(tail: bytes, size: int, slots: int, chunk_bytes: int | None) -> NDArray[np.int64]:
    """Where each slot's chunk lies in a shard file.

    Args:
        tail: the last `sizing.index_bytes(slots)` bytes of the file, or all of it if it is shorter.
        size: bytes of the file.
        slots: images of a full shard.
        chunk_bytes: length of every chunk, its checksum included; None where chunks are compressed.

    Returns:
        index_S2: offset and length (checksum included); -1 and -1 for a slot that holds nothing.

    Raises:
        ValueError: the index is not what was written; the message says how.
    """
    length = index_bytes(slots)
    if len(tail) != length:
        raise ValueError(f"it is {size} bytes, shorter than its index of {length}")
    if crc32c(tail[:-CRC_BYTES]) != int.from_bytes(tail[-CRC_BYTES:], "little"):
        raise ValueError("its index does not match its checksum")
    stored_S2 = np.frombuffer(tail[:-CRC_BYTES], dtype="<u8").reshape(slots, 2)
    index_S2: NDArray[np.int64] = stored_S2.astype(np.int64)  # 2^64 - 1 becomes -1
    held_S = (index_S2 != NOTHING).any(axis=1)
    offsets, lengths = index_S2[held_S].T
    fine = (offsets >= 0) & (lengths > CRC_BYTES) & (offsets <= size - length - lengths)
    fine &= lengths == (lengths if chunk_bytes is None else chunk_bytes)
    if not fine.all():
        slot = int(np.flatnonzero(held_S)[int(np.flatnonzero(~fine)[0])])
        offset, count = (int(number) for number in stored_S2[slot])
        expected = "" if chunk_bytes is None else f", a chunk is {chunk_bytes}"
        raise ValueError(f"its index names {count} bytes at {offset} of {size}{expected}")
    return index_S2


def crc_matches(content: Any, crc: bytes | bytearray | memoryview) -> bool:
    """Whether the bytes of `content`, an array or other C-contiguous memory, have the stored checksum."""
    return bool(crc32c(content) == int.from_bytes(crc, "little"))
