"""Which shards of a cache are committed, and what is in them?

`manifest.jsonl` is a header line, then one line for each committed shard; what was committed since it was written lies
in `commits/`, a file with such a line for each shard. Readers trust these and nothing else. Each line carries the
CRC-32C of itself. There are no times in it, because an interrupted and an uninterrupted extraction, by one process or
by many, must end with equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c

from vlmx.cache_specs.fingerprint import canonical_json
from vlmx.cache_specs.places import Place, place_of
from vlmx.cache_specs.spec import CacheSpec, TokenShape
from vlmx.errors import CacheCorruptError, CacheError

if TYPE_CHECKING:
    from vlmx.cache_specs.quantize import Quantization, QuantizationError

FORMAT = 2
FORMATS = (1, 2)  # those that are read; in the first, a shard has a SHA-256 of its file in place of the digest
MANIFEST = "manifest.jsonl"
COMMITS = "commits"
SEAL = "SEALED.json"
READS_AT_ONCE = 16
SEAL_READS = 5

_CRC_LENGTH = len(',"crc32c":"00000000"}\n')


@dataclass(frozen=True, kw_only=True)
class Header:
    """The first line: what every shard holds.

    Attributes:
        spec: the identity of the tokens.
        shape: token grid and width of one image.
        images_per_shard: slots of one shard; row = shard index * images_per_shard + slot.
        quantization: the scales of an 8-bit cache; None in others.
    """

    spec: CacheSpec
    shape: TokenShape
    images_per_shard: int
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        assert (self.quantization is not None) == (self.spec.dtype == "int8")


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One committed shard.

    Attributes:
        index: position of the shard along the array.
        ids: image ids by slot; at most images_per_shard of them.
        failed: those of `ids` that could not be decoded, and why; their slots hold nothing.
        bytes: size of the shard's file.
        digest: `shards.digest_of` the file, 64 hex digits; empty in a cache that an earlier version made.
        sha256: SHA-256 of the file, 64 hex digits, in a cache that an earlier version made; else empty.
        error: what 8 bits lost on its images; None in caches of more bits.
    """

    index: int
    ids: tuple[str, ...]
    failed: Mapping[str, str]
    bytes: int
    digest: str = ""
    sha256: str = ""
    error: QuantizationError | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A manifest as it was read.

    Attributes:
        header: the first line.
        shards: committed shards by index, in the order of their indices.
        damaged: files in `commits/` that are not what was written; the next writer makes their shards again.
    """

    header: Header
    shards: Mapping[int, ShardRecord] = field(default_factory=dict)
    damaged: tuple[str, ...] = ()

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
        return {image: why for shard in self.shards.values() for image, why in shard.failed.items()}

    @property
    def error(self) -> QuantizationError:
        """What 8 bits lost on all images."""
        from vlmx.cache_specs.quantize import QuantizationError

        return sum((shard.error for shard in self.shards.values() if shard.error), QuantizationError())

    def to_bytes(self) -> bytes:
        """The file `manifest.jsonl`."""
        return header_line(self.header) + b"".join(map(shard_line, self.shards.values()))


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
            **({} if header.quantization is None else {"quantization": header.quantization.to_dict()}),
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
            **({"sha256": shard.sha256} if shard.sha256 else {"digest": shard.digest}),
            **({} if shard.error is None else {"error": asdict(shard.error)}),
        }
    )


def commit_key(index: int) -> str:
    """The file that says that a shard is committed, until the manifest does."""
    return f"{COMMITS}/{index}.json"


def read_manifest(cache: str | Path | Place) -> Manifest:
    """Read and check the manifest of a cache, and what was committed since it was written.

    Records that are damaged count as not written: their shards are not committed, and `damaged` names them.

    Raises:
        CacheError: there is none, or another version of vlmx made it.
        CacheCorruptError: a line of the manifest is damaged. A torn last line of format 1 is not: vlmx left one behind
            when it was killed.
    """
    place = place_of(cache)
    # first these: one that vanishes now is in the manifest when that is read
    names = place.names(COMMITS)
    committed, damaged = read_commits(place, names)
    try:
        raw = place.read(MANIFEST)
    except FileNotFoundError as error:
        raise CacheError(
            f"{place} is not a cache", why=f"it has no {MANIFEST}", fix="vlmx list caches shows those that exist"
        ) from error
    lines = raw.splitlines(keepends=True)
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is None and number == len(lines) > 1 and records[0].get("format") == 1:
            break
        if record is None:
            raise _damaged(place, f"line {number} does not match its checksum")
        records.append(record)
    if not records:
        raise _damaged(place, "it has no header")
    header = _read_header(records[0], place)
    shards: dict[int, ShardRecord] = {}
    for number, record in enumerate(records[1:], start=2):
        shard = _read_shard(record)
        if shard is None or shard.index in shards or not 0 < len(shard.ids) <= header.images_per_shard:
            raise _damaged(place, f"line {number} is not the line of a new shard")
        shards[shard.index] = shard
    for shard in committed:
        shards.setdefault(shard.index, shard)  # the manifest is never older
    return Manifest(header=header, shards=dict(sorted(shards.items())), damaged=tuple(damaged))


def read_sealed(cache: str | Path | Place) -> tuple[Manifest, bool]:
    """The manifest, and whether the cache was declared complete; consistent also while somebody writes it.

    Raises:
        CacheError, CacheCorruptError: see `read_manifest`; or there is a seal, but it is one of other shards.
    """
    place = place_of(cache)
    for attempt in range(SEAL_READS):
        manifest = read_manifest(place)
        try:
            return manifest, is_sealed(place, manifest)
        except CacheCorruptError:
            if attempt == SEAL_READS - 1:
                raise
            time.sleep(0.05 * attempt)  # the manifest was read before, and the seal after somebody sealed
    raise AssertionError("unreachable")


def read_commits(place: Place, names: Iterable[str]) -> tuple[list[ShardRecord], list[str]]:
    """The records of shards that were committed since the manifest was written.

    Args:
        place: of the cache.
        names: files in `commits/`; those that are gone are left out: the manifest has them.

    Returns:
        The records, and the names of files that are not what was written.
    """
    damaged: list[str] = []

    def record_of(name: str) -> ShardRecord | None:
        try:
            line = place.read(f"{COMMITS}/{name}")
        except FileNotFoundError:
            return None
        parsed = _parse(line)
        shard = None if parsed is None else _read_shard(parsed)
        if shard is None or not shard.ids or commit_key(shard.index) != f"{COMMITS}/{name}":
            damaged.append(name)
            return None
        return shard

    finished = [name for name in names if name.endswith(".json") and not name.startswith(".")]
    if place.is_local or len(finished) < 2:
        records = [record_of(name) for name in finished]
    else:
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            records = list(pool.map(record_of, finished))
    return [record for record in records if record is not None], damaged


def seal_content(manifest: Manifest) -> dict[str, Any]:
    """What SEALED.json says: a function of the manifest, so that a seal can be checked against it."""
    ordered = list(manifest.shards.values())
    digest = hashlib.sha256("".join(f"{shard.index} {shard.digest or shard.sha256}\n" for shard in ordered).encode())
    failed = sum(len(shard.failed) for shard in ordered)
    return {
        "fingerprint": manifest.header.spec.fingerprint,
        "images": sum(len(shard.ids) for shard in ordered) - failed,
        "failed": failed,
        "shards": len(ordered),
        "bytes": sum(shard.bytes for shard in ordered),
        "digest": digest.hexdigest(),
    }


def is_sealed(cache: str | Path | Place, manifest: Manifest) -> bool:
    """Whether the cache was declared complete.

    Raises:
        CacheCorruptError: there is a seal, but it is one of other shards.
    """
    place = place_of(cache)
    try:
        text = place.read(SEAL)
    except FileNotFoundError:
        return False
    try:
        seal = json.loads(text)
    except ValueError:
        seal = None
    if not isinstance(seal, dict) or {key: seal[key] for key in seal if key != "format"} != seal_content(manifest):
        raise CacheCorruptError(
            f"the seal of {place} does not fit its manifest",
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


def _read_header(record: Mapping[str, Any], place: Place) -> Header:
    path = f"{place}/{MANIFEST}"
    if record.get("kind") != "header" or record.get("format") not in FORMATS:
        raise CacheError(
            f"{path} has an unknown format",
            why=f"it is format {record.get('format')!r}, this vlmx knows {' and '.join(map(str, FORMATS))}",
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
        quantization=_quantization(record["quantization"]) if "quantization" in record else None,
    )


def _read_shard(record: Mapping[str, Any]) -> ShardRecord | None:
    keys = {"kind", "index", "ids", "failed", "bytes"}
    if set(record) - {"error"} not in (keys | {"digest"}, keys | {"sha256"}) or record["kind"] != "shard":
        return None
    return ShardRecord(
        index=record["index"],
        ids=tuple(record["ids"]),
        failed=record["failed"],
        bytes=record["bytes"],
        digest=record.get("digest", ""),
        sha256=record.get("sha256", ""),
        error=_error(record["error"]) if "error" in record else None,
    )


def _quantization(data: Mapping[str, Any]) -> Quantization:
    from vlmx.cache_specs.quantize import Quantization  # numpy is imported only where there is such a cache

    return Quantization.from_dict(data)


def _error(data: Mapping[str, Any]) -> QuantizationError:
    from vlmx.cache_specs.quantize import QuantizationError

    return QuantizationError(**data)


def _damaged(place: Place, why: str) -> CacheCorruptError:
    return CacheCorruptError(
        f"the manifest of {place} is damaged",
        why=why,
        fix=f"copy {place} again from where it came, or delete it and extract again",
    )
