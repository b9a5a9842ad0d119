"""How does all of a cache become what its manifest says: after an extraction, a repair, or when shards are forgotten?

The records of shards go into the manifest, what nobody committed goes away, and a seal says that nothing is missing.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vlmx.cache_specs.layout import ARRAY, GROUP, SHARDS, metadata
from vlmx.cache_specs.manifest import COMMITS, MANIFEST, SEAL, Manifest, ShardRecord, read_manifest, seal_content
from vlmx.cache_specs.places import PARTIAL, Place, place_of
from vlmx.errors import CacheError


def forget_shards(cache: str | Path | Place, indices: Collection[int]) -> None:
    """Throw away shards of a cache, e.g. damaged ones: their images are pending again, and the cache is not sealed.

    Raises:
        CacheError: another process is writing this cache.
        OutOfSpaceError: the disk is full; the old manifest is intact.
    """
    place = place_of(cache)
    with alone(place):
        manifest = read_manifest(place)
        kept = {index: shard for index, shard in manifest.shards.items() if index not in indices}
        left = Manifest(header=manifest.header, shards=kept)
        unseal(place)
        fold(place, left)
        tidy(place, left)


def replace_shards(cache: str | Path | Place, records: Iterable[ShardRecord]) -> None:
    """Put the records of shards that were made again in the place of the old ones; a sealed cache stays sealed.

    Raises:
        CacheError: another process is writing this cache.
        OutOfSpaceError: the disk is full; the old manifest is intact.
    """
    place = place_of(cache)
    with alone(place):
        manifest = read_manifest(place)
        sealed = place.exists(SEAL)
        shards = {**manifest.shards, **{record.index: record for record in records}}
        changed = Manifest(header=manifest.header, shards=dict(sorted(shards.items())))
        unseal(place)
        fold(place, changed)
        if sealed:
            seal(place, changed)


@contextmanager
def alone(place: Place) -> Iterator[None]:
    """While the block runs, nobody writes the cache at `place`.

    Raises:
        CacheError: another process is writing it.
    """
    claims = place.claims()
    with claims.guard():
        if others := claims.others():
            raise busy(place, others)
        yield


def fold(place: Place, manifest: Manifest) -> None:
    """Make the manifest file, and the zarr.json files, say what is committed; then their records are needed no more."""
    for key, content in [(MANIFEST, manifest.to_bytes()), *metadata(manifest.header, manifest.num_rows)]:
        if not place.exists(key) or place.read(key) != content:
            place.write(key, content)
    place.remove_tree(COMMITS)


def tidy(place: Place, manifest: Manifest) -> None:
    """Remove what killed writers left behind; only when nobody else writes, or nothing is left to be written."""
    for folder in ("", GROUP, ARRAY):
        for name in place.names(folder):
            if name.startswith(".") and name.endswith(".tmp"):
                place.remove(f"{folder}/{name}".lstrip("/"))
    place.remove_tree(PARTIAL)
    committed = {str(index) for index in manifest.shards}
    for name in place.names(SHARDS):
        if name not in committed:
            place.remove_tree(f"{SHARDS}/{name}")


def seal(place: Place, manifest: Manifest) -> None:
    """Say that the cache is complete."""
    content = (json.dumps(seal_content(manifest), indent=1) + "\n").encode()
    if not place.exists(SEAL) or place.read(SEAL) != content:
        place.write(SEAL, content)


def unseal(place: Place) -> None:
    """Say that the cache is no longer complete."""
    if place.exists(SEAL):
        place.remove(SEAL)


def busy(place: Place, others: Sequence[str]) -> CacheError:
    """The error for a cache that others are writing."""
    return CacheError(
        f"another process is writing {place.name}",
        why=f"it is held by {', '.join(dict.fromkeys(others))}",
        fix="wait until it has finished, or stop it; nothing is lost by stopping it",
    )
