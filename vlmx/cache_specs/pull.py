"""How do shards of a cache on an object store come to a local disk while they are used, so that each is fetched once?

A shard that is read for the first time is copied in the background; until its copy is complete it is read remotely.
Copies are checked, and named by the digest that the manifest has of them, so that a copy is never one of another cache
or of an older state. Several processes share the folder: whoever holds the lock of a copy makes it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from vlmx.cache_specs.chunks import ShardDamagedError
from vlmx.cache_specs.layout import shard_key
from vlmx.cache_specs.local_files import LocalTokenFiles
from vlmx.cache_specs.manifest import read_manifest
from vlmx.cache_specs.object_files import ObjectTokenFiles
from vlmx.cache_specs.object_place import ObjectPlace
from vlmx.cache_specs.places import Place
from vlmx.cache_specs.shard_copy import checked_bytes
from vlmx.cache_specs.token_files import TokenFileError, TokenFiles, Wanted
from vlmx.console import format_bytes, note
from vlmx.errors import VlmxError

COPIES_AT_ONCE = 4
RESERVE_BYTES = 1 << 30  # of the disk, left to others
RETRY_S = 5.0  # after another process was found to be making the copy: it may have died since


def pull_through(place: Place, folder: str | Path) -> Place:
    """The same cache, whose shards are copied to `folder` when they are used; a local cache stays as it is."""
    if isinstance(place, ObjectPlace):
        return ObjectPlace(place.url, pull=folder)
    note(f"{place.name} lies on this machine already: nothing is copied to {folder}")
    return place


class PulledTokenFiles(TokenFiles):
    """Reads of a remote cache that become local, shard by shard.

    Args:
        place: of the cache.
        remote: reads it where it is.
        folder: for the copies of all caches; this one's lie in `folder / place.name`.
        reserve_bytes: copying ends when the disk has no more than this left.
    """

    def __init__(
        self, place: ObjectPlace, remote: ObjectTokenFiles, folder: Path, *, reserve_bytes: int = RESERVE_BYTES
    ) -> None:
        self._place = place
        self._remote = remote
        self._folder = folder / place.name
        self._reserve_bytes = reserve_bytes
        self._local = LocalTokenFiles(self._folder)
        manifest = read_manifest(place)
        self._slots = manifest.header.images_per_shard
        self._records = {shard_key(shard.index): shard for shard in manifest.shards.values()}
        self._names = {key: f"{shard.digest or shard.sha256}.shard" for key, shard in self._records.items()}
        self._copied: set[str] = set()
        self._lock = threading.Lock()  # of what follows
        self._queue: deque[str] = deque()
        self._not_before: dict[str, float] = {}  # keys that are queued, or failed, or are made by another process
        self._threads = 0
        self._stopping = False

    def tail(self, key: str, length: int) -> tuple[bytes, int]:
        """See `TokenFiles`; always remote, so that the size and the index of a copy need not be trusted."""
        return self._remote.tail(key, length)

    def at_hand(self, key: str, offset: int, length: int) -> NDArray[Any] | None:
        if key not in self._copied:
            return None
        try:
            return self._local.at_hand(self._names[key], offset, length)
        except TokenFileError:
            self._forget([key])
            return None

    def fetch(self, wanted: Sequence[Wanted], arrived: Callable[[int], None] | None = None) -> None:
        here = [position for position, want in enumerate(wanted) if self._is_here(want.key)]
        bad = self._fetch_here([wanted[position] for position in here], lambda number: _tell(arrived, here[number]))
        local = set(here) - {here[number] for number in bad}
        there = [position for position in range(len(wanted)) if position not in local]
        if there:
            fetched = [wanted[position] for position in there]
            self._remote.fetch(fetched, lambda number: _tell(arrived, there[number]))

    def close(self) -> None:
        with self._lock:
            self._stopping = True
            self._queue.clear()
        self._remote.close()
        self._local.close()

    def _fetch_here(self, wanted: Sequence[Wanted], arrived: Callable[[int], None]) -> Sequence[int]:
        """Read from copies; gives the positions of what has to be read remotely, because a copy is damaged."""
        bad: list[int] = []

        def check(number: int) -> None:
            try:
                arrived(number)
            except ShardDamagedError:
                bad.append(number)

        try:
            renamed = [want._replace(key=self._names[want.key]) for want in wanted]
            self._local.fetch(renamed, check)
        except TokenFileError:
            bad = list(range(len(wanted)))
        if bad:
            self._forget({wanted[number].key for number in bad})
        return bad

    def _is_here(self, key: str) -> bool:
        """Whether there is a copy; if not, one will be made."""
        if key in self._copied:
            return True
        if key not in self._records:
            return False
        if (self._folder / self._names[key]).exists():
            self._copied.add(key)
            return True
        with self._lock:
            if not self._stopping and time.monotonic() >= self._not_before.get(key, 0.0):
                if not self._not_before:
                    self._announce()
                self._not_before[key] = float("inf")
                self._queue.append(key)
                if self._threads < COPIES_AT_ONCE:
                    self._threads += 1
                    threading.Thread(target=self._copy_queued, name="vlmx-pull").start()
        return False

    def _announce(self) -> None:
        total = sum(record.bytes for record in self._records.values())
        note(f"shards of {self._place.name} ({format_bytes(total)}) are copied to {self._folder} when they are used")

    def _forget(self, keys: Iterable[str]) -> None:
        """Throw copies away that are not what was copied."""
        for key in keys:
            note(f"the copy {self._folder / self._names[key]} is damaged: it is deleted and made again")
            (self._folder / self._names[key]).unlink(missing_ok=True)
            self._copied.discard(key)
            with self._lock:
                self._not_before[key] = 0.0
        self._local.close()

    def _copy_queued(self) -> None:
        """A thread's work: until nothing is queued, or the process ends."""
        while True:
            with self._lock:
                if not self._queue or self._ending():
                    self._threads -= 1
                    return
                key = self._queue.popleft()
            again_s = float("inf")
            try:
                if not self._copy(key):
                    again_s = RETRY_S
            except (VlmxError, TokenFileError, OSError) as error:
                with self._lock:
                    told, self._stopping = self._stopping, True
                if not told:
                    note(f"no more shards of {self._place.name} are copied, they are read remotely: {error}")
            with self._lock:
                self._not_before[key] = time.monotonic() + again_s

    def _ending(self) -> bool:
        return self._stopping or not threading.main_thread().is_alive()

    def _copy(self, key: str) -> bool:
        """Make a copy; False: another process is at it, or this one is ending."""
        record, target = self._records[key], self._folder / self._names[key]
        self._folder.mkdir(parents=True, exist_ok=True)
        with _lock_of(target.with_suffix(".partial")) as descriptor:
            if descriptor is None or target.exists():
                return target.exists()
            free = shutil.disk_usage(self._folder).free
            if free < record.bytes + self._reserve_bytes:
                raise OSError(f"{self._folder} has {format_bytes(free)} left")
            os.ftruncate(descriptor, 0)
            with open(descriptor, "wb", closefd=False) as file:
                for piece in checked_bytes(self._remote, record, self._slots):
                    if self._ending():
                        return False
                    file.write(piece)
                file.flush()
                os.fsync(descriptor)
            os.replace(target.with_suffix(".partial"), target)
        return True


def _tell(arrived: Callable[[int], None] | None, position: int) -> None:
    if arrived is not None:
        arrived(position)


@contextmanager
def _lock_of(path: Path) -> Iterator[int | None]:
    """The file, open and locked; None when another process has it, or had it until now."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor if _locked(descriptor) and _is_at(descriptor, path) else None
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file still has this name: its maker renames it when it is complete."""
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False
