"""How do tokens get into a cache so that killing a writer at any instant loses nothing that was committed?

A shard is written under a temporary name, brought to the disk, renamed, and only then its record is written, a file of
its own. When nobody else writes, the records go into the manifest, ordered by shard. What has no record is thrown away
by the next writer. Several processes may write one cache: each makes the shards of its share of the plan.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmx.cache_specs.claims import Part
from vlmx.cache_specs.layout import PROVENANCE, shard_key
from vlmx.cache_specs.manifest import (
    COMMITS,
    MANIFEST,
    SEAL,
    Header,
    Manifest,
    ShardRecord,
    commit_key,
    read_commits,
    read_manifest,
    shard_line,
)
from vlmx.cache_specs.places import Place, place_of
from vlmx.cache_specs.quantize import Quantization, QuantizationError
from vlmx.cache_specs.settle import busy, fold, seal, tidy, unseal
from vlmx.cache_specs.shards import write_shard
from vlmx.cache_specs.sizing import image_bytes, images_per_shard
from vlmx.cache_specs.spec import CacheSpec, TokenShape
from vlmx.errors import SpecMismatchError

SHARES_EACH = 8  # shares for each of several processes: who is faster, or comes later, takes more of them


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """One shard to make: its index and the image ids of its slots, in order."""

    index: int
    ids: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _RunLine:
    """The line that this process wrote last into `provenance.jsonl`: what it holds, and its bytes."""

    provenance: Mapping[str, Any]
    indices: set[int]
    line: bytes


class CacheWriter:
    """A writer of a cache; a context manager.

        with CacheWriter(root, spec, shape) as writer:
            plans = writer.plan(ids)
            while share := writer.next_share():
                for plan in share:
                    writer.commit(plan, tokens_BND, failed)
            writer.seal()

    A process that writes alone gets one share, with all of `plans`. Of several processes, each gets its own shares
    first, then whatever nobody has: of processes that are slower, have not come yet, or died.

    Args:
        root: folder of all caches; the cache is `spec.name` in it, made when it does not exist.
        spec: the identity of the tokens.
        shape: token grid and width of one image.
        slots: images in a shard of a new cache; by default what `sizing.images_per_shard` says. An existing
            cache keeps what it has.
        part: which of several processes this is. Those that join while others write may be more than planned.
        calibrate: gives the scales of a new 8-bit cache; called at most once, while other processes wait.

    Raises:
        CacheError: another process is writing this cache, and this one is no part of the same extraction.
        SpecMismatchError: the folder holds tokens of another spec or shape.
        OutOfSpaceError: the disk is full.
    """

    def __init__(
        self,
        root: str | Path | Place,
        spec: CacheSpec,
        shape: TokenShape,
        *,
        slots: int | None = None,
        part: Part | None = None,
        calibrate: Callable[[], Quantization] | None = None,
    ) -> None:
        self.place = place_of(root).child(spec.name)
        self.spec = spec
        self.shape = shape
        self._part = part or Part()
        self._plans: dict[int, ShardPlan] = {}
        self._held: set[int] = set()  # shares, and the number of `_be_seen`
        self._begun: set[int] = set()  # shards that were given to the caller
        self._run: _RunLine | None = None
        self._claims = self.place.claims()
        try:
            with self._claims.guard():
                others = self._claims.others()
                job = self._claims.job() if others else None
                if others and (self._part.count == 1 or job is None or job["shares"] == 1):
                    raise busy(self.place, others)
                if not self.place.exists(MANIFEST):
                    slots = slots or images_per_shard(image_bytes(shape, spec.dtype), local=self.place.is_local)
                    scales = _scales(spec, shape, calibrate)
                    header = Header(spec=spec, shape=shape, images_per_shard=slots, quantization=scales)
                    self.place.write(MANIFEST, Manifest(header=header).to_bytes())
                manifest = read_manifest(self.place)
                _require_same(self.place, manifest.header, spec, shape)
                if job is None:
                    fold(self.place, manifest)
                    tidy(self.place, manifest)
                    self._claims.clear()
                    job = {"shares": 1 if self._part.count == 1 else self._part.count * SHARES_EACH}
                    self._claims.set_job(job)
                self._shares: int = job["shares"]
                self._be_seen()
        except BaseException:
            self.close()
            raise
        self.images_per_shard = manifest.header.images_per_shard
        self.quantization = manifest.header.quantization
        self._header = manifest.header
        self._shards: dict[int, ShardRecord] = {}
        self._known: set[str] = set()
        self._learn(manifest.shards.values())

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes have what this one had claimed."""
        self._claims.close()

    @property
    def manifest(self) -> Manifest:
        """What is committed, as far as this process knows."""
        return Manifest(header=self._header, shards=dict(sorted(self._shards.items())))

    @property
    def missing(self) -> list[ShardPlan]:
        """Shards of the plan that nobody has committed, as far as this process knows."""
        return [plan for index, plan in self._plans.items() if index not in self._shards]

    def pending(self, ids: Iterable[str]) -> list[str]:
        """Those of `ids` that are neither stored nor known to be undecodable: each once, in order of appearance."""
        return [image for image in dict.fromkeys(ids) if image not in self._known]

    def plan(self, ids: Sequence[str]) -> list[ShardPlan]:
        """The shards that are still to be made for `ids`, by all processes together.

        Missing shard indices get successive runs of pending ids, so that after a kill, and in a process that comes
        later, the same shards are made of the same images.

        Raises:
            CacheError: the processes that write this cache do so for other images.
        """
        with self._claims.guard():
            digest = hashlib.sha256("\n".join(ids).encode()).hexdigest()
            job = self._claims.job() or {"shares": self._shares}
            if job.setdefault("images", digest) != digest and (others := self._claims.others()):
                raise busy(self.place, others)
            self._claims.set_job({**job, "images": digest})
            self.refresh()
        pending = self.pending(ids)
        size = self.images_per_shard
        self._plans = {}
        self._begun = set()
        index = 0
        for start in range(0, len(pending), size):
            while index in self._shards:
                index += 1
            self._plans[index] = ShardPlan(index=index, ids=tuple(pending[start : start + size]))
            index += 1
        return list(self._plans.values())

    def next_share(self) -> list[ShardPlan]:
        """Shards that this process makes next, in order; it may ask for more before these are committed.

        Of its own shares first, then of those that nobody has. None when nothing is missing, or when all that is
        missing is being made: by others, or because it was given to this process before.
        """
        with self._claims.guard():
            self.refresh()
            missing: dict[int, list[ShardPlan]] = {}
            for plan in self.missing:
                missing.setdefault(plan.index % self._shares, []).append(plan)
            for share in [share for share in self._held if share < self._shares and share not in missing]:
                self._claims.drop(share)
                self._held.remove(share)
            count = self._part.count
            for share in sorted(missing, key=lambda share: (share % count != self._part.index, share)):
                new = [plan for plan in missing[share] if plan.index not in self._begun]
                if new and self._claims.take(share):
                    self._held.add(share)
                    self._begun.update(plan.index for plan in new)
                    return new
        return []

    def refresh(self) -> None:
        """Learn what other processes have committed."""
        known = {commit_key(index) for index in list(self._shards)}  # a thread may be committing
        new = [name for name in self.place.names(COMMITS) if f"{COMMITS}/{name}" not in known]
        self._learn(read_commits(self.place, new)[0])
        if self.missing and (self._part.count > 1 or self._shares > 1) and self.place.exists(SEAL):
            self._learn(read_manifest(self.place).shards.values())  # another process was the last and is through

    def begin_run(self, provenance: Mapping[str, Any], plans: Sequence[ShardPlan]) -> None:
        """Record how shards are going to be made; call before they are committed.

        A shard was made by the last run that planned it: `provenance.jsonl` keeps one line for each run. A second call
        with equal provenance extends the line, and makes it the last one.

        Args:
            provenance: kernel, device, versions, command, time: whatever is no part of the spec.
            plans: what this run is going to make.

        Raises:
            OutOfSpaceError: the disk is full.
        """
        indices = {plan.index for plan in plans}
        earlier = self._run if self._run and self._run.provenance == provenance else None
        if earlier:
            indices |= earlier.indices
        line = (json.dumps({"shards": _ranges(sorted(indices)), **provenance}) + "\n").encode()
        with self._claims.guard():
            before = self.place.read(PROVENANCE) if self.place.exists(PROVENANCE) else b""
            if earlier:
                before = before.replace(earlier.line, b"", 1)
            self.place.write(PROVENANCE, before + line)
        self._run = _RunLine(provenance=provenance, indices=indices, line=line)

    def commit(
        self,
        plan: ShardPlan,
        tokens_BND: NDArray[Any],
        failed: Mapping[str, str] | None = None,
        error: QuantizationError | None = None,
    ) -> None:
        """Store one shard; when this returns, it survives a power loss.

        Args:
            plan: one of `next_share()`.
            tokens_BND: [len(plan.ids), tokens, channels] in storage dtype (`spec.storage_dtype`: uint16 for
                bfloat16), C-contiguous; rows of failed images are ignored.
            failed: ids of this plan that could not be decoded, and why.
            error: what 8 bits lost on these images; for 8-bit caches.

        Raises:
            OutOfSpaceError: the disk is full; what was committed before is intact, and so are the claims.
            CacheError: this process was taken for dead and may no longer write.
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
        assert (error is not None) == (self.spec.dtype == "int8")

        self._claims.still_mine()
        unseal(self.place)
        absent = {slot for slot, image in enumerate(plan.ids) if image in failed}
        key = shard_key(plan.index)
        digest = write_shard(
            self.place, key, tokens_BND, absent, self.images_per_shard, self.spec.codec, self._claims.still_mine
        )
        record = ShardRecord(
            index=plan.index, ids=plan.ids, failed=failed, bytes=digest.bytes, digest=digest.digest, error=error
        )
        self._claims.still_mine()
        self.place.write(commit_key(plan.index), shard_line(record))
        self._learn([record])

    def seal(self) -> bool:
        """Declare the cache complete: readers open only sealed ones unless they are told otherwise.

        Either way this process has then given up its claims.

        Returns:
            False when shards of the plan are missing: other processes are at work, or died.
        """
        with self._claims.guard():
            self._claims.still_mine()
            self.refresh()
            complete = not self.missing
            if complete:
                manifest = self.manifest
                self._claims.still_mine()
                fold(self.place, manifest)
                tidy(self.place, manifest)
                seal(self.place, manifest)
            for number in self._held:
                self._claims.drop(number)
            self._held = set()
            if complete:
                self._claims.clear()
        return complete

    def report(self, images: int) -> int:
        """Tell the other processes how many images this one has done; gives the sum of what all told."""
        self._claims.report(images)
        return self._claims.reports()

    def _be_seen(self) -> None:
        """Claim a number that is no share, so that others see this process also while it has nothing to write."""
        for number in itertools.count(self._shares + self._part.index):
            if self._claims.take(number):
                self._held.add(number)
                return

    def _learn(self, shards: Iterable[ShardRecord]) -> None:
        for shard in shards:
            if shard.index not in self._shards:
                self._shards[shard.index] = shard
                self._known.update(shard.ids)


def _scales(spec: CacheSpec, shape: TokenShape, calibrate: Callable[[], Quantization] | None) -> Quantization | None:
    if spec.dtype != "int8":
        return None
    assert calibrate is not None, "a new 8-bit cache needs scales"
    scales = calibrate()
    assert scales.scale_D.shape == (shape.dim,), scales.scale_D.shape
    return scales


def _require_same(place: Place, header: Header, spec: CacheSpec, shape: TokenShape) -> None:
    differences = header.spec.differences(spec)
    if header.shape != shape:
        differences.append(f"shape: {header.shape}, not {shape}")
    if differences:
        raise SpecMismatchError(
            f"{place} holds other tokens than these",
            why="; ".join(differences),
            fix="extract into another --out folder",
        )


def _ranges(indices: Sequence[int]) -> list[list[int]]:
    """Ascending integers as [first, last] pairs: 0 1 2 5 -> [[0, 2], [5, 5]]."""
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index - 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    return ranges
