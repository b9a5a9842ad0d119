"""Is a cache what was written, and how was it made?

A full verification reads every byte once: the same pass gives the CRC-32C of each image and the SHA-256 of each shard.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmx.cache_specs.layout import PROVENANCE, metadata, shard_key
from vlmx.cache_specs.manifest import COMMITS, Header, Manifest, ShardRecord, read_manifest, read_sealed
from vlmx.cache_specs.places import LocalPlace, Place, place_of
from vlmx.cache_specs.shards import NOTHING, crc_matches, digest_of, read_index
from vlmx.cache_specs.sizing import CRC_BYTES, image_bytes, index_bytes
from vlmx.cache_specs.token_files import TokenFileError, TokenFiles, Wanted
from vlmx.console import Progress, progress
from vlmx.errors import CacheCorruptError

MB = 1_000_000
PIECE_BYTES = 8 * MB  # read at once by each thread; more where one image takes more
LOCAL_THREADS_MAX = 32
REMOTE_THREADS = 16  # shards in flight: an object store answers many requests at a time


@dataclass(frozen=True, kw_only=True)
class ShardDamage:
    """What is wrong with a shard.

    Attributes:
        index: of the shard.
        key: its file, below the cache's folder.
        why: one line.
        images: the images that cannot be trusted -> where the bytes of each begin in the file, if that is known.
    """

    index: int
    key: str
    why: str
    images: Mapping[str, int | None]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a verification found.

    Attributes:
        place: the cache.
        full: whether every byte was read, or only sizes and indices.
        sealed: whether the extraction came to its end.
        shards, images, failed: committed shards, images with tokens, images that could not be decoded.
        bytes: of all intact shards.
        damaged: by shard index.
        metadata: files of the Zarr group that other programs cannot read the tokens with as they are -> why.
        problems: what is wrong with the cache as a whole.
    """

    place: Place
    full: bool
    sealed: bool
    shards: int
    images: int
    failed: int
    bytes: int
    damaged: Mapping[int, ShardDamage]
    metadata: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not (self.damaged or self.metadata or self.problems)


def verify(cache: str | Path | Place, *, full: bool, threads: int | None = None) -> Report:
    """Check a cache. Memory is bounded by `threads` times 8 MB, or times one image where that is larger.

    Args:
        cache: its folder or url.
        full: read every byte and compare each image's checksum and each shard's digest; otherwise the manifest,
            the seal, the files that describe the Zarr array, the size of each shard and the checksum of its index.
        threads: that read shards side by side; default: cores for a disk, 16 for an object store.

    Raises:
        CacheError: there is no cache, or another version of vlmx made it.
        CacheCorruptError: the manifest itself is damaged.
    """
    place = place_of(cache)
    sealed = False
    problems = []
    try:
        manifest, sealed = read_sealed(place)
    except CacheCorruptError as error:
        manifest = read_manifest(place)  # raises, too, if it is not the seal that is damaged
        problems.append(f"{error.what}: {error.why}")
    problems += [f"{image} is in two shards" for image in _repeated(manifest)]
    problems += [
        f"{COMMITS}/{name} does not match its checksum, its shard counts as missing" for name in manifest.damaged
    ]
    damaged = _examine_all(place, manifest, full=full, threads=threads)
    return Report(
        place=place,
        full=full,
        sealed=sealed,
        shards=len(manifest.shards),
        images=sum(len(shard.ids) - len(shard.failed) for shard in manifest.shards.values()),
        failed=len(manifest.failed),
        bytes=sum(shard.bytes for index, shard in manifest.shards.items() if index not in damaged),
        damaged=damaged,
        metadata=wrong_metadata(place, manifest, sealed=sealed),
        problems=tuple(problems),
    )


def wrong_metadata(place: Place, manifest: Manifest, *, sealed: bool = True) -> dict[str, str]:
    """Files of the Zarr group, other than shards, that are not what the manifest calls for -> why.

    Args:
        sealed: False for a cache that is being filled: its files have the length of an earlier moment in them, and are
            only looked for.
    """
    wrong = {}
    for key, expected in metadata(manifest.header, manifest.num_rows):
        try:
            found = place.read(key)
        except FileNotFoundError:
            wrong[key] = "it does not exist"
            continue
        if sealed and found != expected and not (key.endswith(".json") and _same_json(found, expected)):
            wrong[key] = "it does not describe what the manifest says"
    return wrong


def read_runs(cache: str | Path | Place) -> list[Mapping[str, Any]]:
    """How each extraction into a cache was made, oldest first."""
    try:
        text = place_of(cache).read(PROVENANCE).decode(errors="replace")
    except FileNotFoundError:
        return []
    runs: list[Mapping[str, Any]] = []
    for line in text.splitlines():
        try:
            run = json.loads(line)
        except ValueError:
            run = None
        # a line that was cut off when its writer was killed is shown, but is none
        runs.append(run if isinstance(run, dict) else {"unreadable": line[:80]})
    return runs


def _repeated(manifest: Manifest) -> Iterator[str]:
    seen: set[str] = set()
    for shard in manifest.shards.values():
        yield from seen.intersection(shard.ids)
        seen.update(shard.ids)


def _same_json(found: bytes, expected: bytes) -> bool:
    try:
        return bool(json.loads(found) == json.loads(expected))
    except ValueError:
        return False


def _examine_all(place: Place, manifest: Manifest, *, full: bool, threads: int | None) -> dict[int, ShardDamage]:
    if threads is None:
        threads = min(LOCAL_THREADS_MAX, os.cpu_count() or 1) if place.is_local else REMOTE_THREADS
    files = _token_files(place)
    pool = ThreadPoolExecutor(threads)
    try:
        with progress(f"verify {place.name}", _megabytes(manifest), "MB") as bar:
            examine = _Examination(files, manifest.header, full=full, bar=bar)
            found = list(pool.map(examine, manifest.shards.values()))
            bar.advance(bar.total - bar.done)  # parts of a megabyte, and what damaged shards lack
    finally:
        pool.shutdown(cancel_futures=True)
        files.close()
    return {damage.index: damage for damage in found if damage is not None}


def _token_files(place: Place) -> TokenFiles:
    """For reading each file once: on a disk without mappings, whose pages would count as memory of this process."""
    if not isinstance(place, LocalPlace):
        return place.token_files()
    from vlmx.cache_specs.local_files import LocalTokenFiles

    return LocalTokenFiles(place.path, mapped=False)


def _megabytes(manifest: Manifest) -> int:
    return math.ceil(sum(shard.bytes for shard in manifest.shards.values()) / MB)


class _Examination:
    """Looks at one shard after the other; each thread has a buffer of its own."""

    def __init__(self, files: TokenFiles, header: Header, *, full: bool, bar: Progress) -> None:
        self._files = files
        self._header = header
        self._full = full
        self._bar = bar
        self._bar_lock = threading.Lock()
        self._bytes = 0  # that are not a megabyte yet
        self._local = threading.local()
        same_length = header.spec.codec == "crc32c"
        self._chunk_bytes = image_bytes(header.shape, header.spec.dtype) + CRC_BYTES if same_length else None

    def __call__(self, shard: ShardRecord) -> ShardDamage | None:
        key = shard_key(shard.index)
        places = self._regular_places(shard)
        everything = {image: places[image][0] if image in places else None for image in _stored(shard)}
        try:
            tail, size = self._files.tail(key, index_bytes(self._header.images_per_shard))
            if size != shard.bytes:
                return self._damage(shard, f"it is {size} bytes, {shard.bytes} were written", everything)
            index_S2 = read_index(tail, size, self._header.images_per_shard, self._chunk_bytes)
            if why := _against_manifest(shard, index_S2):
                return self._damage(shard, why, everything)
            if not self._full:
                self._tick(shard.bytes)
                return None
            return self._read(shard, index_S2)
        except TokenFileError as error:
            return self._damage(shard, error.why, everything)
        except ValueError as error:
            return self._damage(shard, str(error), everything)

    def _tick(self, count: int) -> None:
        with self._bar_lock:
            whole, self._bytes = divmod(self._bytes + count, MB)
            if whole:
                self._bar.advance(whole)

    def _regular_places(self, shard: ShardRecord) -> dict[str, tuple[int, int]]:
        """Offset and length of each image where all have one length, whatever the file says."""
        if self._chunk_bytes is None:
            return {}
        length = self._chunk_bytes
        return {image: (number * length, length) for number, image in enumerate(_stored(shard))}

    def _damage(self, shard: ShardRecord, why: str, images: Mapping[str, int | None]) -> ShardDamage:
        return ShardDamage(index=shard.index, key=shard_key(shard.index), why=why, images=images)

    def _read(self, shard: ShardRecord, index_S2: NDArray[np.int64]) -> ShardDamage | None:
        """Read the whole file: the images, in the order in which they lie in it, then its index."""
        every_byte = hashlib.sha256() if shard.sha256 else None
        crcs: list[bytes] = []
        wrong: dict[str, int | None] = {}
        position = 0
        for piece in _pieces(shard, index_S2):
            end = piece[-1][1] + piece[-1][2]
            buffer = self._fetch(shard, position, end - position)
            if every_byte is not None:
                every_byte.update(buffer)
            for image, offset, length in piece:
                chunk = buffer[offset - position : offset - position + length]
                crcs.append(bytes(chunk[-CRC_BYTES:]))
                if not crc_matches(np.frombuffer(chunk[:-CRC_BYTES], np.uint8), chunk[-CRC_BYTES:]):
                    wrong[image] = offset
            position = end
            self._tick(buffer.nbytes)
        tail = bytes(self._fetch(shard, position, shard.bytes - position))
        self._tick(len(tail))
        if wrong:
            return self._damage(shard, f"{len(wrong)} of its images do not match their checksums", wrong)
        if every_byte is not None:
            every_byte.update(tail)
            same = every_byte.hexdigest() == shard.sha256
        else:
            same = digest_of(tail, crcs) == shard.digest
        if not same:
            return self._damage(shard, "its digest is not the one in the manifest", dict.fromkeys(_stored(shard)))
        return None

    def _fetch(self, shard: ShardRecord, offset: int, length: int) -> memoryview:
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < length:
            buffer = self._local.buffer = bytearray(max(length, PIECE_BYTES))
        view = memoryview(buffer)[:length]
        self._files.fetch([Wanted(shard_key(shard.index), offset, (view,))])
        return view


def _stored(shard: ShardRecord) -> list[str]:
    """The images of a shard that have tokens."""
    return [image for image in shard.ids if image not in shard.failed]


def _against_manifest(shard: ShardRecord, index_S2: NDArray[np.int64]) -> str:
    """Where an index that is whole does not fit the manifest, or nothing."""
    position = 0
    for slot, (offset, length) in enumerate(index_S2.tolist()):
        expected = slot < len(shard.ids) and shard.ids[slot] not in shard.failed
        if expected != (offset != NOTHING):
            return f"slot {slot} is {'absent' if expected else 'filled'}, against the manifest"
        if not expected:
            continue
        if offset != position:
            return f"slot {slot} lies at {offset}, the one before it ends at {position}"
        position += length
    return ""


def _pieces(shard: ShardRecord, index_S2: NDArray[np.int64]) -> Iterator[list[tuple[str, int, int]]]:
    """The stored images with offset and length, in groups that are read at once."""
    piece: list[tuple[str, int, int]] = []
    total = 0
    for image, (offset, length) in zip(shard.ids, index_S2.tolist(), strict=False):  # a partial shard has more slots
        if offset == NOTHING:
            continue
        if piece and total + length > PIECE_BYTES:
            yield piece
            piece, total = [], 0
        piece.append((image, offset, length))
        total += length
    if piece:
        yield piece
