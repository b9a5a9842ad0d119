"""Is a manifest that was cut off told from one that is damaged?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmx.cache_specs.geometry import Geometry
from vlmx.cache_specs.manifest import (
    MANIFEST,
    SEAL,
    Header,
    ShardRecord,
    _with_crc,
    header_line,
    is_sealed,
    read_manifest,
    seal_content,
    shard_line,
)
from vlmx.cache_specs.spec import CacheSpec, TokenShape
from vlmx.errors import CacheCorruptError, CacheError

HEADER = Header(
    spec=CacheSpec(
        backbone="vit-s-in21k",
        weights_sha256="random:0",
        forward_version=1,
        feature="last",
        out_norm="layernorm",
        geometry=Geometry(mode="letterbox", height=32, width=48, fill=(127, 127, 127)),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    ),
    shape=TokenShape(grid=(2, 3), dim=4),
    images_per_shard=2,
)
FIRST = ShardRecord(index=0, ids=("a" * 64, "b" * 64), failed={}, bytes=100, digest="1" * 64)
SECOND = ShardRecord(index=1, ids=("c" * 64, "d" * 64), failed={"c" * 64: "truncated"}, bytes=90, sha256="2" * 64)
FORMAT_1 = header_line(HEADER).replace(b'"format":2', b'"format":1')  # as an earlier version wrote it
FORMAT_1 = _with_crc(FORMAT_1[: FORMAT_1.rindex(b',"crc32c"')] + b"}")
LINES = [header_line(HEADER), shard_line(FIRST), shard_line(SECOND)]


def write(cache: Path, content: bytes) -> Path:
    (cache / MANIFEST).write_bytes(content)
    return cache


def test_what_was_written_is_read(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path, b"".join(LINES)))
    assert manifest.header == HEADER
    assert manifest.shards == {0: FIRST, 1: SECOND}
    assert manifest.failed == {"c" * 64: "truncated"}
    assert manifest.num_rows == 4
    assert manifest.to_bytes() == b"".join(LINES)


def test_the_lines_are_json_without_times() -> None:
    header, shard, _ = (json.loads(line) for line in LINES)
    assert header.keys() == {"kind", "format", "spec", "fingerprint", "grid", "dim", "images_per_shard", "crc32c"}
    assert (header["grid"], header["dim"]) == ([2, 3], 4)
    assert shard.keys() == {"kind", "index", "ids", "failed", "bytes", "digest", "crc32c"}


@pytest.mark.parametrize("lost", [1, 2, 30, len(LINES[2]) - 1])
def test_a_torn_last_line_is_dropped(tmp_path: Path, lost: int) -> None:
    manifest = read_manifest(write(tmp_path, b"".join([FORMAT_1, *LINES[1:]])[:-lost]))
    assert manifest.shards == {0: FIRST}
    assert manifest.to_bytes() == LINES[0] + LINES[1]


def test_every_flipped_byte_before_the_last_line_is_damage(tmp_path: Path) -> None:
    whole = b"".join(LINES)
    for position in range(0, len(LINES[0]) + len(LINES[1]), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        with pytest.raises(CacheCorruptError, match="is damaged"):
            read_manifest(write(tmp_path, bytes(damaged)))


def test_a_shard_that_comes_twice_is_damage(tmp_path: Path) -> None:
    with pytest.raises(CacheCorruptError, match="line 3"):
        read_manifest(write(tmp_path, LINES[0] + LINES[1] + LINES[1]))


def test_no_manifest_an_empty_one_and_a_newer_format(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="is not a cache"):
        read_manifest(tmp_path)
    with pytest.raises(CacheCorruptError, match="no header"):
        read_manifest(write(tmp_path, b""))
    with pytest.raises(CacheError, match="unknown format"):
        read_manifest(write(tmp_path, LINES[1]))


def test_a_seal_belongs_to_its_shards(tmp_path: Path) -> None:
    write(tmp_path, b"".join(LINES))
    manifest = read_manifest(tmp_path)
    assert not is_sealed(tmp_path, manifest)
    seal = seal_content(manifest)
    assert (seal["images"], seal["failed"], seal["shards"], seal["bytes"]) == (3, 1, 2, 190)
    (tmp_path / SEAL).write_text(json.dumps(seal))
    assert is_sealed(tmp_path, manifest)
    write(tmp_path, b"".join(LINES[:2]))
    with pytest.raises(CacheCorruptError, match="different shards"):
        is_sealed(tmp_path, read_manifest(tmp_path))
    (tmp_path / SEAL).write_text("{")
    with pytest.raises(CacheCorruptError, match="different shards"):
        is_sealed(tmp_path, manifest)
