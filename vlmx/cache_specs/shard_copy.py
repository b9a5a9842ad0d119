"""How is a shard read from afar, from its first byte to its last, and known to be what was written?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from vlmx.cache_specs.checksum import crc32c
from vlmx.cache_specs.layout import shard_key
from vlmx.cache_specs.manifest import ShardRecord
from vlmx.cache_specs.object_files import ObjectTokenFiles
from vlmx.cache_specs.shards import NOTHING, digest_of, read_index
from vlmx.cache_specs.sizing import CRC_BYTES, index_bytes
from vlmx.cache_specs.token_files import TokenFileError

REQUEST_BYTES = 16 << 20


def checked_bytes(files: ObjectTokenFiles, record: ShardRecord, slots: int) -> Iterator[memoryview]:
    """The bytes of a shard, piece by piece; the last piece comes only if all of them are what was written.

    Args:
        files: of the cache.
        record: the shard's, from the manifest.
        slots: images of a full shard.

    Raises:
        TokenFileError: the shard is not there, or is not what the manifest says.
    """
    key = shard_key(record.index)
    tail, size = files.tail(key, index_bytes(slots))
    if size != record.bytes:
        raise TokenFileError(key, f"it is {size} bytes, {record.bytes} were written")
    try:
        index_S2 = read_index(tail, size, slots, None)
    except ValueError as error:
        raise TokenFileError(key, str(error)) from error
    ends_S = _ends(index_S2)
    if int(ends_S[-1]) != size - len(tail):
        raise TokenFileError(key, "its index does not name all of its bytes")
    every_byte = hashlib.sha256() if record.sha256 else None  # of caches that an earlier version made
    crcs: list[bytes] = []
    for first, last in _requests(ends_S):
        start = int(ends_S[first])
        piece = files.read(key, start, int(ends_S[last]))
        for chunk in range(first, last):
            content = piece[int(ends_S[chunk]) - start : int(ends_S[chunk + 1]) - start]
            crcs.append(bytes(content[-CRC_BYTES:]))
            if crc32c(content[:-CRC_BYTES]) != int.from_bytes(crcs[-1], "little"):
                raise TokenFileError(key, f"the image at byte {int(ends_S[chunk])} does not match its checksum")
        if every_byte is not None:
            every_byte.update(piece)
        yield piece
    if every_byte is not None:
        every_byte.update(tail)
        same = every_byte.hexdigest() == record.sha256
    else:
        same = digest_of(tail, crcs) == record.digest
    if not same:
        raise TokenFileError(key, "its digest is not the one in the manifest")
    yield memoryview(tail)


def _ends(index_S2: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each chunk ends, after a 0: in the order of the file, which is that of the slots."""
    lengths = index_S2[index_S2[:, 0] != NOTHING, 1]
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def _requests(ends_S: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """First and last (exclusive) chunk of each request."""
    first = 0
    while first < len(ends_S) - 1:
        last = int(np.searchsorted(ends_S, ends_S[first] + REQUEST_BYTES, side="right")) - 1
        last = max(last, first + 1)
        yield first, last
        first = last
