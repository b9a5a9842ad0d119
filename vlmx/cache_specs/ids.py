"""Which image is meant? Content ids of files, and each data set's table from its own keys to those ids."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmx.cache_specs.places import Place, place_of
from vlmx.errors import DataError, UsageError
from vlmx.registry import unknown_name

DATASETS = "datasets"
NAMES_SHOWN, FOLDERS_SHOWN, FOLDER_DEPTH = 5, 8, 2

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


def image_id(data: bytes) -> str:
    """SHA-256 of a file's bytes, 64 hex digits: equal files are one image, whatever their names."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True, kw_only=True)
class ImageEntry:
    """One image of a data set.

    Attributes:
        key: how the data set calls it, e.g. "coco/train2017/000000000009.jpg".
        id: `image_id` of its file.
        width, height: size of the image as stored, in pixels; 0 when it cannot be decoded.
        error: why it cannot be decoded; empty when it can.
    """

    key: str
    id: str
    width: int = 0
    height: int = 0
    error: str = ""


class ImageTable:
    """A data set's images, kept in `<cache root>/datasets/<name>.jsonl`, in the order of first appearance."""

    def __init__(self, name: str, entries: Iterable[ImageEntry]) -> None:
        self.name = name
        self._entries = {entry.key: entry for entry in entries}

    @classmethod
    def open(cls, root: str | Path | Place, name: str) -> ImageTable:
        """Read the table of data set `name` below the cache root.

        Raises:
            DataError: there is no such table, or one of its lines is damaged.
        """
        place = place_of(root)
        try:
            text = place.read(table_key(name)).decode()
        except FileNotFoundError:
            known = table_names(place)
            raise DataError(
                f"no images of data set '{name}' are known below {place}",
                why=unknown_name("data set", name, known).fix,
                fix=f"vlmx extract --data {name} makes the table",
            ) from None
        entries = []
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                entries.append(ImageEntry(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise DataError(
                    f"{place}/{table_key(name)} is damaged",
                    why=f"line {number}: {error}",
                    fix="delete it and give the `vlmx extract` command again; no image is encoded twice",
                ) from error
        return cls(name, entries)

    @classmethod
    def merge(
        cls, root: str | Path | Place, name: str, entries: Iterable[ImageEntry], *, guarded: bool = False
    ) -> ImageTable:
        """Add images to the table of data set `name` (made when there is none) and write it.

        Args:
            root: folder of all caches.
            name: of the data set.
            entries: images that it may have already.
            guarded: whether the caller holds the guard of the tables (`tables_guard`).

        Raises:
            DataError: a key is known already and stands for another image.
            UsageError: `name` cannot be a file name.
            OutOfSpaceError: the disk is full; the old table is intact.
        """
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"'{name}' cannot be the name of a data set",
                why="it must be letters, digits and . _ + -",
                fix="give another one with --name",
            )
        place = place_of(root)
        with nullcontext() if guarded else tables_guard(place):
            return cls._merge(place, name, entries)

    @classmethod
    def _merge(cls, place: Place, name: str, entries: Iterable[ImageEntry]) -> ImageTable:
        table = cls.open(place, name) if place.exists(table_key(name)) else cls(name, ())
        conflicts = table._add(entries)
        if conflicts:
            raise DataError(
                f"{len(conflicts)} images of data set '{name}' are not the ones that it had before",
                why=f"same key, other bytes: {', '.join(conflicts[:5])}",
                fix="give this data set its own name with --name",
            )
        lines = (json.dumps(_plain(entry)) + "\n" for entry in table._entries.values())
        place.write(table_key(name), "".join(lines).encode())
        return table

    def _add(self, entries: Iterable[ImageEntry]) -> list[str]:
        conflicts = []
        for entry in entries:
            known = self._entries.get(entry.key)
            if known is not None and known.id != entry.id and not known.error:
                conflicts.append(entry.key)
            else:
                self._entries[entry.key] = entry  # a repaired file takes the place of one that could not be decoded
        return conflicts

    def keys(self) -> list[str]:
        """All keys, in the order of first appearance."""
        return list(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def id_of(self, key: str) -> str:
        """The content id of the image.

        Raises:
            DataError: the data set has no such image, or it could not be decoded.
        """
        return self._usable(key).id

    def source_wh(self, key: str) -> tuple[int, int]:
        """Width and height of the image as stored, in pixels.

        Raises:
            DataError: the data set has no such image, or it could not be decoded.
        """
        entry = self._usable(key)
        return entry.width, entry.height

    def failed(self) -> dict[str, str]:
        """Keys of images that could not be decoded, and why."""
        return {entry.key: entry.error for entry in self._entries.values() if entry.error}

    def _usable(self, key: str) -> ImageEntry:
        if key not in self._entries:
            raise DataError(
                f"data set '{self.name}' has no image '{key}'",
                why=f"its table has {len(self._entries)} images, and this is none of them",
                fix="give the `vlmx extract` command of the data set again, so that its new images are added",
            )
        entry = self._entries[key]
        if entry.error:
            raise DataError(
                f"image '{key}' of data set '{self.name}' could not be decoded",
                why=entry.error,
                fix="replace the file and give the `vlmx extract` command again, or leave its examples out",
            )
        return entry


@contextmanager
def tables_guard(root: Place) -> Iterator[None]:
    """While the block runs, no other process changes the tables below the cache root."""
    claims = root.child(DATASETS).claims()
    try:
        with claims.guard():
            yield
    finally:
        claims.close()


def list_images(keys: Sequence[str]) -> str:
    """These images in one text, for an error: how many in each folder, the first few names, and a file with all names
    if there are more. Of a folder no more than its first two levels are told apart, and the fullest ones come first.

    The file lies where temporary files do, and is named after its content: one error that is seen again leaves no
    second file. Where it cannot be written, it is not mentioned.
    """
    counts = Counter("/".join(key.split("/")[:-1][:FOLDER_DEPTH]) for key in keys).most_common()
    folders = [f"{count:,} in {folder or 'no folder'}" for folder, count in counts[:FOLDERS_SHOWN]]
    if rest := counts[FOLDERS_SHOWN:]:
        folders.append(f"{sum(count for _, count in rest):,} in {len(rest):,} others")
    parts = [", ".join(folders)] if any(folder for folder, _ in counts) else []
    if len(keys) <= NAMES_SHOWN:
        return "; ".join([*parts, ", ".join(keys)])
    parts.append(f"the first are {', '.join(keys[:NAMES_SHOWN])}")
    if path := _written(keys):
        parts.append(f"all {len(keys):,} are in {path}")
    return "; ".join(parts)


def _written(keys: Sequence[str]) -> Path | None:
    """A file with a key a line."""
    data = "".join(f"{key}\n" for key in keys).encode(errors="replace")
    try:
        path = Path(tempfile.gettempdir(), f"vlmx-missing-images-{hashlib.sha256(data).hexdigest()[:8]}.txt")
        if not path.is_file() or path.read_bytes() != data:
            path.write_bytes(data)
    except OSError:
        return None
    return path


def table_key(name: str) -> str:
    """Where the table of data set `name` lies below the cache root."""
    return f"{DATASETS}/{name}.jsonl"


def table_name(text: str) -> str:
    """A data set's name from a file name: what is not allowed in names becomes '-'."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._").replace(".stamps", "-stamps")
    return name or "images"


def table_names(root: Place) -> list[str]:
    """The data sets that have tables below the cache root."""
    tables = [name.removesuffix(".jsonl") for name in root.names(DATASETS) if name.endswith(".jsonl")]
    return [name for name in tables if not name.endswith(".stamps")]


def _plain(entry: ImageEntry) -> dict[str, Any]:
    if entry.error:
        return {"key": entry.key, "id": entry.id, "error": entry.error}
    return {"key": entry.key, "id": entry.id, "width": entry.width, "height": entry.height}
