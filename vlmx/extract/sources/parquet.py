"""Which images lie in parquet files as bytes, and how is one row read again without reading its whole file?

A file of conversations only names its images; `named_images` says which.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

from vlmx.cache_specs.ids import table_name
from vlmx.errors import BackendError, DataError
from vlmx.extract.sources.source import (
    ImageRecord,
    ImageSource,
    describe,
    file_stamp,
    first,
    part_stamp,
)

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

NAMES = ("image", "img", "jpg", "jpeg", "png", "webp")  # of the column, when there are several that could be meant
BLOCK_BYTES = 8 << 20  # rows are decoded in blocks of about this size, as far as the file's statistics tell
BLOCK_ROWS = 64
KEPT_BYTES = 256 << 20  # decoded blocks of one source that are kept, for the rows beside the one that was asked for
KEPT_ROWS = 128  # are kept beside the latest block in any case: threads that read ahead are a little out of order
BUFFER_BYTES = 1 << 20
OPEN_FILES = 4


def open_parquet(paths: Sequence[str], what: str, name: str | None, column: str | None) -> ImageSource:
    """The images of parquet files, in the order of files and rows.

    A column holds the bytes themselves, or, as Hugging Face's `datasets` writes it, a struct of `bytes` and `path`.
    Keys are these paths if every row has one and no two are equal, else `<file>#<row>`.

    Args:
        paths: the files.
        what: how the user named them.
        name: of the image table; default: of the file, or of the folder when there are several.
        column: of the images; default: the one named image, img, jpg, jpeg, png or webp, or the only one of bytes.

    Raises:
        BackendError: pyarrow is not installed.
        DataError: a file is damaged or has no such column, it is not clear which column is meant, or there is no row.
    """
    files = [_File(path, column) for path in paths]
    given = [path for file in files for path in file.paths]
    if not given:
        raise DataError(f"no image in {what}", why=f"{len(paths)} parquet files, no row")
    if all(given) and len(set(given)) == len(given):
        named = "named by their paths"
        keys: list[str] = [path for path in given if path]
    else:
        counts = Counter(given)
        missing = counts.pop(None, 0) + counts.pop("", 0)
        twice = sum(count > 1 for count in counts.values())
        named = f"named by file and row ({missing:,} rows have no path, {twice:,} paths are not unique)"
        folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
        keys = [
            f"{PurePosixPath(os.path.relpath(file.path, folder))}#{row}" for file in files for row in range(file.rows)
        ]
    records: list[ImageRecord] = []
    rows = _Rows()
    for file in files:
        stamp = file_stamp(file.path)
        for row in range(file.rows):
            records.append(
                ImageRecord(
                    key=keys[len(records)],
                    load=partial(rows.read, file, row),
                    stamp=partial(part_stamp, stamp, f"{file.column}#{row}"),
                )
            )
    only = Path(paths[0]).resolve()
    columns = first(sorted({file.column for file in files}))
    return ImageSource(
        name=name or table_name(only.stem if len(paths) == 1 else only.parent.name),
        describe=describe(f"{len(paths)} parquet files ({what}), column '{columns}'", len(records), "") + f", {named}",
        images=tuple(records),
    )


def is_list_of_conversations(path: str) -> bool:
    """Whether the rows of a file are conversations that name their images by path, as `vlmx train` takes them.

    Raises:
        BackendError, DataError: see `open_parquet`.
    """
    with _opening(path) as open_file, open_file() as file:
        from pyarrow import types

        schema = file.schema_arrow
        if not {NAMES[0], "conversations"} <= set(schema.names):
            return False
        kind = schema.field(NAMES[0]).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind))


def named_images(path: str) -> list[str | None]:
    """The path of each row's image in such a file; None for a row without."""
    with _opening(path) as open_file, open_file() as file:
        names: list[str | None] = file.read(columns=[NAMES[0]]).column(NAMES[0]).to_pylist()
    return names


class _File:
    """What is known of one parquet file. Its rows are found by row group, and by block within the group."""

    def __init__(self, path: str, column: str | None) -> None:
        self.path = path
        with _opening(path) as open_file, open_file() as file:
            self.column, self._is_struct = _image_column(path, file.schema_arrow, column)
            self.leaf = f"{self.column}.bytes" if self._is_struct else self.column
            self.rows = file.metadata.num_rows
            self.paths = self._paths(file)
            self._starts = [0]
            self.block_rows: list[int] = []
            for index in range(file.metadata.num_row_groups):
                group = file.metadata.row_group(index)
                self._starts.append(self._starts[-1] + group.num_rows)
                self.block_rows.append(self._rows_a_block(group))

    def _paths(self, file: ParquetFile) -> list[str | None]:
        """The `path` of each row, as far as there is one; the images' bytes are not read."""
        if not self._is_struct or "path" not in _names(file.schema_arrow.field(self.column).type):
            return [None] * self.rows
        rows = file.read(columns=[f"{self.column}.path"]).column(self.column).to_pylist()
        return [row and row["path"] for row in rows]

    def _rows_a_block(self, group: Any) -> int:
        for index in range(group.num_columns):
            leaf = group.column(index)
            if leaf.path_in_schema == self.leaf:
                image_bytes = max(1, leaf.total_uncompressed_size // max(1, group.num_rows))
                return int(max(1, min(BLOCK_ROWS, BLOCK_BYTES // image_bytes)))
        return BLOCK_ROWS

    def find(self, row: int) -> tuple[int, int, int]:
        """Row group, block in it, place in the block."""
        group = bisect_right(self._starts, row) - 1
        return group, *divmod(row - self._starts[group], self.block_rows[group])

    def rows_in(self, group: int, block: int) -> int:
        """How many rows a block has."""
        rows = self._starts[group + 1] - self._starts[group]
        return min(self.block_rows[group], rows - block * self.block_rows[group])

    def bytes_of(self, batch: Any) -> list[bytes]:
        """The images of a decoded block; no bytes for a row without."""
        rows = batch.column(0).to_pylist()
        if self._is_struct:
            rows = [row and row["bytes"] for row in rows]
        return [row or b"" for row in rows]


class _Reading:
    """A file that is open, and how far a row group was decoded."""

    def __init__(self, file: ParquetFile) -> None:
        self.file = file
        self.group = -1
        self.block = 0
        self.batches: Iterator[Any] = iter(())


class _Rows:
    """Rows of the files of one source, for any number of threads: made for reading in order, or nearly so.

    A row group is decoded from its start in blocks, of which the latest ones are kept. A few files stay open.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._open: OrderedDict[str, _Reading] = OrderedDict()
        self._blocks: dict[tuple[str, int, int], list[bytes]] = {}  # changed only under the lock
        self._bytes = 0
        self._rows = 0

    def read(self, file: _File, row: int) -> bytes:
        """The bytes of the image in a row; none for a row without.

        Raises:
            DataError: the file is damaged, gone, or another one than before.
        """
        group, block, place = file.find(row)
        key = (file.path, group, block)
        rows = self._blocks.get(key)
        if rows is None:
            with self._lock, _opening(file.path) as open_file:
                rows = self._blocks.get(key) or self._decode(file, group, block, open_file)
        return rows[place]

    def _decode(self, file: _File, group: int, block: int, open_file: Callable[[], ParquetFile]) -> list[bytes]:
        """Decode up to a block of a row group: from where the last call ended, or from the group's start."""
        reading = self._open.pop(file.path, None) or _Reading(open_file())  # not back before all went well
        if reading.group != group or reading.block > block:
            reading.group, reading.block = group, 0
            reading.batches = reading.file.iter_batches(
                file.block_rows[group], row_groups=[group], columns=[file.leaf], use_threads=False
            )
        rows: list[bytes] = []
        while reading.block <= block:
            batch = next(reading.batches, None)
            if batch is None or batch.num_rows != file.rows_in(group, reading.block):
                raise OSError("its rows are not the ones that its footer promises")
            rows = file.bytes_of(batch)
            self._keep((file.path, group, reading.block), rows)
            reading.block += 1
        self._open[file.path] = reading
        while len(self._open) > OPEN_FILES:
            self._open.popitem(last=False)[1].file.close()
        return rows

    def _keep(self, key: tuple[str, int, int], rows: list[bytes]) -> None:
        self._count(self._blocks.pop(key, []), -1)
        self._blocks[key] = rows
        self._count(rows, 1)
        while self._bytes > KEPT_BYTES:
            oldest = next(iter(self._blocks))
            if self._rows - len(rows) - len(self._blocks[oldest]) < KEPT_ROWS:
                break
            self._count(self._blocks.pop(oldest), -1)

    def _count(self, rows: list[bytes], sign: int) -> None:
        self._bytes += sign * sum(map(len, rows))
        self._rows += sign * len(rows)


@contextmanager
def _opening(path: str) -> Iterator[Callable[[], ParquetFile]]:
    """How to open a file; errors of the library in the block become ours."""
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise BackendError(
            f"{path} cannot be read",
            why="pyarrow, the library for parquet files, is not installed",
            fix="pip install 'vlmx[parquet]'",
        ) from error
    try:
        yield partial(ParquetFile, path, buffer_size=BUFFER_BYTES, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"cannot read the parquet file {path}",
            why=(str(error) or repr(error)).splitlines()[0],
            fix="it is damaged, or no parquet file: fetch it again",
        ) from error


def _image_column(path: str, schema: Any, wanted: str | None) -> tuple[str, bool]:
    """The column of the images, and whether it is a struct of bytes and path."""
    fits = {field.name: kind for field in schema if (kind := _kind(field.type)) is not None}
    if wanted is not None:
        found = [name for name in fits if name == wanted]
    else:
        found = [name for name in fits if name == NAMES[0]] or [name for name in fits if name in NAMES] or list(fits)
    if len(found) == 1:
        return found[0], fits[found[0]] == "struct"
    every = ", ".join(f"{field.name} ({field.type})" for field in schema)
    if wanted is not None:
        what = f"{path} has no column of images '{wanted}'"
    else:
        what = f"{path} has {'no column of images' if not fits else f'{len(fits)} columns that may hold images'}"
    raise DataError(
        what,
        why=f"its columns: {every}",
        fix=f"choose with --image-column: {', '.join(fits)}"
        if fits
        else "images must be bytes, or structs of bytes and path as Hugging Face's datasets writes them;"
        " beside a column 'conversations' they may be paths in a column 'image'",
    )


def _kind(column: Any) -> Literal["bytes", "struct"] | None:
    """Whether a column of this type can hold images: "bytes", "struct", or None."""
    from pyarrow import types

    def is_bytes(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    if is_bytes(column):
        return "bytes"
    if types.is_struct(column) and "bytes" in _names(column) and is_bytes(column.field("bytes").type):
        return "struct"
    return None


def _names(struct: Any) -> list[str]:
    return [struct.field(index).name for index in range(struct.num_fields)]
