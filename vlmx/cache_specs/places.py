"""Where do caches lie: in a folder of a disk or below a prefix of an object store, with the same few operations?

A place holds files under keys: relative paths with "/" between their parts, such as "tokens.zarr/zarr.json". Whoever
writes a key replaces the whole file at once, and what was written survives a power loss.
"""

from __future__ import annotations

import itertools
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from vlmx.errors import CacheError
from vlmx.runs import space_error, sync_folder, write_atomic

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from vlmx.cache_specs.claims import Claims
    from vlmx.cache_specs.token_files import TokenFiles

PARTIAL = "partial"  # folder of streams that are being written, in the place itself: on the same disk as their target
GATHER_BYTES = 1 << 23
GATHER_PARTS = 512  # systems take at most 1024 in a call
_counter = itertools.count()


class Place(ABC):
    """A folder for caches, or of one cache.

    Attributes:
        url: how users name it: a path, or "s3://bucket/prefix".
        is_local: whether it is a folder of this machine's file system.
    """

    url: str
    is_local: bool

    @property
    def name(self) -> str:
        """The last part of the url."""
        return self.url.rstrip("/").rsplit("/", 1)[-1]

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.url == other.url  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash(self.url)

    @property
    @abstractmethod
    def parent(self) -> Place:
        """The folder that it lies in."""

    @abstractmethod
    def child(self, name: str) -> Place:
        """The folder `name` in it."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """A file's bytes.

        Raises:
            FileNotFoundError: there is no such file.
        """

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Make a file of `data`, or replace it.

        Raises:
            OutOfSpaceError: the disk is full; the old file is intact.
        """

    @abstractmethod
    def write_stream(self, key: str, parts: Iterable[Buffer]) -> int:
        """Make a large file of `parts`, or replace it, without holding all of it; returns its bytes.

        Nobody sees the file before it is whole: also when the process is killed, or `parts` raises.

        Raises:
            OutOfSpaceError: the disk is full; nothing is left of the file.
        """

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Bytes of a file; None where there is no such file."""

    @abstractmethod
    def names(self, key: str = "") -> list[str]:
        """Names of the files and folders directly in the folder `key`, sorted; none when it does not exist."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """Delete a file, if it exists, for good: it does not come back after a power loss."""

    @abstractmethod
    def remove_tree(self, key: str) -> None:
        """Delete the folder `key` with everything in it, if it exists."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Room for more; None where there is no limit to ask for."""

    @abstractmethod
    def claims(self) -> Claims:
        """Who writes what of the cache that lies here; call it once a writer."""

    @abstractmethod
    def token_files(self) -> TokenFiles:
        """Positioned reads of the files of the cache that lies here; call it once a process."""

    def exists(self, key: str) -> bool:
        """Whether there is such a file."""
        return self.size(key) is not None


class LocalPlace(Place):
    """A folder, which need not exist.

    Attributes:
        path: the folder.
    """

    is_local = True

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.url = str(self.path)

    @property
    def name(self) -> str:
        return self.path.name or self.path.resolve().name

    @property
    def parent(self) -> LocalPlace:
        return LocalPlace(self.path.parent)

    def child(self, name: str) -> LocalPlace:
        return LocalPlace(self.path / name)

    def read(self, key: str) -> bytes:
        try:
            return (self.path / key).read_bytes()
        except NotADirectoryError as error:
            raise FileNotFoundError(str(error)) from error

    def write(self, key: str, data: bytes) -> None:
        write_atomic(self.path / key, data)

    def write_stream(self, key: str, parts: Iterable[Buffer]) -> int:
        target = self.path / key
        temporary = self.path / PARTIAL / f"{os.uname().nodename}-{os.getpid()}-{next(_counter)}"
        written = 0
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb", buffering=0) as file:
                for several in _gather(parts):
                    written += _write_all(file.fileno(), several)
                os.fsync(file.fileno())
            os.replace(temporary, target)
            folder = target.parent
            while folder != self.path:
                sync_folder(folder)
                folder = folder.parent
        except OSError as error:
            raise space_error(error, target) from error
        finally:
            temporary.unlink(missing_ok=True)
        return written

    def size(self, key: str) -> int | None:
        try:
            return (self.path / key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def names(self, key: str = "") -> list[str]:
        try:
            return sorted(os.listdir(self.path / key))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def remove(self, key: str) -> None:
        with suppress(FileNotFoundError):
            (self.path / key).unlink()
            sync_folder((self.path / key).parent)

    def remove_tree(self, key: str) -> None:
        with suppress(FileNotFoundError):
            shutil.rmtree(self.path / key)

    def free_bytes(self) -> int:
        folder = self.path.absolute()
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def claims(self) -> Claims:
        from vlmx.cache_specs.claims import LocalClaims

        return LocalClaims(self.path)

    def token_files(self) -> TokenFiles:
        from vlmx.cache_specs.local_files import LocalTokenFiles

        return LocalTokenFiles(self.path)


def _gather(parts: Iterable[Buffer]) -> Iterator[list[memoryview]]:
    """The parts in groups of some megabytes: fewer calls to the system, which then takes larger pages."""
    group: list[memoryview] = []
    size = 0
    for part in parts:
        view = memoryview(part).cast("B")
        group.append(view)
        size += view.nbytes
        if size >= GATHER_BYTES or len(group) == GATHER_PARTS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _write_all(descriptor: int, views: list[memoryview]) -> int:
    """Write all of `views`, in as many calls as the system needs."""
    total = 0
    while views:
        count = os.writev(descriptor, views)
        total += count
        while views and count >= views[0].nbytes:
            count -= views.pop(0).nbytes
        if views:
            views[0] = views[0][count:]
    return total


def place_of(where: str | Path | Place) -> Place:
    """The place that a user names: a path, or a url such as "s3://bucket/prefix".

    Raises:
        CacheError: a url of a kind that is not known.
        BackendError: the library for object stores is not installed.
    """
    if isinstance(where, Place):
        return where
    if isinstance(where, Path) or "://" not in where:
        return LocalPlace(Path(where).expanduser())
    scheme = where.split("://", 1)[0].lower()
    if scheme == "file":
        return LocalPlace(where.split("://", 1)[1])
    if scheme not in REMOTE_SCHEMES:
        raise CacheError(
            f"caches cannot lie at '{where}'",
            why=f"'{scheme}' is not one of {', '.join(REMOTE_SCHEMES)}",
            fix="give a folder, or a url such as s3://bucket/path",
        )
    from vlmx.cache_specs.object_place import ObjectPlace

    return ObjectPlace(where)


REMOTE_SCHEMES = ("s3", "gs", "az", "http", "https")
