"""Which caches lie below a folder, what is in one, and who is writing it now?"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmx.cache_specs.audit import read_runs
from vlmx.cache_specs.claims import WRITERS
from vlmx.cache_specs.ids import ImageTable, table_names
from vlmx.cache_specs.manifest import MANIFEST, Header, Manifest, read_sealed
from vlmx.cache_specs.places import LocalPlace, Place, place_of
from vlmx.cache_specs.quantize import QuantizationError
from vlmx.errors import CacheError, DataError

_NAME = re.compile(r".+@\d+x\d+-[0-9a-f]{12}")


@dataclass(frozen=True, kw_only=True)
class CacheLine:
    """What `vlmx cache ls` shows of one cache.

    Attributes:
        name: of its folder.
        problem: why it cannot be read; empty when it can. The other attributes are empty otherwise.
        images, failed: images with tokens, and those that could not be decoded.
        bytes: of all shards.
        dtype, codec: of the stored tokens.
        sealed: whether the last extraction came to its end.
        last: when the last extraction began; empty when that is not known.
    """

    name: str
    problem: str = ""
    images: int = 0
    failed: int = 0
    bytes: int = 0
    dtype: str = ""
    codec: str = ""
    sealed: bool = False
    last: str = ""


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """How much of a data set is in a cache.

    Attributes:
        dataset: its name.
        images: different images that it has and that can be decoded.
        present: those of them that have tokens.
        problem: why its table cannot be read; empty when it can.
    """

    dataset: str
    images: int = 0
    present: int = 0
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class CacheInfo:
    """What `vlmx cache info` shows.

    Attributes:
        place: the cache.
        header: spec, shape, images a shard, and the scales of an 8-bit cache.
        shards, images, bytes: how much is there.
        disk_bytes: what its folder takes on the disk; None on an object store.
        failed: image id -> why it could not be decoded.
        error: what 8 bits lost; None in caches of more bits.
        sealed: whether the extraction came to its end.
        writers: one line for each process that is writing now.
        datasets: the data sets of the folder that the cache lies in.
        runs: provenance, one mapping for each extraction, oldest first.
    """

    place: Place
    header: Header
    shards: int
    images: int
    bytes: int
    disk_bytes: int | None
    failed: Mapping[str, str]
    error: QuantizationError | None
    sealed: bool
    writers: tuple[str, ...]
    datasets: tuple[Coverage, ...]
    runs: tuple[Mapping[str, Any], ...]


def survey(root: str | Path | Place) -> list[CacheLine]:
    """A line for each cache below `root`, also for those that are damaged or of another version of vlmx."""
    folder = place_of(root)
    lines = []
    for name in folder.names():
        place = folder.child(name)
        if place.exists(MANIFEST):
            lines.append(_line(place))
        elif looks_like_a_cache(name):
            lines.append(CacheLine(name=name, problem=f"it has no {MANIFEST}"))
    return lines


def info(cache: str | Path | Place) -> CacheInfo:
    """Describe a cache from its manifest; no shard is opened.

    Raises:
        CacheError: there is no cache, or another version of vlmx made it.
        CacheCorruptError: the manifest is damaged, or the seal does not fit it.
    """
    place = place_of(cache)
    manifest, sealed = read_sealed(place)
    return CacheInfo(
        place=place,
        header=manifest.header,
        shards=len(manifest.shards),
        images=_images(manifest),
        bytes=sum(shard.bytes for shard in manifest.shards.values()),
        disk_bytes=_disk_bytes(place),
        failed=manifest.failed,
        error=manifest.error if manifest.header.quantization is not None else None,
        sealed=sealed,
        writers=tuple(writers(place)),
        datasets=tuple(_coverage(place.parent, manifest)),
        runs=tuple(read_runs(place)),
    )


def writers(place: Place) -> list[str]:
    """One line for each process that is writing the cache now; one, too, where that cannot be seen."""
    if not place.names(WRITERS):
        return []
    claims = place.claims()
    try:
        with claims.guard():
            return claims.others()
    except (OSError, CacheError) as error:  # who may only read cannot ask
        return [f"perhaps somebody; who it is cannot be seen: {error}"]
    finally:
        claims.close()


def looks_like_a_cache(name: str) -> bool:
    """Whether a folder is named as caches are: backbone@HxW-fingerprint."""
    return _NAME.fullmatch(name) is not None


def dataset_images(root: Place, name: str) -> set[str]:
    """Ids of the images of a data set that can be decoded.

    Raises:
        DataError: its table is damaged.
    """
    table = ImageTable.open(root, name)
    broken = table.failed()
    return {table.id_of(key) for key in table.keys() if key not in broken}  # noqa: SIM118  a table is no mapping


def _line(place: Place) -> CacheLine:
    try:
        manifest, sealed = read_sealed(place)
    except CacheError as error:
        return CacheLine(name=place.name, problem=f"{error.what}: {error.why}" if error.why else error.what)
    runs = read_runs(place)
    spec = manifest.header.spec
    return CacheLine(
        name=place.name,
        images=_images(manifest),
        failed=len(manifest.failed),
        bytes=sum(shard.bytes for shard in manifest.shards.values()),
        dtype=spec.dtype,
        codec=spec.codec,
        sealed=sealed,
        last=str(runs[-1].get("time", "")) if runs else "",
    )


def _images(manifest: Manifest) -> int:
    return sum(len(shard.ids) - len(shard.failed) for shard in manifest.shards.values())


def _coverage(root: Place, manifest: Manifest) -> list[Coverage]:
    failed = manifest.failed
    stored = {image for shard in manifest.shards.values() for image in shard.ids if image not in failed}
    found = []
    for name in table_names(root):
        try:
            ids = dataset_images(root, name)
        except DataError as error:
            found.append(Coverage(dataset=name, problem=f"{error.what}: {error.why}"))
        else:
            found.append(Coverage(dataset=name, images=len(ids), present=len(ids & stored)))
    return found


def _disk_bytes(place: Place) -> int | None:
    """What the file system gave to the folder: blocks, not lengths of files."""
    if not isinstance(place, LocalPlace):
        return None
    total = 0
    for folder, _, files in os.walk(place.path):
        for file in files:
            try:
                total += os.lstat(os.path.join(folder, file)).st_blocks * 512
            except FileNotFoundError:  # a writer has just renamed it
                continue
    return total
