"""How does a data set get its image table without an extraction, and where is the file of each of its images?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from vlmx.cache_specs.geometry import Geometry
from vlmx.cache_specs.ids import ImageEntry, ImageTable, image_id, table_key, tables_guard
from vlmx.cache_specs.places import Place
from vlmx.console import progress
from vlmx.errors import DataError
from vlmx.extract.ahead import work_ahead
from vlmx.extract.inventory import read_bytes
from vlmx.extract.preprocess import UndecodableImage, decode, place, source_size
from vlmx.extract.sources.source import ImageRecord, ImageSource


@dataclass(frozen=True, kw_only=True)
class Original:
    """The file of an image.

    Attributes:
        dataset: name of the image table that has it.
        key: its name there.
        load: reads its bytes.
    """

    dataset: str
    key: str
    load: Callable[[], bytes]

    def read(self, image: str) -> bytes:
        """Its bytes, which are those of `image`.

        Raises:
            DataError: it cannot be read, or holds another image by now.
        """
        data = read_bytes(self.key, self.load)
        if image_id(data) != image:
            raise DataError(
                f"'{self.key}' is not the image that data set '{self.dataset}' had before",
                why="its bytes are others than when its image table was made",
                fix="bring the old file back, or give this data set another name",
            )
        return data


@dataclass(frozen=True, kw_only=True)
class SourceFiles:
    """The images of one data set.

    Attributes:
        originals: image id -> file, of those that can be decoded, in the order of the source.
        failed: image id -> why it cannot be decoded.
    """

    originals: dict[str, Original]
    failed: dict[str, str]


def complete_table(source: ImageSource, root: Place, geometry: Geometry, *, threads: int) -> SourceFiles:
    """See to it that the image table of a source has all of its images, and say where each of them is.

    Images that the table lacks are decoded and letterboxed, as an extraction would, so that whether they can be is
    known before they are needed; so are those that could not be when they were last looked at. Of several processes
    that start together, one does this.

    Args:
        source: the images.
        root: folder of all caches.
        geometry: how the encoder will see them.
        threads: that read and decode.

    Raises:
        DataError: a file cannot be read, or a key stands for another image than before.
    """
    records = {record.key: record for record in source.records()}
    failed: dict[str, str] = {}
    table = _table(root, source.name)
    if _unknown(records.values(), table):
        with tables_guard(root):
            table = _table(root, source.name)
            looked = _look_at(source.name, _unknown(records.values(), table), geometry, threads)
            failed = {entry.id: entry.error for entry in looked if entry.error}
            if table is None or any(entry.key not in table or not entry.error for entry in looked):
                table = ImageTable.merge(root, source.name, looked, guarded=True)
    assert table is not None
    broken = table.failed()
    originals: dict[str, Original] = {}
    for key, record in records.items():
        if key not in broken:
            originals.setdefault(table.id_of(key), Original(dataset=source.name, key=key, load=record.load))
    return SourceFiles(originals=originals, failed=failed)


def _table(root: Place, name: str) -> ImageTable | None:
    return ImageTable.open(root, name) if root.exists(table_key(name)) else None


def _unknown(records: Iterable[ImageRecord], table: ImageTable | None) -> list[ImageRecord]:
    """The images that the table does not have, or has as undecodable."""
    if table is None:
        return list(records)
    broken = table.failed()
    return [record for record in records if record.key not in table or record.key in broken]


def _look_at(name: str, records: Sequence[ImageRecord], geometry: Geometry, threads: int) -> list[ImageEntry]:
    entries = []
    with ThreadPoolExecutor(threads) as pool, progress(f"look at {name}", len(records), "images") as bar:
        for entry in work_ahead(pool, partial(_look, geometry=geometry), records, ahead=4 * threads):
            entries.append(entry)
            bar.advance()
    return entries


def _look(record: ImageRecord, *, geometry: Geometry) -> ImageEntry:
    data = read_bytes(record.key, record.load)
    image, size = image_id(data), source_size(data)
    try:
        place(decode(data), geometry)
    except UndecodableImage as error:
        return ImageEntry(key=record.key, id=image, error=error.reason)
    assert size is not None, record.key
    return ImageEntry(key=record.key, id=image, width=size[0], height=size[1])
