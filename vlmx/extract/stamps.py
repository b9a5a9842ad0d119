"""Which images of a data set need not be read again, because their files have not changed since the last time?

One text file a data set, beside its image table: `datasets/<name>.stamps.jsonl`, a line an image. It may be deleted at
any time. Of caches on object stores it lies in ~/.cache/vlmx/stamps. A stamp can only save reading, never put wrong
tokens under an id: what is encoded is read and hashed then.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from vlmx.cache_specs.ids import DATASETS
from vlmx.cache_specs.places import LocalPlace, Place
from vlmx.console import note
from vlmx.extract.weights.lookup import cache_folder
from vlmx.runs import space_error, write_atomic

SUFFIX = ".stamps.jsonl"
FORMAT = 1  # of the file; another one, and all images are read again
LOOK_EVERY_S = 0.1
NOTE_AFTER_S = 1.0
_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Known:
    """What was found when an image was read.

    Attributes:
        stamp: `ImageRecord.stamp` just before.
        id: content id.
        wh: (width, height) that its header states; None if it states none.
    """

    stamp: str
    id: str
    wh: tuple[int, int] | None


class StampFile:
    """The stamps of one data set.

    Args:
        root: place of all caches.
        dataset: name of the image table.
    """

    def __init__(self, root: Place, dataset: str) -> None:
        if isinstance(root, LocalPlace):
            folder = root.path / DATASETS
        else:
            folder = cache_folder().parent / "stamps" / hashlib.sha256(root.url.encode()).hexdigest()[:16]
        self._dataset = dataset
        self.path = folder / f"{dataset}{SUFFIX}"

    @contextmanager
    def only_here(self, check: Callable[[], None]) -> Iterator[None]:
        """While the block runs, no other process of this machine does it; waits for its turn.

        The lock ends with the process that has it. `check` is called while waiting; it may raise.
        """
        descriptor = self._open_lock()
        try:
            started = time.monotonic()
            told = False
            while not _lock(descriptor):
                check()
                if not told and time.monotonic() - started > NOTE_AFTER_S:
                    note(f"waiting for another process that reads the images of {self._dataset}")
                    told = True
                time.sleep(LOOK_EVERY_S)
            yield
        finally:
            os.close(descriptor)

    def _open_lock(self) -> int:
        path = self.path.with_name(f"{self._dataset}.stamps.lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise space_error(error, path) from error

    def read(self) -> dict[str, Known]:
        """What is known, by key; nothing when there is no file, or it is damaged."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            return self._damaged(error)
        known: dict[str, Known] = {}
        try:
            if json.loads(lines[0]) != {"stamps": FORMAT}:
                return {}
            for line in lines[1:]:
                key, stamp, image, wh = json.loads(line)
                if not _ID.fullmatch(image):
                    raise ValueError(f"{image!r} is no content id")
                known[key] = Known(stamp, image, None if wh is None else (int(wh[0]), int(wh[1])))
        except (ValueError, TypeError, IndexError) as error:
            return self._damaged(error)
        return known

    def _damaged(self, error: Exception) -> dict[str, Known]:
        note(f"{self.path} is damaged ({error}): all images of {self._dataset} are read again")
        return {}

    def write(self, known: Mapping[str, Known]) -> None:
        """Replace the file.

        Raises:
            OutOfSpaceError: the disk is full; the old file is intact.
        """
        lines = [json.dumps({"stamps": FORMAT})]
        lines += [json.dumps((key, one.stamp, one.id, one.wh)) for key, one in known.items()]
        write_atomic(self.path, "\n".join(lines) + "\n")


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
