"""Does the encoder, on this machine, still give the tokens that a cache has?

Legend: N tokens, D token width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from vlmx.cache_specs.audit import read_runs
from vlmx.cache_specs.compare import Distance, alike_limit, as_float32, choose, distance_of
from vlmx.cache_specs.manifest import read_manifest
from vlmx.cache_specs.places import Place
from vlmx.cache_specs.reader import open_cache
from vlmx.cache_specs.writer import ShardPlan
from vlmx.errors import DataError
from vlmx.extract.again import batch_size_of, encode_again, rebuild
from vlmx.extract.originals import Originals
from vlmx.extract.sources.source import ImageSource

IMAGES = 32


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """What a probe found.

    Attributes:
        cache: the cache.
        distance: between what is stored and what the encoder gives now.
        exact: share of the stored numbers that are equal.
        worst: the image that is farthest off.
        limit: up to which `distance.relative` this is the same encoder.
        missing: images that were chosen and not found.
        whose: which data sets those belong to; empty when all were found.
    """

    cache: Place
    distance: Distance
    exact: float
    worst: str
    limit: float
    missing: tuple[str, ...]
    whose: str

    @property
    def ok(self) -> bool:
        return self.distance.relative <= self.limit


def probe(
    cache: Place, sources: Iterable[ImageSource], *, weights: str | None = None, images: int = IMAGES, threads: int = 4
) -> ProbeReport:
    """Encode some images of a cache again and compare: always the same ones, from all over the cache.

    Args:
        cache: the cache; its extraction need not have come to its end.
        sources: where its images are.
        weights: file of the encoder, if it is not where it was.
        images: how many.
        threads: that read and decode.

    Raises:
        DataError: none of the images was found.
        SpecMismatchError: the encoder cannot be built as it was.
        CacheCorruptError: tokens that were read are damaged.
    """
    manifest = read_manifest(cache)
    header = manifest.header
    runs = read_runs(cache)
    stored = open_cache(cache, allow_partial=True)
    chosen = choose(stored.ids, images)
    originals = Originals(cache.parent, sources)
    loads = originals.find(chosen)
    present = [image for image in chosen if image in loads]
    missing = tuple(image for image in chosen if image not in loads)
    if not present:
        raise DataError(
            f"none of {len(chosen)} images of {cache.name} was found",
            why=originals.whose(missing) or "it has no image",
            fix="say where they are now with --data (and --image-root), as `vlmx extract` takes them",
        )
    backbone = rebuild(header.spec, runs, weights)
    plan = ShardPlan(index=0, ids=tuple(present))
    made = [run for run in runs if run.get("shards")]  # others found everything there
    batch_size = batch_size_of(backbone, made[-1] if made else {})
    (now,) = encode_again(backbone, header, [plan], loads, {}, batch_size=batch_size, threads=threads)
    if now.failed:
        raise DataError(
            f"{len(now.failed)} images could be decoded when {cache.name} was made, and cannot any more",
            why="; ".join(f"{image[:12]}: {why}" for image, why in now.failed.items()),
            fix="compare the versions of Pillow and its libraries (vlmx cache info)",
        )
    distance, equal, worst = Distance(), 0, (-1.0, "")
    for image, tokens_ND in zip(present, now.tokens_SND, strict=True):
        before_ND = stored.read([image])[0]
        equal += int(np.count_nonzero(before_ND == tokens_ND))
        off = distance_of(
            as_float32(header, before_ND),
            as_float32(header, tokens_ND),
            identical=before_ND.tobytes() == tokens_ND.tobytes(),
        )
        distance += off
        worst = max(worst, (off.relative, image))
    return ProbeReport(
        cache=cache,
        distance=distance,
        exact=equal / now.tokens_SND.size,
        worst=worst[1],
        limit=alike_limit(header.spec, manifest.error),
        missing=missing,
        whose=originals.whose(missing),
    )
