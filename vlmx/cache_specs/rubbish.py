"""What below a folder of caches does nobody need any more, and what only looks like it?

Never in question: a shard that was committed, and a cache that somebody is writing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlmx.cache_specs.catalog import find_parts
from vlmx.cache_specs.claims import WRITERS
from vlmx.cache_specs.ids import DATASETS, table_key, table_names
from vlmx.cache_specs.layout import ARRAY, GROUP, SHARDS
from vlmx.cache_specs.manifest import COMMITS, MANIFEST, Manifest, is_sealed, read_sealed
from vlmx.cache_specs.places import PARTIAL, LocalPlace, Place, place_of
from vlmx.cache_specs.survey import dataset_images, looks_like_a_cache, writers
from vlmx.errors import CacheError, DataError, RunError, UnknownNameError
from vlmx.runs import RunFolder, list_runs

EARLIER_PARTIAL = "shard.partial"  # the place of `partial/` in earlier versions

Kind = Literal["leftover", "shard", "cache", "table"]


@dataclass(frozen=True, kw_only=True)
class Rubbish:
    """Something that can be deleted.

    Attributes:
        place: the cache that it lies in, or the folder of all caches.
        key: its path there; empty for the whole cache.
        kind: "leftover" of a killed process, "shard" that was never committed, "cache" without any shard, "table" of a
            data set without images in any cache.
        why: one line.
        bytes: what it takes.
    """

    place: Place
    key: str
    kind: Kind
    why: str
    bytes: int

    @property
    def url(self) -> str:
        """Where it is."""
        return f"{self.place}/{self.key}" if self.key else str(self.place)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Something that the user may want to look at; it is never deleted.

    Attributes:
        name: of the cache or data set.
        why: one line.
        bytes: what it takes.
    """

    name: str
    why: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was found below a folder of caches.

    Attributes:
        rubbish: what can go.
        young: how much could go, but was changed too recently.
        kept: what stays, and why it is named.
    """

    rubbish: tuple[Rubbish, ...]
    young: int
    kept: tuple[Kept, ...]


def find_rubbish(root: str | Path | Place, *, older_than_s: float, runs: Path | None = None) -> Findings:
    """Look for what can be deleted. Nothing is changed.

    Args:
        root: folder of all caches.
        older_than_s: what was changed more recently is left alone.
        runs: folder of runs; caches that none of them was trained on are named in `kept`.

    Raises:
        RunError: `runs` is no folder.
    """
    folder = place_of(root)
    found: list[Rubbish] = []
    kept: list[Kept] = []
    stored: set[str] = set()
    certain = True  # whether `stored` is every image of every cache
    names = []
    for name in folder.names():
        place = folder.child(name)
        if not (place.exists(MANIFEST) or looks_like_a_cache(name)):
            continue
        if busy := writers(place):
            certain = False
            kept.append(Kept(name=name, why=f"is being written by {', '.join(busy)}", bytes=0))
            continue
        try:
            manifest = _manifest(place)
        except CacheError as error:
            certain = False
            kept.append(Kept(name=name, why=f"cannot be read: {error.why or error.what}", bytes=_bytes(place, "")))
            continue
        found += _in_cache(place, manifest)
        if manifest is not None:
            names.append(name)
            stored.update(image for shard in manifest.shards.values() for image in shard.ids)
            kept += _unfinished(place, manifest)
    if certain:
        found += _tables(folder, stored, kept)
    elif table_names(folder):
        kept.append(Kept(name=DATASETS, why="is not looked at, as long as not every cache can be read", bytes=0))
    if runs is not None:
        used = _used(runs, folder)
        kept += [
            Kept(name=name, why=f"no run below {runs} was trained on it", bytes=_bytes(folder, name))
            for name in names
            if name not in used
        ]
    old = [item for item in found if _age_s(item) >= older_than_s]
    return Findings(rubbish=tuple(old), young=len(found) - len(old), kept=tuple(kept))


def delete(item: Rubbish) -> bool:
    """Delete it, unless it has become something else: somebody writes the cache, or has committed the shard."""
    place = item.place
    if item.kind == "table":
        place.remove(item.key)
        return True
    claims = place.claims()
    try:
        with claims.guard():
            if claims.others() or not any(item.key == still.key for still in _in_cache(place, _manifest(place))):
                return False
            if item.key:
                place.remove_tree(item.key) if item.kind == "shard" or place.names(item.key) else place.remove(item.key)
            else:
                place.parent.remove_tree(place.name)
    finally:
        claims.close()
    return True


def _manifest(place: Place) -> Manifest | None:
    """The manifest of a cache; None where one was never written, and so no shard was committed.

    Raises:
        CacheError: it is damaged, or lost, or another version of vlmx made it.
    """
    if place.exists(MANIFEST) or place.names(SHARDS) or place.names(COMMITS):
        return read_sealed(place)[0]
    return None


def _in_cache(place: Place, manifest: Manifest | None) -> Iterator[Rubbish]:
    if manifest is None or (not manifest.shards and not is_sealed(place, manifest)):
        yield Rubbish(
            place=place, key="", kind="cache", why="an extraction that never stored a shard", bytes=_bytes(place, "")
        )
        return
    if place.names(PARTIAL):
        yield _leftover(place, PARTIAL, "what a killed process was writing")
    if place.exists(EARLIER_PARTIAL):
        yield _leftover(place, EARLIER_PARTIAL, "what a killed process was writing")
    if place.names(WRITERS):
        yield _leftover(place, WRITERS, "claims of processes that are gone")
    for folder in ("", GROUP, ARRAY, COMMITS, f"{GROUP}/scale", f"{GROUP}/offset"):
        for name in place.names(folder):
            if name.startswith(".") and name.endswith(".tmp"):
                yield _leftover(place, f"{folder}/{name}".lstrip("/"), "what a killed process was writing")
    if manifest.damaged:
        return  # which shards they committed is not known
    for name in place.names(SHARDS):
        if not (name.isdigit() and int(name) in manifest.shards):
            key = f"{SHARDS}/{name}"
            size = _bytes(place, key)
            if size or place.is_local:  # some object stores go on listing a folder without objects
                yield Rubbish(place=place, key=key, kind="shard", why="was never committed", bytes=size)


def _leftover(place: Place, key: str, why: str) -> Rubbish:
    return Rubbish(place=place, key=key, kind="leftover", why=why, bytes=_bytes(place, key))


def _unfinished(place: Place, manifest: Manifest) -> Iterator[Kept]:
    if manifest.shards and not is_sealed(place, manifest):
        images = sum(len(shard.ids) for shard in manifest.shards.values())
        yield Kept(
            name=place.name,
            why=f"is not finished and nobody writes it: {images:,} images are stored; "
            "its `vlmx extract` command goes on, or delete its folder yourself",
            bytes=_bytes(place, ""),
        )


def _tables(root: Place, stored: set[str], kept: list[Kept]) -> Iterator[Rubbish]:
    """Tables of data sets, and what inventories remembered of them."""
    gone = set()
    for name in table_names(root):
        try:
            needed = not stored.isdisjoint(dataset_images(root, name))
        except DataError as error:
            kept.append(Kept(name=name, why=f"cannot be read: {error.why}", bytes=root.size(table_key(name)) or 0))
            continue
        if not needed:
            gone.add(name)
            yield _table(root, table_key(name), f"data set {name} has no image in any cache")
    known = set(table_names(root)) - gone
    for name in root.names(DATASETS):
        dataset, stamps, _ = name.partition(".stamps.")
        if name.startswith(".") and name.endswith(".tmp"):
            yield _table(root, f"{DATASETS}/{name}", "what a killed process was writing")
        elif stamps and dataset not in known:
            yield _table(root, f"{DATASETS}/{name}", f"data set {dataset} has no image in any cache")


def _table(root: Place, key: str, why: str) -> Rubbish:
    return Rubbish(place=root, key=key, kind="table", why=why, bytes=root.size(key) or 0)


def _used(runs: Path, root: Place) -> set[str]:
    """Names of the caches that runs were trained on."""
    if not runs.is_dir():
        raise RunError(f"{runs} is not a folder of runs", fix="give the folder that holds the run folders")
    used: set[str] = set()
    for name in list_runs(runs):
        text = RunFolder(runs / name).config.get("cache")
        if not isinstance(text, str):  # a run of another kind
            continue
        with suppress(UnknownNameError, CacheError):  # a cache that is gone, or lies elsewhere
            used.update(part.name for part in find_parts(root, text))
    return used


def _bytes(place: Place, key: str) -> int:
    """What a file, or everything in a folder, takes."""
    size = None if not key else place.size(key)
    if size is not None and not place.names(key):
        return size
    return sum(_bytes(place, f"{key}/{name}".lstrip("/")) for name in place.names(key))


def _age_s(item: Rubbish) -> float:
    """Seconds since something in it was changed."""
    place, keys = item.place, [item.key]
    if item.kind == "table":  # who reads a data set's images changes only the stamps of them, and not all the time
        dataset = item.key.removeprefix(f"{DATASETS}/").partition(".stamps.")[0].removesuffix(".jsonl")
        keys = [f"{DATASETS}/{name}" for name in place.names(DATASETS) if name.startswith(dataset)]
    newest = max(_newest(place, key) for key in keys)
    return max(0.0, time.time() - newest)


def _newest(place: Place, key: str) -> float:
    """When a file, or anything in a folder, was changed last, in seconds since the epoch; 0 when there is nothing."""
    return _newest_local(place.path / key) if isinstance(place, LocalPlace) else _newest_remote(place, key)


def _newest_local(top: Path) -> float:
    newest = 0.0
    for folder, _, files in os.walk(top):
        for path in (folder, *(os.path.join(folder, file) for file in files)):
            with suppress(FileNotFoundError):
                newest = max(newest, os.lstat(path).st_mtime)
    with suppress(FileNotFoundError):
        newest = newest or top.lstat().st_mtime
    return newest


def _newest_remote(place: Place, key: str) -> float:
    from vlmx.cache_specs.object_place import ObjectPlace

    assert isinstance(place, ObjectPlace), place
    names = place.names(key)
    if names:
        return max(_newest_remote(place, f"{key}/{name}".lstrip("/")) for name in names)
    version = place.version(key)
    return version.modified.timestamp() if version is not None else 0.0
