"""How do tokens get into a cache so that killing the writer at any instant loses nothing that was committed?

A shard is written under a temporary name, brought to the disk, renamed, and only then named in the manifest. Whatever
is not in the manifest is thrown away when the next writer opens the cache. One writer at a time.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmx.cache_specs.layout import (
    GROUP,
    LOCK,
    PARTIAL,
    PROVENANCE,
    array_folder,
    array_metadata,
    group_metadata,
    shard_path,
    shards_folder,
)
from vlmx.cache_specs.manifest import (
    MANIFEST,
    SEAL,
    Header,
    Manifest,
    ShardRecord,
    header_line,
    read_manifest,
    seal_content,
    shard_line,
)
from vlmx.cache_specs.shards import write_shard
from vlmx.cache_specs.sizing import image_bytes, images_per_shard
from vlmx.cache_specs.spec import CacheSpec, TokenShape
from vlmx.errors import CacheError, OutOfSpaceError, SpecMismatchError
from vlmx.runs import space_error, sync_folder, write_atomic, write_json


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """One shard to make: its index and the image ids of its slots, in order."""

    index: int
    ids: tuple[str, ...]


class CacheWriter:
    """The one writer of a cache; a context manager.

        with CacheWriter(root, spec, shape) as writer:
            for plan in writer.plan(ids):
                writer.commit(plan, tokens_BND, failed)
            writer.seal()

    Args:
        root: folder of all caches; the cache is `root / spec.name`, made when it does not exist.
        spec: the identity of the tokens.
        shape: token grid and width of one image.
        slots: images in a shard of a new cache; by default what `sizing.images_per_shard` says. An existing
            cache keeps what it has.

    Raises:
        CacheError: another process is writing this cache.
        SpecMismatchError: the folder holds tokens of another spec or shape.
        OutOfSpaceError: the disk is full.
    """

    def __init__(self, root: Path, spec: CacheSpec, shape: TokenShape, *, slots: int | None = None) -> None:
        self.path = root / spec.name
        self.spec = spec
        self.shape = shape
        self._lock = _lock(self.path)
        try:
            if not (self.path / MANIFEST).exists():
                slots = slots or images_per_shard(image_bytes(shape, spec.dtype))
                header = Header(spec=spec, shape=shape, images_per_shard=slots)
                write_atomic(self.path / MANIFEST, header_line(header))
            manifest = read_manifest(self.path)
            _require_same(self.path, manifest.header, spec, shape)
            _tidy(self.path, manifest)
        except BaseException:
            self.close()
            raise
        self.images_per_shard = manifest.header.images_per_shard
        self._header = manifest.header
        self._shards = dict(manifest.shards)
        self._known = {image for shard in self._shards.values() for image in shard.ids}

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let another writer in."""
        if self._lock >= 0:
            _unlock(self._lock)
            self._lock = -1

    @property
    def manifest(self) -> Manifest:
        """What is committed now."""
        valid_bytes = (self.path / MANIFEST).stat().st_size
        return Manifest(header=self._header, shards=dict(self._shards), valid_bytes=valid_bytes)

    def pending(self, ids: Iterable[str]) -> list[str]:
        """Those of `ids` that are neither stored nor known to be undecodable: each once, in order of appearance."""
        return [image for image in dict.fromkeys(ids) if image not in self._known]

    def plan(self, ids: Iterable[str]) -> list[ShardPlan]:
        """The shards that are still to be made for `ids`.

        Missing shard indices get successive runs of pending ids, so that after a kill the same shards are made as
        without it.
        """
        pending = self.pending(ids)
        size = self.images_per_shard
        plans: list[ShardPlan] = []
        index = 0
        for start in range(0, len(pending), size):
            while index in self._shards:
                index += 1
            plans.append(ShardPlan(index=index, ids=tuple(pending[start : start + size])))
            index += 1
        return plans

    def begin_run(self, provenance: Mapping[str, Any], plans: Sequence[ShardPlan]) -> None:
        """Record how shards are going to be made; call before the first commit.

        A shard was made by the last run that planned it: `provenance.jsonl` keeps one line for each run.

        Args:
            provenance: kernel, device, versions, command, time: whatever is no part of the spec.
            plans: what this run is going to make.

        Raises:
            OutOfSpaceError: the disk is full.
        """
        line = json.dumps({"shards": _ranges([plan.index for plan in plans]), **provenance}) + "\n"
        path = self.path / PROVENANCE
        try:
            _append(path, line.encode())
        except OSError as error:
            raise space_error(error, path) from error

    def commit(self, plan: ShardPlan, tokens_BND: NDArray[Any], failed: Mapping[str, str] | None = None) -> None:
        """Store one shard; when this returns, it survives a power loss.

        Args:
            plan: one of `plan(...)`.
            tokens_BND: [len(plan.ids), tokens, channels] in storage dtype (`spec.storage_dtype`: uint16 for
                bfloat16), C-contiguous; rows of failed images are ignored.
            failed: ids of this plan that could not be decoded, and why.

        Raises:
            OutOfSpaceError: the disk is full; what was committed before is intact, and so is the lock.
        """
        failed = dict(failed or {})
        expected = (len(plan.ids), self.shape.num_tokens, self.shape.dim)
        assert tokens_BND.shape == expected, (tokens_BND.shape, expected)
        assert tokens_BND.dtype == np.dtype(self.spec.storage_dtype), tokens_BND.dtype
        assert tokens_BND.flags.c_contiguous
        assert 0 < len(plan.ids) <= self.images_per_shard
        assert plan.index not in self._shards
        assert set(failed) <= set(plan.ids)
        assert len(set(plan.ids)) == len(plan.ids)
        assert self._known.isdisjoint(plan.ids)

        _unseal(self.path)
        absent = {slot for slot, image in enumerate(plan.ids) if image in failed}
        target = shard_path(self.path, plan.index)
        partial = self.path / PARTIAL
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            digest = write_shard(partial, tokens_BND, absent, self.images_per_shard)
            os.replace(partial, target)
            for folder in (target.parent, target.parent.parent, shards_folder(self.path)):
                sync_folder(folder)
            record = ShardRecord(
                index=plan.index, ids=plan.ids, failed=failed, bytes=digest.bytes, sha256=digest.sha256
            )
            grown = Manifest(header=self._header, shards={**self._shards, plan.index: record}, valid_bytes=0)
            _write_metadata(self.path, grown)
            _append(self.path / MANIFEST, shard_line(record))
        except (OSError, OutOfSpaceError) as error:
            partial.unlink(missing_ok=True)
            shutil.rmtree(target.parent.parent, ignore_errors=True)
            if isinstance(error, OutOfSpaceError):
                raise
            raise space_error(error, target) from error
        self._shards[plan.index] = record
        self._known.update(plan.ids)

    def seal(self) -> None:
        """Declare the cache complete: readers open only sealed ones unless they are told otherwise."""
        write_json(self.path / SEAL, seal_content(self.manifest))


def forget_shards(cache: Path, indices: Sequence[int]) -> None:
    """Throw away shards of a cache, e.g. damaged ones: their images are pending again, and the cache is not sealed.

    Raises:
        CacheError: another process is writing this cache.
        OutOfSpaceError: the disk is full; the old manifest is intact.
    """
    lock = _lock(cache)
    try:
        manifest = read_manifest(cache)
        kept = {index: shard for index, shard in manifest.shards.items() if index not in set(indices)}
        lines = [header_line(manifest.header), *(shard_line(shard) for shard in kept.values())]
        _unseal(cache)
        write_atomic(cache / MANIFEST, b"".join(lines))
        _tidy(cache, read_manifest(cache))
    finally:
        _unlock(lock)


def _lock(cache: Path) -> int:
    """Take the writer's lock of a cache folder, made when it does not exist; the descriptor holds it."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(cache / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise space_error(error, cache) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "unknown"
        os.close(descriptor)
        raise CacheError(
            f"another process is writing {cache.name}",
            why=f"the lock {cache / LOCK} is held by {holder}",
            fix="wait until it has finished, or stop it; nothing is lost by stopping it",
        ) from error
    except OSError as error:
        os.close(descriptor)
        raise space_error(error, cache / LOCK) from error
    return descriptor


def _unlock(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.close(descriptor)


def _unseal(cache: Path) -> None:
    if (cache / SEAL).exists():
        (cache / SEAL).unlink()
        sync_folder(cache)


def _require_same(cache: Path, header: Header, spec: CacheSpec, shape: TokenShape) -> None:
    differences = header.spec.differences(spec)
    if header.shape != shape:
        differences.append(f"shape: {header.shape}, not {shape}")
    if differences:
        raise SpecMismatchError(
            f"{cache} holds other tokens than these",
            why="; ".join(differences),
            fix="extract into another --out folder",
        )


def _tidy(cache: Path, manifest: Manifest) -> None:
    """Make the folder what the manifest says: remove what a killed writer left behind, add what it had not written."""
    shards_folder(cache).mkdir(parents=True, exist_ok=True)
    for folder in (cache, cache / GROUP, array_folder(cache)):
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()
    (cache / PARTIAL).unlink(missing_ok=True)
    committed = {str(index) for index in manifest.shards}
    for child in shards_folder(cache).iterdir():
        if child.name not in committed:
            shutil.rmtree(child)
    if (cache / MANIFEST).stat().st_size > manifest.valid_bytes:
        os.truncate(cache / MANIFEST, manifest.valid_bytes)
    _write_metadata(cache, manifest)


def _write_metadata(cache: Path, manifest: Manifest) -> None:
    """Write those zarr.json files that do not fit the manifest."""
    for path, text in (
        (cache / GROUP / "zarr.json", group_metadata(manifest.header)),
        (array_folder(cache) / "zarr.json", array_metadata(manifest.header, manifest.num_rows)),
    ):
        if not path.exists() or path.read_text() != text:
            write_atomic(path, text)


def _ranges(indices: Sequence[int]) -> list[list[int]]:
    """Ascending integers as [first, last] pairs: 0 1 2 5 -> [[0, 2], [5, 5]]."""
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index - 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    return ranges


def _append(path: Path, line: bytes) -> None:
    """Add one line and bring it to the disk; on failure the file is as before."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        before = os.fstat(descriptor).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(descriptor, line[written:])
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, before)
            raise
    finally:
        os.close(descriptor)
