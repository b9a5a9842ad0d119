"""Which images lie in webdataset tars, on a disk or on a server?"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, cast
from urllib.parse import unquote

from vlmx.cache_specs.ids import table_name
from vlmx.console import progress
from vlmx.errors import DataError
from vlmx.extract.sources.patterns import expand, is_remote
from vlmx.extract.sources.remote import RangedReader, RemoteFile
from vlmx.extract.sources.source import (
    IMAGE_SUFFIXES,
    ImageRecord,
    ImageSource,
    describe,
    file_stamp,
    first,
    others,
    part_stamp,
)

LISTED_AT_ONCE = 16  # listing a tar on a server is waiting for its headers, one after the other


@dataclass(frozen=True, kw_only=True)
class _Listing:
    """What one tar holds.

    Attributes:
        images: one record an image, in the order of the tar.
        rest: what else is in it, by suffix.
        ends: whether the mark that ends a tar is there.
    """

    images: tuple[ImageRecord, ...]
    rest: Counter[str]
    ends: bool


def open_tars(pattern: str, name: str | None) -> ImageSource:
    """The images of tars; keys are the names of the members. Only headers are read.

    Args:
        pattern: a path, an address, a glob, or braces such as "data/{000..003}.tar".
        name: of the image table; default: of the tar, or of the folder when there are several.

    Raises:
        DataError: no such tar, one of them twice, one is damaged, none holds an image, a server cannot be reached.
        BackendError: a tar on a server, and no library for that.
    """
    paths = expand(pattern, ".tar")
    with ExitStack() as stack:
        bar = stack.enter_context(progress("list tars", len(paths), "tars")) if is_remote(pattern) else None
        pool = stack.enter_context(ThreadPoolExecutor(min(LISTED_AT_ONCE, len(paths))))
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        listings = []
        for listing in pool.map(_list, paths):
            listings.append(listing)
            if bar:
                bar.advance()
    images = tuple(record for listing in listings for record in listing.images)
    rest = sum((listing.rest for listing in listings), Counter[str]())
    if not images:
        raise DataError(f"no image in {len(paths)} tar files ({pattern})", why=others(rest) or "they are empty")
    line = describe(f"{len(paths)} tar files ({pattern})", len(images), others(rest))
    endless = [PurePosixPath(path).name for path, listing in zip(paths, listings, strict=True) if not listing.ends]
    if endless:
        line += f"; {len(endless)} tars lack their end mark and may be cut off ({first(endless)})"
    return ImageSource(name=name or _table_name(paths), describe=line, images=images)


def _table_name(paths: list[str]) -> str:
    path = PurePosixPath(unquote(paths[0])) if is_remote(paths[0]) else Path(paths[0]).resolve()
    return table_name(path.stem if len(paths) == 1 else path.parent.name)


def _list(path: str) -> _Listing:
    with ExitStack() as stack:
        if is_remote(path):
            remote = RemoteFile(path)
            file = cast(IO[bytes], RangedReader(remote))
            return _members(path, file, remote.size, remote.read, remote.stamp)
        stamp = file_stamp(path)
        try:
            file = stack.enter_context(open(path, "rb"))
            size = Path(path).stat().st_size
        except OSError as error:
            raise DataError(f"cannot read the tar {path}", why=str(error)) from error
        return _members(path, file, size, partial(_read_range, path), stamp)


def _members(path: str, file: IO[bytes], size: int, read: Callable[[int, int], bytes], stamp: str | None) -> _Listing:
    images: list[ImageRecord] = []
    rest: Counter[str] = Counter()
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                suffix = PurePosixPath(member.name).suffix.lower()
                if member.isdir():
                    continue
                if not member.isreg():
                    rest["links"] += 1
                elif suffix not in IMAGE_SUFFIXES:
                    rest[suffix or member.name] += 1
                elif member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"it ends within {member.name}")
                else:
                    images.append(
                        ImageRecord(
                            key=member.name,
                            load=partial(read, member.offset_data, member.size),
                            stamp=partial(part_stamp, stamp, f"{member.offset_data}+{member.size}"),
                        )
                    )
            file.seek(tar.offset)
            block = file.read(tarfile.BLOCKSIZE)
            if block.strip(b"\0") or 0 < len(block) < tarfile.BLOCKSIZE:  # where tarfile itself stops in silence
                raise tarfile.ReadError(f"neither a header nor the end mark at byte {tar.offset:,}")
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"cannot read the tar {path}",
            why=str(error),
            fix="it is truncated, compressed, or no tar: fetch it again",
        ) from error
    return _Listing(images=tuple(images), rest=rest, ends=bool(block))


def _read_range(path: str, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) != size:
        raise OSError(f"{path} ends before byte {offset + size:,}")
    return data
