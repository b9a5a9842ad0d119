"""What is a source of images, whatever it was made from?"""

from __future__ import annotations

import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

IMAGE_SUFFIXES = frozenset(
    f".{kind}"
    for kind in ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm")
)
SHOWN = 5  # how many names an error lists
SETTLED_NS = 2_000_000_000  # a file that changed more recently could change again within one tick of its clock


def unstamped() -> None:
    """The stamp of an image whose bytes must be read to know it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRecord:
    """One image of a source.

    Attributes:
        key: its name within the source; a data set's table leads from it to the image's content id.
        load: reads the file's bytes; may be called from any thread, and more than once.
        stamp: a text that changes when the bytes do, found without reading them; None when nothing vouches for them.
            May be called from any thread.
    """

    key: str
    load: Callable[[], bytes]
    stamp: Callable[[], str | None] = unstamped


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """Images in an order that is the same on every machine.

    Attributes:
        name: name of the data set's image table.
        describe: one line for the user: what it is, how many images, what was left out and why.
        images: one record an image.
    """

    name: str
    describe: str
    images: tuple[ImageRecord, ...]

    def records(self) -> Iterable[ImageRecord]:
        """The images, in order. A key appears once, unless tars repeat it."""
        return self.images

    def first(self, count: int) -> ImageSource:
        """Only the first `count` images."""
        return replace(self, describe=f"{self.describe}; only the first {count:,}", images=self.images[:count])


def file_stamp(path: str) -> str | None:
    """Size and times of a file; None when it cannot be asked, or was changed just now.

    The change time is the file system's own: nobody sets it back.
    """
    try:
        state = os.stat(path)
    except OSError:
        return None  # reading it will say why
    if time.time_ns() - max(state.st_mtime_ns, state.st_ctime_ns) < SETTLED_NS:
        return None
    return f"{state.st_size}-{state.st_mtime_ns}-{state.st_ctime_ns}"


def read_file(path: str) -> bytes:
    """The bytes of a file.

    Raises:
        OSError: it cannot be read, or is something else than a file, of which the end may never come.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"{path} is not a regular file")
        return file.read()


def part_stamp(container: str | None, part: str) -> str | None:
    """The stamp of a part of a file from the stamp of the file."""
    return None if container is None else f"{container}@{part}"


def describe(what: str, count: int, left_out: str) -> str:
    """The line of a source."""
    return f"{what}: {count:,} images" + (f"; left out: {left_out}" if left_out else "")


def others(found: Counter[str]) -> str:
    """What was found and is no image file, e.g. "12 other files (.txt 10, .json 2)"."""
    if not found:
        return ""
    return f"{found.total():,} other files ({first([f'{suffix} {n:,}' for suffix, n in found.most_common()])})"


def first(items: Sequence[str]) -> str:
    """The first few of a list, for an error."""
    return ", ".join(items[:SHOWN]) + (", ..." if len(items) > SHOWN else "")
