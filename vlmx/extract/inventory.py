"""Which images does a source have, by content, and how many of them are new to the cache?"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from vlmx.cache_specs.ids import image_id
from vlmx.cache_specs.places import Place, place_of
from vlmx.console import note, progress
from vlmx.errors import DataError
from vlmx.extract.ahead import work_ahead
from vlmx.extract.preprocess import source_size
from vlmx.extract.sources.source import ImageRecord, ImageSource, unstamped
from vlmx.extract.stamps import Known, StampFile

SAVE_EVERY_S = 30.0
SAVE_SHARE = 0.05  # of the time, at most, goes into saving the stamps of what was read so far
BATCH = 64  # images a task of a thread: asking for a file's stamp is quicker than handing out a task


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceImage:
    """One image of a source, whose content is known.

    Attributes:
        key: its name in the source.
        id: content id of its bytes.
        source_wh: (width, height) in pixels that its header states; None if it states none.
        load: reads its bytes.
    """

    key: str
    id: str
    source_wh: tuple[int, int] | None
    load: Callable[[], bytes]


def take_inventory(
    source: ImageSource,
    pool: ThreadPoolExecutor,
    *,
    root: str | Path | Place,
    ahead: int,
    check: Callable[[], None],
) -> list[SourceImage]:
    """Content id and size of every image of a source. Pixels are not decoded.

    Images whose files have not changed since the last time are not read (`stamps`). Of several processes that ask at
    once on one machine, one reads, and the others wait and use what it found. Killed at any instant, the next call goes
    on near where this one was.

    Args:
        source: the images.
        pool: the threads that read.
        root: place of all caches; the stamps lie there.
        ahead: how many tasks may be under way.
        check: called now and then; may raise to stop.

    Raises:
        DataError: a file cannot be read, or two different images have the same key.
        OutOfSpaceError: no room for the stamps.
    """
    records = list(source.records())
    if all(record.stamp is unstamped for record in records):
        return _take(source, records, [None] * len(records), _Memory(None), pool, ahead, check)
    file = StampFile(place_of(root), source.name)
    with file.only_here(check), _Memory(file) as memory:
        stamps: list[str | None] = []
        batches = (records[start : start + BATCH] for start in range(0, len(records), BATCH))
        for some in work_ahead(pool, _stamps, batches, ahead=ahead):
            stamps += some
            check()
        return _take(source, records, stamps, memory, pool, ahead, check)


def _take(
    source: ImageSource,
    records: Sequence[ImageRecord],
    stamps: Sequence[str | None],
    memory: _Memory,
    pool: ThreadPoolExecutor,
    ahead: int,
    check: Callable[[], None],
) -> list[SourceImage]:
    images: dict[str, SourceImage] = {}
    known = [memory.find(record.key, stamp) for record, stamp in zip(records, stamps, strict=True)]
    unread = [record for record, before in zip(records, known, strict=True) if before is None]
    reading = work_ahead(pool, _read, unread, ahead=ahead)
    with progress(f"read {source.name}", len(records), "images") as bar:
        for record, stamp, before in zip(records, stamps, known, strict=True):
            if before is None:
                image = next(reading)
                memory.add(image, stamp)
            else:
                image = SourceImage(key=record.key, id=before.id, source_wh=before.wh, load=record.load)
            earlier = images.setdefault(image.key, image)
            if earlier.id != image.id:
                raise DataError(
                    f"two different images are named '{image.key}'",
                    why=source.describe,
                    fix="give them different names, or extract the tars as two data sets, each with its own --name",
                )
            check()
            bar.advance()
    if len(unread) < len(records):
        same = len(records) - len(unread)
        note(f"{source.name}: {same:,} of {len(records):,} images were known from an earlier run, and not read")
    return list(images.values())


def _stamps(records: Sequence[ImageRecord]) -> list[str | None]:
    return [record.stamp() for record in records]


def _read(record: ImageRecord) -> SourceImage:
    data = read_bytes(record.key, record.load)
    return SourceImage(key=record.key, id=image_id(data), source_wh=source_size(data), load=record.load)


class _Memory:
    """What earlier runs found in the files of a data set, and what this run finds.

    Saved now and then, and at the end of the block, however it ends.
    """

    def __init__(self, file: StampFile | None) -> None:
        self._file = file
        self._known = file.read() if file else {}
        self._changed = False
        self._save_at = time.monotonic() + SAVE_EVERY_S

    def find(self, key: str, stamp: str | None) -> Known | None:
        """What is known of an image, if its file has not changed since."""
        known = self._known.get(key)
        return known if known is not None and known.stamp == stamp else None

    def add(self, image: SourceImage, stamp: str | None) -> None:
        """An image was read; `stamp` was asked for before."""
        if stamp is not None:
            self._known[image.key] = Known(stamp, image.id, image.source_wh)
            self._changed = True
        if time.monotonic() >= self._save_at:
            self._save()

    def _save(self) -> None:
        started = time.monotonic()
        if self._file and self._changed:
            self._file.write(self._known)
            self._changed = False
        ended = time.monotonic()
        self._save_at = ended + max(SAVE_EVERY_S, (ended - started) / SAVE_SHARE)

    def __enter__(self) -> _Memory:
        return self

    def __exit__(self, *raised: object) -> None:
        self._save()


def read_bytes(key: str, load: Callable[[], bytes]) -> bytes:
    """The bytes of an image file.

    Raises:
        DataError: the file cannot be read at all; a file that can be read but not decoded is another matter.
    """
    try:
        return load()
    except OSError as error:
        raise DataError(f"cannot read the image '{key}'", why=str(error), fix="check the file and its disk") from error


@dataclass(frozen=True, kw_only=True)
class SourceCount:
    """How much of a source is new.

    Attributes:
        name: of its image table.
        images: its keys.
        different: different images among them.
        in_cache: different images that the cache has already.
        earlier: different images that the cache lacks, but that an earlier source of the command has, too.
        new: different images that are encoded for this source.
    """

    name: str
    images: int
    different: int
    in_cache: int
    earlier: int
    new: int

    @property
    def describe(self) -> str:
        """One line for the user."""
        different = f" ({self.different:,} different)" if self.different != self.images else ""
        earlier = f", {self.earlier:,} in a data set before it" if self.earlier else ""
        there = f"{self.in_cache:,} already there{earlier}"
        return f"{self.name}: {self.images:,} images{different}, {there}, {self.new:,} new"


def count_sources(inventories: Mapping[str, Sequence[SourceImage]], missing: Collection[str]) -> list[SourceCount]:
    """How much of each source is new.

    Args:
        inventories: the images of each source, by its name, in the order of the command.
        missing: ids that the cache lacks.
    """
    counts = []
    lacking = set(missing)
    left = set(lacking)
    for name, images in inventories.items():
        ids = {image.id for image in images}
        new = ids & left
        counts.append(
            SourceCount(
                name=name,
                images=len(images),
                different=len(ids),
                in_cache=len(ids - lacking),
                earlier=len(ids & lacking) - len(new),
                new=len(new),
            )
        )
        left -= new
    return counts
