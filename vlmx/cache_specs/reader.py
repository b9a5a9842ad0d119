"""How does phase two get the tokens of any images, in any order, verified, at close to the speed of a memory copy?

Each image is one chunk of a shard file: its offset comes from the shard's index (read once, checked), its bytes from
one positioned read into the caller's array, and its CRC-32C is compared the first time that this process reads it.

Shapes: out_BND [images, tokens, channels] in storage dtype (bfloat16 as the uint16 of its bits).
"""

from __future__ import annotations

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from vlmx.cache_specs.catalog import find_parts
from vlmx.cache_specs.fused import FusedReader
from vlmx.cache_specs.layout import shard_path
from vlmx.cache_specs.manifest import is_sealed, read_manifest
from vlmx.cache_specs.shards import crc_matches, read_index
from vlmx.cache_specs.sizing import CRC_BYTES
from vlmx.cache_specs.spec import CacheSpec, TokenShape
from vlmx.cache_specs.token_source import TokenSource
from vlmx.errors import CacheCorruptError, CacheError

OPEN_FILES_MAX = 512


def open_cache(path_or_name: str | Path, root: str | Path = "caches", *, allow_partial: bool = False) -> TokenSource:
    """Open a cache for reading, or several as one.

    Args:
        path_or_name: a folder, a name below `root`, or an unambiguous prefix of one, e.g. "vmamba-s-coco@512". Several
            of these with + between them give their tokens joined on the channel axis, in this order.
        root: folder of all caches.
        allow_partial: also open a cache whose extraction has not come to its end.

    Raises:
        UnknownNameError: there is no such cache; the message carries near misses.
        CacheError: the name is ambiguous, the extraction has not come to its end, or the caches cannot be joined.
        CacheCorruptError: the manifest is damaged.
    """
    readers = [TokenReader(path, allow_partial=allow_partial) for path in find_parts(Path(root), path_or_name)]
    return readers[0] if len(readers) == 1 else FusedReader(readers)


class TokenReader(TokenSource):
    """The tokens of one cache.

    Files are opened in the process that reads. What is committed after opening is not seen.

    Attributes:
        path: the cache's folder.
        spec, shape, failed, sealed: see `TokenSource`.
        ids: image id -> row of the array, for every image that has tokens.
    """

    def __init__(self, path: Path, *, allow_partial: bool = False) -> None:
        manifest = read_manifest(path)
        self.path = path
        self.spec: CacheSpec = manifest.header.spec
        self.shape: TokenShape = manifest.header.shape
        self.images_per_shard = manifest.header.images_per_shard
        self.failed = manifest.failed
        self.sealed = is_sealed(path, manifest)
        self._allow_partial = allow_partial
        if not (self.sealed or allow_partial):
            raise CacheError(
                f"the extraction of {path.name} has not come to its end",
                why=f"{sum(len(shard.ids) for shard in manifest.shards.values())} images are done, there is no seal",
                fix="give its `vlmx extract` command again, it goes on where it stopped",
            )
        ids: dict[str, int] = {}
        for index, shard in manifest.shards.items():
            first = index * self.images_per_shard
            ids.update((image, first + slot) for slot, image in enumerate(shard.ids) if image not in shard.failed)
        self.ids: Mapping[str, int] = ids
        self._shard_bytes = {index: shard.bytes for index, shard in manifest.shards.items()}
        self._local = _Local()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self._allow_partial)

    @property
    def parts(self) -> tuple[TokenReader, ...]:
        """This cache alone."""
        return (self,)

    def read(self, ids: Sequence[str], out: NDArray[Any] | None = None) -> NDArray[Any]:
        out_BND = self._room(ids, out)
        if not all(image in self.ids for image in ids):
            self.require(ids)
        local = self._here()
        for position, image in enumerate(ids):
            self._read_row(local, image, self.ids[image], out_BND[position])
        return out_BND

    def _read_row(self, local: _Local, image: str, row: int, out_ND: NDArray[Any]) -> None:
        index, slot = divmod(row, self.images_per_shard)
        shard = local.shards.get(index) or self._open_shard(local, index)
        offset = shard.offsets[slot]
        if offset is None:
            raise self._corrupt(index, f"it holds nothing for image {image}")
        file = local.file(index, shard.path)
        if shard.verified[slot]:
            if os.preadv(file.descriptor, (out_ND.data,), offset) != out_ND.nbytes:
                raise self._corrupt(index, f"it ends within the tokens of image {image}")
            return
        crc = bytearray(CRC_BYTES)
        if os.preadv(file.descriptor, (out_ND.data, crc), offset) != out_ND.nbytes + CRC_BYTES:
            raise self._corrupt(index, f"it ends within the tokens of image {image}")
        if not crc_matches(out_ND, crc):
            raise self._corrupt(index, f"the tokens of image {image} do not match their checksum")
        shard.verified[slot] = 1

    def _open_shard(self, local: _Local, index: int) -> _Shard:
        path = shard_path(self.path, index)
        chunk_bytes = self.num_tokens * self.shape.dim * self.storage_dtype.itemsize + CRC_BYTES
        try:
            file = local.file(index, path)
            size = os.fstat(file.descriptor).st_size
            if size != self._shard_bytes[index]:
                raise self._corrupt(index, f"it is {size} bytes, {self._shard_bytes[index]} were written")
            offsets = read_index(file.descriptor, self.images_per_shard, chunk_bytes)
        except FileNotFoundError as error:
            raise self._corrupt(index, f"{path} does not exist") from error
        except ValueError as error:
            raise self._corrupt(index, str(error)) from error
        shard = _Shard(path=path, offsets=offsets, verified=bytearray(self.images_per_shard))
        return local.shards.setdefault(index, shard)

    def _corrupt(self, index: int, why: str) -> CacheCorruptError:
        return CacheCorruptError(
            f"shard {index} of cache {self.path.name} is damaged",
            why=why,
            fix=f"`vlmx cache verify {self.path} --full --repair` forgets the damaged shards, then the "
            "`vlmx extract` command makes them again",
        )

    def _here(self) -> _Local:
        """The open files of this process; after a fork the parent's are left alone."""
        if self._local.pid != os.getpid():
            self._local = _Local()
        return self._local


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """Where each slot's chunk starts in the file, and which ones were compared with their checksum."""

    path: Path
    offsets: list[int | None]
    verified: bytearray


class _File:
    """An open shard file; closed when the last thread that uses it lets go."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class _Local:
    """What one process has open: all indices, and the files used last."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.shards: dict[int, _Shard] = {}
        self._files: OrderedDict[int, _File] = OrderedDict()
        self._lock = threading.Lock()
        self._limit = min(OPEN_FILES_MAX, max(8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))

    def file(self, index: int, path: Path) -> _File:
        with self._lock:
            file = self._files.get(index)
            if file is None:
                file = self._files[index] = _File(path)
                if len(self._files) > self._limit:
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end(index)
            return file


def _reopen(path: Path, allow_partial: bool) -> TokenReader:
    return TokenReader(path, allow_partial=allow_partial)
