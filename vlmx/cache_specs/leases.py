"""Who writes which part of a cache on an object store, where there are no locks that die with a process?

A claim is a lease: a small object that its holder rewrites every few seconds, always on the condition that it is still
what the holder wrote last. A lease that was not renewed for a minute, by the store's clock, may be taken over, also
by a conditional write; the former holder notices before its next commit. On the machine of a holder that is no longer
alive nobody waits for that minute.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from vlmx.cache_specs.claims import GUARD, GUARD_NOTE_S, GUARD_TIMEOUT_S, JOB, WRITERS, Claims
from vlmx.cache_specs.object_place import ObjectPlace, Tag, no_conditions
from vlmx.console import note
from vlmx.errors import CacheError, VlmxError

RENEW_S = 10.0
STALE_S = 60.0
POLL_S = 0.5

_CLOCK = f"{WRITERS}/clock"
_NEVER: Tag = (("e_tag", '"00000000000000000000000000000000"'),)


@dataclass(frozen=True, kw_only=True)
class _Lease:
    """A lease that this process holds: what it wrote last."""

    tag: Tag
    renewals: int


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """A lease as it was found.

    Attributes:
        tag, modified: its state in the store.
        held: whether its holder has not given it up.
        holder: for messages.
        process: which process of which machine it is; see `_this_process`.
    """

    tag: Tag
    modified: datetime
    held: bool
    holder: str
    process: str


class LeaseClaims(Claims):
    """Claims as leases.

    Args:
        place: of the cache.
        renew_s: pause between renewals.
        stale_s: age, by the store's clock, at which a lease that was not renewed is taken over.
    """

    def __init__(self, place: ObjectPlace, *, renew_s: float = RENEW_S, stale_s: float = STALE_S) -> None:
        self._place = place
        self._renew_s = renew_s
        self._stale_s = stale_s
        self._token = uuid.uuid4().hex
        self._lock = threading.RLock()  # of everything below
        self._leases: dict[str, _Lease] = {}
        self._lost: set[str] = set()
        self._conditions_work = False
        self._images: int | None = None
        self._images_elsewhere = 0
        self._wake = threading.Event()  # the thread looks at once whether there is anything left to renew
        self._thread: threading.Thread | None = None

    @contextmanager
    def guard(self) -> Iterator[None]:
        self._wait_for_guard()
        try:
            yield
        except BaseException:
            with suppress(VlmxError):  # the first error matters; the guard ends by itself
                self._give_up(GUARD)
            raise
        if not self._give_up(GUARD):
            raise self._taken_over()

    def take(self, share: int) -> bool:
        key = _key(share)
        with self._lock:
            if key in self._leases:
                return True
            seen = self._look(key)
            if seen is not None and self._alive(seen, self._guard_time()):
                return False
            return self._claim(key, seen)

    def drop(self, share: int) -> None:
        self._give_up(_key(share))

    def others(self) -> list[str]:
        now = self._guard_time()
        silent_s: dict[str, float] = {}  # a holder has a lease for each of its shares
        for name in self._place.names(WRITERS):
            key = f"{WRITERS}/{name}"
            if not name.endswith(".lease") or key in self._leases:
                continue
            seen = self._look(key)
            if seen is not None and self._alive(seen, now):
                since_s = (now - seen.modified).total_seconds()
                silent_s[seen.holder] = min(since_s, silent_s.get(seen.holder, since_s))
        return [
            f"{holder} (seen {since_s:.0f} s ago, given up after {self._stale_s:.0f} s)"
            for holder, since_s in silent_s.items()
        ]

    def still_mine(self) -> None:
        # on a thread of its own: a shard asks while it is being uploaded, on a thread of the library, which must not
        # wait for a second request there
        with ThreadPoolExecutor(1) as thread:
            thread.submit(self._renew_all).result()

    def _renew_all(self) -> None:
        with self._lock:
            for key in list(self._leases):
                self._renew(key)
            if self._lost:
                raise self._taken_over()

    def job(self) -> dict[str, Any] | None:
        try:
            job: dict[str, Any] = json.loads(self._place.read(f"{WRITERS}/{JOB}"))
        except FileNotFoundError:
            return None
        return job

    def set_job(self, job: dict[str, Any]) -> None:
        self._place.write(f"{WRITERS}/{JOB}", json.dumps(job).encode())

    def report(self, images: int) -> None:
        """See `Claims`; others learn it with the next renewal."""
        self._images = images

    def reports(self) -> int:
        return self._images_elsewhere + (self._images or 0)

    def clear(self) -> None:
        if self.others():
            return
        with self._lock:
            self._images = None
            for key in self._shares():
                del self._leases[key]
            self._place.remove_tree(WRITERS)

    def close(self) -> None:
        """See `Claims`. When the store cannot be reached any more, the claims end by themselves."""
        self._images = None
        try:
            for key in self._shares():
                self._give_up(key)
        except VlmxError as error:
            note(f"the claims to {self._place.name} end in {self._stale_s:.0f} s: {error.what}")

    def _shares(self) -> list[str]:
        """The leases of this process but the guard, which is given up where its block ends."""
        return [key for key in self._leases if key != GUARD]

    def _wait_for_guard(self) -> None:
        started = time.monotonic()
        told = False
        while True:
            with self._lock:
                seen = self._look(GUARD)
                free = seen is None or not self._alive(seen, self._store_time() if seen.held else seen.modified)
                if free and self._claim(GUARD, seen):
                    break
            waited_s = time.monotonic() - started
            holder = seen.holder if seen else "another process"
            if waited_s > max(GUARD_TIMEOUT_S, 2 * self._stale_s):
                raise CacheError(
                    f"another process keeps {self._place.name} from being opened",
                    why=f"{holder} has held {self._place}/{GUARD} for {waited_s:.0f} s",
                    fix="wait until it has finished, or stop it; nothing is lost by stopping it",
                )
            if waited_s > GUARD_NOTE_S and not told:
                note(f"waiting for {holder}, which is opening {self._place.name}")
                told = True
            time.sleep(min(POLL_S, self._renew_s / 2))
        if not self._conditions_work:
            self._require_conditions()

    def _require_conditions(self) -> None:
        """The guard exists and is ours: nobody may make it, and nobody may change another state of it."""
        content = self._content(0, held=False)
        with self._lock:
            try:
                written = [self._place.write_if(GUARD, content, seen) for seen in (None, _NEVER)]
            except VlmxError:
                del self._leases[GUARD]
                raise
            if written != [None, None]:
                del self._leases[GUARD]
                raise no_conditions(self._place)
        self._conditions_work = True

    def _claim(self, key: str, seen: _Seen | None) -> bool:
        tag = self._place.write_if(key, self._content(0, held=True), seen.tag if seen else None)
        if tag is None:
            return False
        self._leases[key] = _Lease(tag=tag, renewals=0)
        if self._thread is None:
            self._thread = threading.Thread(target=self._keep, name="vlmx-leases", daemon=True)
            self._thread.start()
        return True

    def _renew(self, key: str) -> None:
        lease = self._leases[key]
        tag = self._place.write_if(key, self._content(lease.renewals + 1, held=True), lease.tag)
        if tag is None:
            del self._leases[key]
            self._lost.add(key)
        else:
            self._leases[key] = _Lease(tag=tag, renewals=lease.renewals + 1)

    def _give_up(self, key: str) -> bool:
        """Let others have it; False when it was lost before."""
        with self._lock:
            lease = self._leases.pop(key, None)
            if not self._leases:
                self._wake.set()
            if lease is None:
                return False
            return self._place.write_if(key, self._content(lease.renewals + 1, held=False), lease.tag) is not None

    def _keep(self) -> None:
        """The thread that renews, as long as there is something to renew."""
        while True:
            self._wake.wait(self._renew_s)
            with self._lock:
                self._wake.clear()
                if not self._leases:
                    self._thread = None
                    return
                try:
                    for key in list(self._leases):
                        self._renew(key)
                    self._exchange_reports()
                except VlmxError:  # no network for now; whether the leases live is asked again before each commit
                    continue

    def _exchange_reports(self) -> None:
        if self._images is None:
            return
        own = f"{self._token}.done"
        self._place.write(f"{WRITERS}/{own}", str(self._images).encode())
        total = 0
        for name in self._place.names(WRITERS):
            if name.endswith(".done") and name != own:
                try:
                    total += int(self._place.read(f"{WRITERS}/{name}"))
                except FileNotFoundError:
                    continue
        self._images_elsewhere = total

    def _content(self, renewals: int, *, held: bool) -> bytes:
        lease = {
            "holder": f"process {os.getpid()} on {os.uname().nodename}",
            "process": _this_process(),
            "token": self._token,
            "renewals": renewals,
            "held": held,
        }
        return json.dumps(lease).encode()

    def _look(self, key: str) -> _Seen | None:
        version = self._place.version(key)
        if version is None:
            return None
        try:
            lease = json.loads(self._place.read(key))
        except FileNotFoundError:
            return None
        # the content may be newer than the version: then a write on the condition of that version fails, as it should
        return _Seen(
            tag=version.tag,
            modified=version.modified,
            held=lease["held"],
            holder=lease["holder"],
            process=lease["process"],
        )

    def _alive(self, seen: _Seen, now: datetime) -> bool:
        fresh = (now - seen.modified).total_seconds() <= self._stale_s
        return seen.held and fresh and not _is_dead(seen.process)

    def _guard_time(self) -> datetime:
        """The store's clock, late by at most a renewal: when this process wrote the guard last."""
        version = self._place.version(GUARD)
        if version is None:
            raise self._taken_over()
        return version.modified

    def _store_time(self) -> datetime:
        """The store's clock."""
        while True:
            self._place.write(_CLOCK, self._token.encode())
            version = self._place.version(_CLOCK)
            self._place.remove(_CLOCK)
            if version is not None:  # otherwise another process has removed it meanwhile
                return version.modified

    def _taken_over(self) -> CacheError:
        return CacheError(
            f"another process may have taken over what this one was writing in {self._place.name}",
            why=f"this process, or its network, stood still for more than {self._stale_s:.0f} s; what it had "
            "committed before is intact",
            fix="give the same command again, it goes on with what is missing",
        )


def _key(share: int) -> str:
    return f"{WRITERS}/{share}.lease"


def _this_process() -> str:
    """Machine since its last start, space of process numbers, number and start of this process; "" where unknown."""
    return _process(os.getpid())


def _process(pid: int) -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ended = state in "ZX"  # killed, and nobody has asked for its exit code yet
        return "" if ended else f"{boot} {os.readlink('/proc/self/ns/pid')} {pid} {numbers[18]}"
    except OSError:
        return ""


def _is_dead(process: str) -> bool:
    """Whether a process of this machine has ended; False for one of another machine."""
    here = _this_process()
    if not (process and here) or process.split()[:2] != here.split()[:2]:
        return False
    return _process(int(process.split()[2])) != process
