"""Which shards of a cache are committed, and what is in them?

`manifest.jsonl` is the only thing that readers trust: a header line, then one line for each committed shard. Each line
carries the CRC-32C of itself. A last line that does not match is what a killed writer leaves behind; it is dropped,
its shard was not committed. Anywhere else it is damage, an error. There are no times in it, because an interrupted
and an uninterrupted extraction must end with equal bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c

from vlmx.cache_specs.fingerprint import canonical_json
from vlmx.cache_specs.spec import CacheSpec, TokenShape
from vlmx.errors import CacheCorruptError, CacheError

FORMAT = 1
MANIFEST = "manifest.jsonl"
SEAL = "SEALED.json"

_CRC_LENGTH = len(',"crc32c":"00000000"}\n')


@dataclass(frozen=True, kw_only=True)
class Header:
    """The first line: what every shard holds.

    Attributes:
        spec: the identity of the tokens.
        shape: token grid and width of one image.
        images_per_shard: slots of one shard; row = shard index * images_per_shard + slot.
    """

    spec: CacheSpec
    shape: TokenShape
    images_per_shard: int


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One committed shard.

    Attributes:
        index: position of the shard along the array.
        ids: image ids by slot; at most images_per_shard of them.
        failed: those of `ids` that could not be decoded, and why; their slots hold nothing.
        bytes: size of the shard's file.
        sha256: digest of the shard's file, 64 hex digits.
    """

    index: int
    ids: tuple[str, ...]
    failed: Mapping[str, str]
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A manifest as it was read.

    Attributes:
        header: the first line.
        shards: committed shards by index.
        valid_bytes: length of the file without a torn last line.
    """

    header: Header
    shards: Mapping[int, ShardRecord] = field(default_factory=dict)
    valid_bytes: int

    @property
    def num_rows(self) -> int:
        """Length of the array's first axis: up to the last slot in use."""
        if not self.shards:
            return 0
        last = max(self.shards)
        return last * self.header.images_per_shard + len(self.shards[last].ids)

    @property
    def failed(self) -> dict[str, str]:
        """Images that could not be decoded, and why."""
        return {image: why for _, shard in sorted(self.shards.items()) for image, why in shard.failed.items()}


def header_line(header: Header) -> bytes:
    return _line(
        {
            "kind": "header",
            "format": FORMAT,
            "spec": header.spec.to_dict(),
            "fingerprint": header.spec.fingerprint,
            "grid": list(header.shape.grid),
            "dim": header.shape.dim,
            "images_per_shard": header.images_per_shard,
        }
    )


def shard_line(shard: ShardRecord) -> bytes:
    return _line(
        {
            "kind": "shard",
            "index": shard.index,
            "ids": list(shard.ids),
            "failed": dict(shard.failed),
            "bytes": shard.bytes,
            "sha256": shard.sha256,
        }
    )


def read_manifest(cache: Path) -> Manifest:
    """Read and check `<cache>/manifest.jsonl`.

    Raises:
        CacheError: there is none, or another version of vlmx made it.
        CacheCorruptError: a line other than the last is damaged.
    """
    path = cache / MANIFEST
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CacheError(
            f"{cache} is not a cache", why=f"it has no {MANIFEST}", fix="vlmx list caches shows those that exist"
        ) from error
    lines = raw.splitlines(keepends=True)
    records: list[dict[str, Any]] = []
    valid_bytes = 0
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is None and number == len(lines):
            break
        if record is None:
            raise CacheCorruptError(
                f"{path} is damaged", why=f"line {number} does not match its checksum", fix=_fix_manifest(cache)
            )
        records.append(record)
        valid_bytes += len(line)
    if not records:
        raise CacheCorruptError(f"{path} is damaged", why="it has no header", fix=_fix_manifest(cache))
    header = _read_header(records[0], path)
    shards: dict[int, ShardRecord] = {}
    for number, record in enumerate(records[1:], start=2):
        shard = _read_shard(record)
        if shard is None or shard.index in shards or not 0 < len(shard.ids) <= header.images_per_shard:
            raise CacheCorruptError(
                f"{path} is damaged", why=f"line {number} is not the line of a new shard", fix=_fix_manifest(cache)
            )
        shards[shard.index] = shard
    return Manifest(header=header, shards=shards, valid_bytes=valid_bytes)


def seal_content(manifest: Manifest) -> dict[str, Any]:
    """What SEALED.json says: a function of the manifest, so that a seal can be checked against it."""
    ordered = [manifest.shards[index] for index in sorted(manifest.shards)]
    digest = hashlib.sha256("".join(f"{shard.index} {shard.sha256}\n" for shard in ordered).encode())
    failed = sum(len(shard.failed) for shard in ordered)
    return {
        "format": FORMAT,
        "fingerprint": manifest.header.spec.fingerprint,
        "images": sum(len(shard.ids) for shard in ordered) - failed,
        "failed": failed,
        "shards": len(ordered),
        "bytes": sum(shard.bytes for shard in ordered),
        "digest": digest.hexdigest(),
    }


def is_sealed(cache: Path, manifest: Manifest) -> bool:
    """Whether the cache was declared complete.

    Raises:
        CacheCorruptError: there is a seal, but it is one of other shards.
    """
    try:
        text = (cache / SEAL).read_text()
    except FileNotFoundError:
        return False
    try:
        seal = json.loads(text)
    except ValueError:
        seal = None
    if seal != seal_content(manifest):
        raise CacheCorruptError(
            f"the seal of {cache} does not fit its manifest",
            why=f"{SEAL} and {MANIFEST} describe different shards",
            fix="copy the cache again from where it came, or give its `vlmx extract` command again",
        )
    return True


def _line(record: dict[str, Any]) -> bytes:
    return _with_crc(canonical_json(record).encode("ascii"))


def _with_crc(body: bytes) -> bytes:
    return body[:-1] + b',"crc32c":"%08x"}\n' % google_crc32c.value(body)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record of one line, or None when the line is not what was written."""
    body = line[:-_CRC_LENGTH] + b"}"
    if line != _with_crc(body):
        return None
    record: dict[str, Any] = json.loads(body)
    return record


def _read_header(record: Mapping[str, Any], path: Path) -> Header:
    if record.get("kind") != "header" or record.get("format") != FORMAT:
        raise CacheError(
            f"{path} has an unknown format",
            why=f"it is format {record.get('format')!r}, this vlmx knows {FORMAT}",
            fix="use the version of vlmx that made it, or extract again",
        )
    spec = CacheSpec.from_dict(record["spec"])
    if spec.fingerprint != record["fingerprint"]:
        raise CacheError(
            f"{path} has a spec that does not match its fingerprint",
            why=f"{spec.fingerprint[:12]} is not {record['fingerprint'][:12]}",
            fix="use the version of vlmx that made it, or extract again",
        )
    return Header(
        spec=spec,
        shape=TokenShape(grid=(record["grid"][0], record["grid"][1]), dim=record["dim"]),
        images_per_shard=record["images_per_shard"],
    )


def _read_shard(record: Mapping[str, Any]) -> ShardRecord | None:
    if set(record) != {"kind", "index", "ids", "failed", "bytes", "sha256"} or record["kind"] != "shard":
        return None
    return ShardRecord(
        index=record["index"],
        ids=tuple(record["ids"]),
        failed=record["failed"],
        bytes=record["bytes"],
        sha256=record["sha256"],
    )


def _fix_manifest(cache: Path) -> str:
    return f"copy {cache} again from where it came, or delete it and extract again"
