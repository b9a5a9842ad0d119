"""How does phase two get the tokens of any images of a cache, by their ids and in any order?

Shapes: out_BND [images, tokens, channels] in storage dtype (bfloat16 as the uint16 of its bits, 8 bits as int8 codes).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from numpy.typing import NDArray

from vlmx.cache_specs.catalog import find_parts
from vlmx.cache_specs.chunks import ChunkLayout, ChunkReader, ShardDamagedError, Verify
from vlmx.cache_specs.fused import FusedReader
from vlmx.cache_specs.layout import ARRAY
from vlmx.cache_specs.manifest import MANIFEST, Manifest, read_sealed
from vlmx.cache_specs.places import Place, place_of
from vlmx.cache_specs.sizing import image_bytes
from vlmx.cache_specs.spec import CacheSpec, TokenShape
from vlmx.cache_specs.token_source import TokenSource
from vlmx.errors import CacheCorruptError, CacheError, UsageError


def open_cache(
    path_or_name: str | Path | Place,
    root: str | Path | Place = "caches",
    *,
    allow_partial: bool = False,
    verify: Verify = "first-touch",
    pull: str | Path | None = None,
) -> TokenSource:
    """Open a cache for reading, or several as one.

    Args:
        path_or_name: a folder, a url, a name below `root`, or an unambiguous prefix of one, e.g. "vmamba-s-coco@512".
            Several of these with + between them give their tokens joined on the channel axis, in this order. The folder
            of a Zarr array or group that somebody else wrote is opened by `foreign.open_zarr`.
        root: folder (or url) of all caches.
        allow_partial: also open a cache whose extraction has not come to its end.
        verify: when an image's checksum is compared: the first time that this process reads it, every time, or never.
            The indices of the shards are always checked.
        pull: folder of this machine to which the shards of a remote cache are copied when they are used, see `pull`.

    Raises:
        UnknownNameError: there is no such cache; the message carries near misses.
        CacheError: the name is ambiguous, the extraction has not come to its end, or the caches cannot be joined.
        CacheCorruptError: the manifest is damaged.
    """
    if verify not in get_args(Verify):
        raise UsageError(f"verify is {verify!r}", fix=f"give one of {', '.join(get_args(Verify))}")
    if _is_zarr(path_or_name):
        from vlmx.cache_specs.foreign import open_zarr

        return open_zarr(path_or_name, verify=verify)
    places = [path_or_name] if isinstance(path_or_name, Place) else find_parts(root, path_or_name)
    if pull is not None:
        from vlmx.cache_specs.pull import pull_through

        places = [pull_through(place, pull) for place in places]
    readers = [TokenReader(place, allow_partial=allow_partial, verify=verify) for place in places]
    return readers[0] if len(readers) == 1 else FusedReader(readers)


def _is_zarr(path: str | Path | Place) -> bool:
    """Whether a path is that of a Zarr array or group, and no cache."""
    if not isinstance(path, Place) and not ("://" in str(path) or Path(path).expanduser().is_dir()):
        return False
    place = place_of(path)
    return any(map(place.exists, ("zarr.json", ".zarray", ".zgroup"))) and not place.exists(MANIFEST)


class TokenReader(TokenSource):
    """The tokens of one cache.

    Files are opened in the process that reads. What is committed after opening is not seen.

    Args:
        place: where the cache lies.
        allow_partial, verify: see `open_cache`.

    Attributes:
        place: where the cache lies.
        spec, shape, failed, sealed, quantization: see `TokenSource`.
        ids: image id -> row of the array, for every image that has tokens.
    """

    def __init__(
        self, place: str | Path | Place, *, allow_partial: bool = False, verify: Verify = "first-touch"
    ) -> None:
        self.place = place_of(place)
        manifest, self.sealed = read_sealed(self.place)
        header = manifest.header
        self.spec: CacheSpec = header.spec
        self.shape: TokenShape = header.shape
        self.quantization = header.quantization
        self.failed = manifest.failed
        if not (self.sealed or allow_partial):
            raise CacheError(
                f"the extraction of {self.place.name} has not come to its end",
                why=f"{sum(len(shard.ids) for shard in manifest.shards.values())} images are done, there is no seal",
                fix="give its `vlmx extract` command again, it goes on where it stopped",
            )
        self.ids: Mapping[str, int] = rows_of(manifest)
        self._origin = (self.place, allow_partial, verify)
        layout = ChunkLayout(
            array=f"{ARRAY}/",
            slots=header.images_per_shard,
            row_bytes=image_bytes(self.shape, self.spec.dtype),
            codec=self.spec.codec,
            shard_bytes={index: shard.bytes for index, shard in manifest.shards.items()},
        )
        self._chunks = ChunkReader(self.place, layout, verify)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, self._origin

    @property
    def parts(self) -> tuple[TokenReader, ...]:
        """This cache alone."""
        return (self,)

    def announce(self, ids: Iterable[str]) -> None:
        try:
            self._chunks.announce([row for image in ids if (row := self.ids.get(image)) is not None])
        except ShardDamagedError as error:
            raise self._corrupt(error) from error

    def _fill(self, place_of_image: Mapping[str, int], out_BND: NDArray[Any]) -> None:
        row_of = self.ids
        try:
            self._chunks.fill({row_of[image]: place for image, place in place_of_image.items()}, out_BND)
        except ShardDamagedError as error:
            raise self._corrupt(error) from error

    def _corrupt(self, error: ShardDamagedError) -> CacheCorruptError:
        image = next((image for image, row in self.ids.items() if row == error.row), None)
        return CacheCorruptError(
            f"shard {error.index} of cache {self.place.name} is damaged",
            why=error.why if image is None else f"{error.why} image {image}",
            fix=f"`vlmx cache repair {self.place}` makes the damaged shards again",
        )


def rows_of(manifest: Manifest) -> dict[str, int]:
    """Image id -> row of the array, for every image that has tokens."""
    rows: dict[str, int] = {}
    for index, shard in manifest.shards.items():
        first = index * manifest.header.images_per_shard
        rows.update((image, first + slot) for slot, image in enumerate(shard.ids) if image not in shard.failed)
    return rows


def _reopen(place: Place, allow_partial: bool, verify: Verify) -> TokenReader:
    return TokenReader(place, allow_partial=allow_partial, verify=verify)
