"""How are damaged shards of a cache made again in place, from the images that they were made of?

A shard that is made on the same kind of machine has the bytes that were recorded, and nothing else changes. On another
one its last bits may differ: its record in the manifest, and the seal, are then made anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from vlmx.cache_specs.audit import Report, read_runs, wrong_metadata
from vlmx.cache_specs.layout import metadata, shard_key
from vlmx.cache_specs.manifest import Manifest, ShardRecord, read_manifest
from vlmx.cache_specs.places import Place
from vlmx.cache_specs.settle import alone, replace_shards
from vlmx.cache_specs.shards import ShardDigest, write_shard
from vlmx.cache_specs.writer import ShardPlan
from vlmx.errors import CacheError
from vlmx.extract.again import Run, batch_size_of, encode_again, rebuild, run_of
from vlmx.extract.encode import EncodedShard
from vlmx.extract.originals import Load, Originals
from vlmx.extract.sources.source import ImageSource


@dataclass(frozen=True, kw_only=True)
class RepairReport:
    """What a repair did.

    Attributes:
        cache: the cache.
        same: shards that now have the bytes that were recorded.
        other: shards that were made again with other last bits, and recorded anew.
        left: damaged shards whose images were not all found -> how many are missing.
        whose: which data sets the missing images belong to.
        metadata: files of the Zarr group that were written again.
    """

    cache: Place
    same: tuple[int, ...]
    other: tuple[int, ...]
    left: Mapping[int, int]
    whose: str
    metadata: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.left


def repair(
    report: Report, sources: Iterable[ImageSource], *, weights: str | None = None, threads: int = 4
) -> RepairReport:
    """Make the damaged shards of a cache again.

    Args:
        report: what a verification found.
        sources: where the images are.
        weights: file of the encoder, if it is not where it was.
        threads: that read and decode.

    Raises:
        CacheError: another process is writing the cache, or an image that was decoded then cannot be decoded now.
        SpecMismatchError: the encoder cannot be built as it was.
        OutOfSpaceError: the disk is full; nothing has become worse.
    """
    place = report.place
    manifest = read_manifest(place)
    runs = read_runs(place)
    damaged = [manifest.shards[index] for index in report.damaged]
    originals = Originals(place.parent, sources)
    wanted = [image for shard in damaged for image in shard.ids if image not in shard.failed]
    loads = originals.find(wanted) if wanted else {}
    missing = {shard.index: [i for i in shard.ids if i not in loads and i not in shard.failed] for shard in damaged}
    possible = [shard for shard in damaged if not missing[shard.index]]
    same, other = _make(place, manifest, possible, runs, loads, weights=weights, threads=threads)
    return RepairReport(
        cache=place,
        same=tuple(same),
        other=tuple(other),
        left={index: len(images) for index, images in missing.items() if images},
        whose=originals.whose([image for images in missing.values() for image in images]),
        metadata=tuple(_mend_metadata(place)) if report.metadata else (),
    )


def _make(
    place: Place,
    manifest: Manifest,
    shards: Sequence[ShardRecord],
    runs: Sequence[Run],
    loads: Mapping[str, Load],
    *,
    weights: str | None,
    threads: int,
) -> tuple[list[int], list[int]]:
    """Encode and write shards; those that have the recorded bytes, and those that have others."""
    same: list[int] = []
    other: list[int] = []
    if not shards:
        return same, other
    backbone = rebuild(manifest.header.spec, runs, weights)
    for shard in shards:
        plan = ShardPlan(index=shard.index, ids=shard.ids)
        batch_size = batch_size_of(backbone, run_of(runs, shard.index))
        (made,) = encode_again(
            backbone, manifest.header, [plan], loads, shard.failed, batch_size=batch_size, threads=threads
        )
        if made.failed.keys() != shard.failed.keys():
            _refuse(place, made, shard)
        with alone(place):
            digest = _write(place, manifest, made)
        if digest.bytes == shard.bytes and _matches(place, shard, digest):
            same.append(shard.index)
        else:
            record = replace(shard, bytes=digest.bytes, digest=digest.digest, sha256="", error=made.error)
            replace_shards(place, [record])
            other.append(shard.index)
    return same, other


def _matches(place: Place, shard: ShardRecord, made: ShardDigest) -> bool:
    if shard.sha256:  # an earlier version of vlmx made the cache
        return hashlib.sha256(place.read(shard_key(shard.index))).hexdigest() == shard.sha256
    return made.digest == shard.digest


def _write(place: Place, manifest: Manifest, made: EncodedShard) -> ShardDigest:
    header = manifest.header
    absent = {slot for slot, image in enumerate(made.plan.ids) if image in made.failed}
    key = shard_key(made.plan.index)
    return write_shard(place, key, made.tokens_SND, absent, header.images_per_shard, header.spec.codec)


def _refuse(place: Place, made: EncodedShard, shard: ShardRecord) -> None:
    now = {image: why for image, why in made.failed.items() if image not in shard.failed}
    raise CacheError(
        f"shard {shard.index} of {place.name} cannot be made as it was",
        why=f"{len(now)} images were decoded then and cannot be decoded now: "
        + "; ".join(f"{image[:12]}: {why}" for image, why in now.items()),
        fix="use the versions of Pillow and its libraries that made it (vlmx cache info), or --forget the shard",
    )


def _mend_metadata(place: Place) -> list[str]:
    """Write again what describes the Zarr array; the files that were changed."""
    with alone(place):
        manifest = read_manifest(place)
        wrong = wrong_metadata(place, manifest)
        for key, content in metadata(manifest.header, manifest.num_rows):
            if key in wrong:
                place.write(key, content)
    return list(wrong)
