"""How are tokens read that somebody else wrote: a Zarr array [image, token, channel] of any layout?

An array whose bytes lie as those of our caches is read in the same way, whoever wrote it. Any other (other chunks,
other codecs, Zarr v2) goes through tensorstore if that is installed, and else through zarr-python, image by image:
its selection of several at once (`oindex`) is many times slower.

Shapes: out_BND [images, tokens, channels] in storage dtype.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from vlmx.cache_specs.chunks import ChunkLayout, ChunkReader, ShardDamagedError, Verify
from vlmx.cache_specs.layout import GROUP
from vlmx.cache_specs.manifest import MANIFEST, read_manifest
from vlmx.cache_specs.places import LocalPlace, Place, place_of
from vlmx.cache_specs.reader import rows_of
from vlmx.cache_specs.spec import STORAGE_DTYPES, CacheSpec, Codec, DType, TokenShape
from vlmx.cache_specs.token_source import TokenSource
from vlmx.errors import CacheCorruptError, CacheError, SpecMismatchError

if TYPE_CHECKING:
    from vlmx.cache_specs.reader import TokenReader

Library = Literal["vlmx", "tensorstore", "zarr-python"]

_LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
_DTYPES: dict[str, DType] = {
    "float16": "float16",
    "float32": "float32",
    "bfloat16": "bfloat16",
    "int8": "int8",
    "<f2": "float16",
    "<f4": "float32",
    "|i1": "int8",
}


def open_zarr(
    where: str | Path | Place,
    array: str = "tokens",
    *,
    ids: Sequence[str] | Path | None = None,
    spec: CacheSpec | None = None,
    grid: tuple[int, int] | None = None,
    verify: Verify = "first-touch",
) -> ForeignReader:
    """Open a Zarr array of visual tokens that vlmx did not write.

    Args:
        where: the Zarr group that the array is in, the array itself, or a cache's folder whose array was written anew.
        array: its name in the group; [image, token, channel].
        ids: the image id of each row, or a text file with one on each line. By default those of the manifest, where
            `where` is a cache's folder, else the rows' numbers: "0", "1", ...
        spec: what the tokens are; needed for training on them. By default that of the manifest.
        grid: rows and columns of an image's tokens. By default that of the manifest, else one row.
        verify: when checksums are compared, if the layout is ours; the libraries compare every time.

    Raises:
        CacheError: there is no such array, it is not one of tokens, or `ids` and `spec` do not fit it.
    """
    place = place_of(where)
    group = place.child(GROUP) if place.exists(MANIFEST) else place
    metadata, folder = _metadata(group, array)
    return ForeignReader(place, folder, metadata, ids=ids, spec=spec, grid=grid, verify=verify)


class ForeignReader(TokenSource):
    """The tokens of an array that vlmx did not write; made by `open_zarr`.

    What the array does not hold cannot be told from zeros where a library reads it.

    Attributes:
        library: what reads the array.
        spec: raises a CacheError where nobody said what the tokens are.
        others: see `TokenSource`.
    """

    sealed = True

    def __init__(
        self,
        place: Place,
        array: Place,
        metadata: Mapping[str, Any],
        *,
        ids: Sequence[str] | Path | None,
        spec: CacheSpec | None,
        grid: tuple[int, int] | None,
        verify: Verify,
    ) -> None:
        self._place = place
        self._array = array
        self._origin = (place, array, metadata, ids, spec, grid, verify)
        rows, tokens, dim = _shape(array, metadata)
        self._dtype = _dtype(array, metadata)
        manifest = read_manifest(place) if place.exists(MANIFEST) else None
        if manifest is not None:
            spec = spec or manifest.header.spec
            grid = grid or manifest.header.shape.grid
            self.quantization = manifest.header.quantization
        if spec is not None:
            self.spec = spec
            _require_dtype(array, spec.dtype, self._dtype)
        self.failed = {} if manifest is None else manifest.failed
        self.shape = TokenShape(grid=grid or (1, tokens), dim=dim)
        if self.shape.num_tokens != tokens:
            raise CacheError(f"{array} has {tokens} tokens an image, a grid of {grid} has {self.shape.num_tokens}")
        self.ids = rows_of(manifest) if ids is None and manifest is not None else _numbered(array, ids, rows)
        self._rows = _open(array, metadata, self._dtype, verify)
        self.library: Library = self._rows.library

    def __getattr__(self, name: str) -> Any:
        if name == "spec":
            raise CacheError(
                f"nobody says which encoder made the tokens of {self._array}",
                fix="give open_zarr(..., spec=CacheSpec(...))",
            )
        raise AttributeError(name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, self._origin

    @property
    def parts(self) -> tuple[TokenReader, ...]:
        """There is no cache."""
        return ()

    @property
    def name(self) -> str:
        """The last part of its url."""
        return self._place.name

    @property
    def root(self) -> Place:
        """The folder that it lies in."""
        return self._place.parent

    @property
    def logical_dtype(self) -> DType:
        return self._dtype

    @property
    def storage_dtype(self) -> np.dtype[Any]:
        return np.dtype(STORAGE_DTYPES[self._dtype])

    def require(self, ids: Iterable[str], *, data: str = "") -> None:
        wanted = list(dict.fromkeys(ids))
        missing = self.missing(wanted)
        if missing:
            of_data = f" of '{data}'" if data else ""
            raise CacheError(
                f"{len(missing)} of {len(wanted)} images{of_data} are not in {self._array}",
                why=f"the first are {', '.join(missing[:3])}",
                fix="say with open_zarr(..., ids=...) which image each row is",
            )

    def announce(self, ids: Iterable[str]) -> None:
        self._rows.announce([row for image in ids if (row := self.ids.get(image)) is not None])

    def _fill(self, place_of_image: Mapping[str, int], out_BND: NDArray[Any]) -> None:
        self._rows.fill({self.ids[image]: place for image, place in place_of_image.items()}, out_BND)


class _Rows(ABC):
    """How rows of the array are read."""

    library: Library

    @abstractmethod
    def fill(self, rows: Mapping[int, int], out_BND: NDArray[Any]) -> None:
        """Read rows, each into its place in `out_BND`."""

    @abstractmethod
    def announce(self, rows: Sequence[int]) -> None:
        """Say that rows will be read soon."""


class _Ours(_Rows):
    """The bytes lie as in our caches."""

    library = "vlmx"

    def __init__(self, array: Place, layout: ChunkLayout, verify: Verify) -> None:
        self._array = array
        self._chunks = ChunkReader(array, layout, verify)

    def fill(self, rows: Mapping[int, int], out_BND: NDArray[Any]) -> None:
        try:
            self._chunks.fill(rows, out_BND)
        except ShardDamagedError as error:
            raise self._corrupt(error) from error

    def announce(self, rows: Sequence[int]) -> None:
        try:
            self._chunks.announce(rows)
        except ShardDamagedError as error:
            raise self._corrupt(error) from error

    def _corrupt(self, error: ShardDamagedError) -> CacheCorruptError:
        row = "" if error.row is None else f" row {error.row}"
        return _damaged(self._array, f"shard {error.index}: {error.why}{row}")


class _ByLibrary(_Rows):
    """A library reads the array, opened in the process that reads."""

    def __init__(self, array: Place) -> None:
        self._array = array
        self._opened: tuple[int, Any] | None = None

    def fill(self, rows: Mapping[int, int], out_BND: NDArray[Any]) -> None:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), self._open()
        try:
            self._fill(self._opened[1], rows, out_BND)
        except (ValueError, RuntimeError, OSError, KeyError) as error:  # the libraries have none of their own
            raise _damaged(self._array, str(error)) from error

    def announce(self, rows: Sequence[int]) -> None:
        """The libraries cannot be told."""

    @abstractmethod
    def _open(self) -> Any: ...

    @abstractmethod
    def _fill(self, opened: Any, rows: Mapping[int, int], out_BND: NDArray[Any]) -> None: ...


class _ByTensorstore(_ByLibrary):
    library = "tensorstore"

    def __init__(self, array: LocalPlace, zarr_format: int) -> None:
        super().__init__(array)
        self._spec = {
            "driver": "zarr3" if zarr_format == 3 else "zarr",
            "kvstore": {"driver": "file", "path": str(array.path.absolute())},
        }

    def _open(self) -> Any:
        import tensorstore

        return tensorstore.open(self._spec, read=True).result()

    def _fill(self, opened: Any, rows: Mapping[int, int], out_BND: NDArray[Any]) -> None:
        read_BND = opened[list(rows)].read().result()
        out_BND[list(rows.values())] = read_BND.view(out_BND.dtype)  # bfloat16 as its bits


class _ByZarr(_ByLibrary):
    library = "zarr-python"

    def _open(self) -> Any:
        import zarr

        assert isinstance(self._array, LocalPlace)
        return zarr.open_array(self._array.path, mode="r")

    def _fill(self, opened: Any, rows: Mapping[int, int], out_BND: NDArray[Any]) -> None:
        for row, place in rows.items():
            out_BND[place] = opened[row]


def _open(array: Place, metadata: Mapping[str, Any], dtype: DType, verify: Verify) -> _Rows:
    codec = _codec_if_ours(metadata)
    if codec is not None:
        rows_a_shard, *image = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        row_bytes = prod(image) * np.dtype(STORAGE_DTYPES[dtype]).itemsize
        layout = ChunkLayout(array="", slots=rows_a_shard, row_bytes=row_bytes, codec=codec, shard_bytes=None)
        return _Ours(array, layout, verify)
    if not isinstance(array, LocalPlace):
        raise CacheError(
            f"{array} has another layout than vlmx writes", why="such arrays are read from disks only", fix="copy it"
        )
    if find_spec("tensorstore") is not None:
        return _ByTensorstore(array, metadata["zarr_format"])
    if metadata["zarr_format"] == 3 and metadata["data_type"] == "bfloat16":
        raise CacheError(
            f"{array} holds bfloat16, which zarr-python cannot read", fix="pip install tensorstore, which can"
        )
    return _ByZarr(array)


def _codec_if_ours(metadata: Mapping[str, Any]) -> Codec | None:
    """What each row went through, if it is one chunk of a shard as in our caches; else None."""
    if metadata["zarr_format"] != 3 or [codec["name"] for codec in metadata["codecs"]] != ["sharding_indexed"]:
        return None
    sharding = metadata["codecs"][0]["configuration"]
    whole = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    encoding = metadata["chunk_key_encoding"]
    if (
        metadata["chunk_grid"]["name"] != "regular"
        or whole[1:] != metadata["shape"][1:]
        or sharding["chunk_shape"] != [1, *whole[1:]]
        or sharding.get("index_location", "end") != "end"
        or sharding["index_codecs"] != [_LITTLE, {"name": "crc32c"}]
        or encoding["name"] != "default"
        or encoding.get("configuration", {}).get("separator", "/") != "/"
        or sharding["codecs"][0] not in (_LITTLE, {"name": "bytes"})
    ):
        return None
    behind = [codec["name"] for codec in sharding["codecs"][1:]]
    return "crc32c" if behind == ["crc32c"] else "blosc" if behind == ["blosc", "crc32c"] else None


def _metadata(group: Place, array: str) -> tuple[dict[str, Any], Place]:
    """zarr.json (or .zarray of Zarr v2) of an array, and the array's folder."""
    for folder in (group.child(array), group):
        for name in ("zarr.json", ".zarray"):
            try:
                metadata = json.loads(folder.read(name))
            except FileNotFoundError:
                continue
            except ValueError as error:
                raise _damaged(folder, f"{name}: {error}") from error
            if metadata.get("node_type", "array") == "array":
                return metadata, folder
    raise CacheError(f"{group} has no Zarr array '{array}'", fix="give the name of the array of tokens")


def _shape(array: Place, metadata: Mapping[str, Any]) -> tuple[int, int, int]:
    shape = metadata["shape"]
    if len(shape) != 3:
        raise CacheError(f"{array} is not [image, token, channel]", why=f"its shape is {shape}")
    return shape[0], shape[1], shape[2]


def _dtype(array: Place, metadata: Mapping[str, Any]) -> DType:
    stored = metadata["data_type"] if metadata["zarr_format"] == 3 else metadata["dtype"]
    if stored == "uint16" and metadata.get("attributes", {}).get("vlmx:logical_dtype") == "bfloat16":
        return "bfloat16"
    if str(stored) not in _DTYPES:
        raise CacheError(
            f"{array} holds {stored}, which are no tokens",
            why=f"known: {', '.join(sorted(set(_DTYPES.values())))}, and uint16 with vlmx:logical_dtype=bfloat16",
        )
    return _DTYPES[stored]


def _require_dtype(array: Place, expected: DType, dtype: DType) -> None:
    if expected != dtype:
        raise SpecMismatchError(f"{array} holds {dtype}", why=f"its spec says {expected}")


def _numbered(array: Place, ids: Sequence[str] | Path | None, rows: int) -> dict[str, int]:
    if isinstance(ids, Path):
        ids = ids.read_text(encoding="utf-8").split()
    names = [str(row) for row in range(rows)] if ids is None else list(ids)
    numbered = {name: row for row, name in enumerate(names)}
    if len(names) != rows or len(numbered) != rows:
        raise CacheError(
            f"the ids do not fit {array}", why=f"{len(numbered)} different ids in {len(names)} for {rows} rows"
        )
    return numbered


def _damaged(array: Place, why: str) -> CacheCorruptError:
    return CacheCorruptError(f"{array} is damaged", why=why, fix="copy it again from where it came")


def _reopen(
    place: Place,
    array: Place,
    metadata: Mapping[str, Any],
    ids: Sequence[str] | Path | None,
    spec: CacheSpec | None,
    grid: tuple[int, int] | None,
    verify: Verify,
) -> ForeignReader:
    return ForeignReader(place, array, metadata, ids=ids, spec=spec, grid=grid, verify=verify)
