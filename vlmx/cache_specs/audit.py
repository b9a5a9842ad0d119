"""Is a cache what was written, and what is in it?"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmx.cache_specs.layout import PROVENANCE, shard_path
from vlmx.cache_specs.manifest import Header, ShardRecord, is_sealed, read_manifest
from vlmx.cache_specs.shards import crc_matches, read_index
from vlmx.cache_specs.sizing import CRC_BYTES, image_bytes
from vlmx.cache_specs.spec import CacheSpec, TokenShape
from vlmx.errors import CacheCorruptError


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a verification found.

    Attributes:
        path: the cache's folder.
        full: whether every byte was read, or only sizes and indices.
        sealed: whether the extraction came to its end.
        shards, images, failed: committed shards, images with tokens, images that could not be decoded.
        bytes: of all shard files that were looked at.
        damaged: shard index -> what is wrong with it.
        problems: what is wrong with the cache as a whole.
    """

    path: Path
    full: bool
    sealed: bool
    shards: int
    images: int
    failed: int
    bytes: int
    damaged: Mapping[int, str]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not (self.damaged or self.problems)


def verify(path: Path, *, full: bool) -> Report:
    """Check a cache.

    Args:
        path: the cache's folder.
        full: read every byte and compare each image's checksum and each shard's SHA-256; otherwise the manifest,
            the seal, the size of each shard and the checksum of its index.

    Raises:
        CacheError: there is no cache at `path`, or another version of vlmx made it.
        CacheCorruptError: the manifest itself is damaged.
    """
    manifest = read_manifest(path)
    problems = []
    sealed = False
    try:
        sealed = is_sealed(path, manifest)
    except CacheCorruptError as error:
        problems.append(str(error))
    damaged = {}
    total = 0
    for index, shard in sorted(manifest.shards.items()):
        problem = _shard_problem(path, manifest.header, shard, full=full)
        if problem:
            damaged[index] = problem
        else:
            total += shard.bytes
    return Report(
        path=path,
        full=full,
        sealed=sealed,
        shards=len(manifest.shards),
        images=sum(len(shard.ids) - len(shard.failed) for shard in manifest.shards.values()),
        failed=len(manifest.failed),
        bytes=total,
        damaged=damaged,
        problems=tuple(problems),
    )


def _shard_problem(cache: Path, header: Header, shard: ShardRecord, *, full: bool) -> str:
    """What is wrong with one shard, or nothing."""
    chunk_bytes = image_bytes(header.shape, header.spec.dtype) + CRC_BYTES
    try:
        descriptor = os.open(shard_path(cache, shard.index), os.O_RDONLY)
    except FileNotFoundError:
        return "its file does not exist"
    try:
        size = os.fstat(descriptor).st_size
        if size != shard.bytes:
            return f"it is {size} bytes, {shard.bytes} were written"
        offsets = read_index(descriptor, header.images_per_shard, chunk_bytes)
        for slot, offset in enumerate(offsets):
            expected = slot < len(shard.ids) and shard.ids[slot] not in shard.failed
            if expected != (offset is not None):
                return f"slot {slot} is {'absent' if expected else 'filled'}, against the manifest"
        return _content_problem(descriptor, shard, offsets, chunk_bytes) if full else ""
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    finally:
        os.close(descriptor)


def _content_problem(descriptor: int, shard: ShardRecord, offsets: list[int | None], chunk_bytes: int) -> str:
    wrong = []
    for image, offset in zip(shard.ids, offsets, strict=False):  # a partial shard has more slots than images
        if offset is None:
            continue
        chunk = os.pread(descriptor, chunk_bytes, offset)
        if not crc_matches(np.frombuffer(chunk[:-CRC_BYTES], dtype=np.uint8), chunk[-CRC_BYTES:]):
            wrong.append(image)
    if wrong:
        return f"{len(wrong)} images do not match their checksums: {', '.join(wrong[:3])}"
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(0)
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            return "its SHA-256 is not the one in the manifest"
    return ""


@dataclass(frozen=True, kw_only=True)
class CacheInfo:
    """What `vlmx cache info` shows.

    Attributes:
        path: the cache's folder.
        spec: the identity of the tokens.
        shape: token grid and width of one image.
        images_per_shard, shards, images, bytes: how much is there.
        failed: image id -> why it could not be decoded.
        sealed: whether the extraction came to its end.
        runs: provenance, one mapping for each extraction, oldest first.
    """

    path: Path
    spec: CacheSpec
    shape: TokenShape
    images_per_shard: int
    shards: int
    images: int
    bytes: int
    failed: Mapping[str, str]
    sealed: bool
    runs: tuple[Mapping[str, Any], ...]


def info(path: Path) -> CacheInfo:
    """Describe a cache from its manifest; no shard is opened.

    Raises:
        CacheError: there is no cache at `path`, or another version of vlmx made it.
        CacheCorruptError: the manifest is damaged, or the seal does not fit it.
    """
    manifest = read_manifest(path)
    return CacheInfo(
        path=path,
        spec=manifest.header.spec,
        shape=manifest.header.shape,
        images_per_shard=manifest.header.images_per_shard,
        shards=len(manifest.shards),
        images=sum(len(shard.ids) - len(shard.failed) for shard in manifest.shards.values()),
        bytes=sum(shard.bytes for shard in manifest.shards.values()),
        failed=manifest.failed,
        sealed=is_sealed(path, manifest),
        runs=tuple(read_runs(path)),
    )


def read_runs(path: Path) -> list[Mapping[str, Any]]:
    """How each extraction into the cache in folder `path` was made, oldest first."""
    provenance = path / PROVENANCE
    if not provenance.exists():
        return []
    runs = []
    for line in provenance.read_text().splitlines():
        try:
            runs.append(json.loads(line))
        except ValueError:
            runs.append({"unreadable": line[:80]})  # a line that was cut off when its writer was killed
    return runs
