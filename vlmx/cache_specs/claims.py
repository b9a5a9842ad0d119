"""Who writes which part of a cache now, so that several processes can fill one and a dead one stops nobody?

The shards of an extraction are dealt out by arithmetic: the shard with index i belongs to share i modulo the number of
shares. A process claims a share, and the next one before it is through; when it dies, its claims end with it, and
others may take these shares. Each also claims a number that is no share, so that it is seen while it has nothing to
write. The guard is held only for moments: while a cache is opened, a share is taken, or the seal is made.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmx.console import note
from vlmx.errors import CacheError
from vlmx.runs import space_error

GUARD = "writer.lock"
WRITERS = "writers"  # folder of claims; it exists only while somebody writes
JOB = "job.json"
GUARD_NOTE_S = 3.0
GUARD_TIMEOUT_S = 900.0


@dataclass(frozen=True, kw_only=True)
class Part:
    """Which of several processes that fill a cache together this one is.

    Attributes:
        index: from 0.
        count: how many there are.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.index < self.count, self


class Claims(ABC):
    """The claims of one process to one cache. Not to be shared between threads, but for `still_mine`."""

    @abstractmethod
    def guard(self) -> Any:
        """A context manager: what is done in its block, no other process does at the same time; waits for its turn.

        Raises:
            CacheError: another process kept the guard for a quarter of an hour.
        """

    @abstractmethod
    def take(self, share: int) -> bool:
        """Claim a share; False when another process has it. Only under the guard."""

    @abstractmethod
    def drop(self, share: int) -> None:
        """Give a share up that this process had taken. Only under the guard."""

    @abstractmethod
    def others(self) -> list[str]:
        """One line for each share that another process has: who it is. Only under the guard."""

    @abstractmethod
    def still_mine(self) -> None:
        """Called before each commit.

        Raises:
            CacheError: a claim was lost: this process was taken for dead, and another one may have its share.
        """

    @abstractmethod
    def job(self) -> dict[str, Any] | None:
        """What the processes that write agreed on; None when there is nothing. Only under the guard."""

    @abstractmethod
    def set_job(self, job: dict[str, Any]) -> None:
        """Write it down for those that come later. Only under the guard."""

    @abstractmethod
    def report(self, images: int) -> None:
        """Tell the others how many images this process has done; cheap, kept by nobody."""

    @abstractmethod
    def reports(self) -> int:
        """The sum of what all processes of this job told."""

    @abstractmethod
    def clear(self) -> None:
        """Forget job and reports, if no other process has a share. Only under the guard."""

    @abstractmethod
    def close(self) -> None:
        """Give up all shares."""


class LocalClaims(Claims):
    """Claims as locks of files, which the system takes back from a process that died.

    Args:
        cache: the cache's folder; made when it does not exist.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._folder = cache / WRITERS
        self._shares: dict[int, int] = {}  # share -> descriptor of its locked file
        self._report: Path | None = None

    @contextmanager
    def guard(self) -> Iterator[None]:
        descriptor = _open(self._cache / GUARD)
        try:
            _wait_for(descriptor, self._cache)
            yield
        finally:
            os.close(descriptor)

    def take(self, share: int) -> bool:
        if share in self._shares:
            return True
        descriptor = _open(self._path(share))
        if not _lock(descriptor, self._cache):
            os.close(descriptor)
            return False
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
        self._shares[share] = descriptor
        return True

    def drop(self, share: int) -> None:
        os.close(self._shares.pop(share))

    def others(self) -> list[str]:
        found = []
        for path in sorted(self._folder.glob("*.lock")):
            share = int(path.stem)
            if share in self._shares:
                continue
            descriptor = os.open(path, os.O_RDWR)
            if not _lock(descriptor, self._cache):
                found.append(os.pread(descriptor, 200, 0).decode(errors="replace") or "unknown")
            os.close(descriptor)
        return found

    def still_mine(self) -> None:
        """A lock ends only with the process."""

    def job(self) -> dict[str, Any] | None:
        try:
            job: dict[str, Any] = json.loads((self._folder / JOB).read_bytes())
        except (FileNotFoundError, ValueError):  # a file that was cut off: its writer was killed before it began
            return None
        return job

    def set_job(self, job: dict[str, Any]) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / JOB).write_text(json.dumps(job))
        except OSError as error:
            raise space_error(error, self._folder) from error

    def report(self, images: int) -> None:
        if self._report is None:
            self._report = self._folder / f"{os.uname().nodename}-{os.getpid()}.done"
        try:
            self._report.write_text(str(images))
        except OSError:  # a full disk, or the folder is gone with the seal: a number on the screen is worth no error
            return

    def reports(self) -> int:
        total = 0
        for path in self._folder.glob("*.done"):
            try:
                total += int(path.read_text() or 0)
            except (OSError, ValueError):  # it is being written
                continue
        return total

    def clear(self) -> None:
        if not self.others():
            shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        for descriptor in self._shares.values():
            os.close(descriptor)
        self._shares = {}

    def _path(self, share: int) -> Path:
        return self._folder / f"{share}.lock"


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise space_error(error, path) from error


def _lock(descriptor: int, cache: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        raise CacheError(
            f"files cannot be locked where {cache} lies",
            why=f"its file system says: {error.strerror}; without locks two processes could write the same file",
            fix="mount it with locks (Lustre: -o flock), or extract to another file system and copy the cache",
        ) from error
    return True


def _wait_for(descriptor: int, cache: Path) -> None:
    started = time.monotonic()
    told = False
    while not _lock(descriptor, cache):
        waited_s = time.monotonic() - started
        if waited_s > GUARD_TIMEOUT_S:
            raise CacheError(
                f"another process keeps {cache.name} from being opened",
                why=f"it has held the lock {cache / GUARD} for {waited_s:.0f} s",
                fix="wait until it has finished, or stop it; nothing is lost by stopping it",
            )
        if waited_s > GUARD_NOTE_S and not told:
            note(f"waiting for another process that is opening {cache.name}")
            told = True
        time.sleep(0.05)
