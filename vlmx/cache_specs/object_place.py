"""How is a prefix of an object store, or a folder of a web server, a place for caches?

Keys lie below the url's path. An object is replaced as a whole or not at all: an upload that was killed leaves no
object, and readers see the old one until the new one is complete. Web servers are read, nothing more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from vlmx.cache_specs.claims import WRITERS
from vlmx.cache_specs.ids import DATASETS
from vlmx.cache_specs.manifest import COMMITS, SEAL
from vlmx.cache_specs.object_store import Bucket, bucket_of
from vlmx.cache_specs.places import Place
from vlmx.errors import CacheError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from vlmx.cache_specs.leases import LeaseClaims
    from vlmx.cache_specs.token_files import TokenFiles

UPLOAD_PART_BYTES = 16 << 20
UPLOADS_AT_ONCE = 4  # parts on their way; what an upload holds in memory is this many parts


Tag = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Version:
    """One state of an object.

    Attributes:
        tag: what the store calls this state, for conditional writes.
        modified: when it was written, by the store's clock.
    """

    tag: Tag
    modified: datetime


class ObjectPlace(Place):
    """A prefix of a bucket (s3, gs, az), or a folder of a web server (http, https), which can only be read.

    Making one asks the store for nothing.

    Args:
        url: e.g. "s3://bucket/path"; credentials and endpoint come from the usual environment variables.
        pull: folder for copies of shards, on this machine: those that are read are copied there, see `pull`.

    Raises:
        CacheError: the url names no bucket.
        BackendError: obstore is not installed, or cannot use this url.
    """

    is_local = False

    def __init__(self, url: str, *, pull: str | Path | None = None) -> None:
        scheme, _, rest = url.partition("://")
        parts = [part for part in rest.split("/") if part]
        if not parts:
            raise CacheError(f"'{url}' names no bucket", fix="write it as s3://bucket/path")
        self.scheme = scheme.lower()
        self.url = f"{self.scheme}://{'/'.join(parts)}"
        self._bucket_name, self._path = parts[0], tuple(parts[1:])
        self.pull = None if pull is None else Path(pull)
        self.bucket: Bucket = bucket_of(self.scheme, self._bucket_name)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(ObjectPlace, pull=self.pull), (self.url,)

    @property
    def parent(self) -> ObjectPlace:
        """The prefix above; a bucket's own is itself."""
        return ObjectPlace(self.url.rsplit("/", 1)[0]) if self._path else self

    def child(self, name: str) -> ObjectPlace:
        return ObjectPlace(f"{self.url}/{name}")

    def object_path(self, key: str) -> str:
        """The name in the bucket of the object `key`."""
        return "/".join((*self._path, *filter(None, key.split("/"))))

    def read(self, key: str) -> bytes:
        return bytes(self.bucket.ask(lambda store: store.get(self.object_path(key)).bytes()))

    def write(self, key: str, data: bytes) -> None:
        self._require_writable()
        self.bucket.ask(lambda store: store.put(self.object_path(key), data, use_multipart=False), writing=True)

    def write_stream(self, key: str, parts: Iterable[Buffer]) -> int:
        self._require_writable()
        written = 0

        def counted() -> Iterator[memoryview]:
            nonlocal written
            for part in parts:
                view = memoryview(part).cast("B")
                written += view.nbytes
                yield view

        self.bucket.ask(
            lambda store: store.put(
                self.object_path(key), counted(), chunk_size=UPLOAD_PART_BYTES, max_concurrency=UPLOADS_AT_ONCE
            ),
            writing=True,
        )
        return written

    def size(self, key: str) -> int | None:
        try:
            return int(self.bucket.ask(lambda store: store.head(self.object_path(key)))["size"])
        except FileNotFoundError:
            return None

    def names(self, key: str = "") -> list[str]:
        if self.scheme in ("http", "https"):
            return self._web_names(key)
        import obstore

        path = self.object_path(key)
        found = self.bucket.ask(lambda store: obstore.list_with_delimiter(store, path or None))
        paths = {*found["common_prefixes"], *(one["path"] for one in found["objects"])} - {path}
        return sorted(one.rsplit("/", 1)[-1] for one in paths)

    def remove(self, key: str) -> None:
        self._require_writable()
        try:
            self.bucket.ask(lambda store: store.delete(self.object_path(key)))
        except FileNotFoundError:
            return

    def remove_tree(self, key: str) -> None:
        import obstore

        self._require_writable()
        path = self.object_path(key)
        assert path, "this would empty the bucket"
        chunks = self.bucket.ask(lambda store: obstore.list(store, path).collect())
        objects = [one["path"] for one in chunks]
        if objects:
            self.bucket.ask(lambda store: store.delete(objects))

    def free_bytes(self) -> None:
        return None

    def claims(self) -> LeaseClaims:
        from vlmx.cache_specs.leases import LeaseClaims

        return LeaseClaims(self)

    def token_files(self) -> TokenFiles:
        from vlmx.cache_specs.object_files import ObjectTokenFiles
        from vlmx.cache_specs.pull import PulledTokenFiles

        files = ObjectTokenFiles(self)
        return files if self.pull is None else PulledTokenFiles(self, files, self.pull)

    def version(self, key: str) -> Version | None:
        """The present state of an object; None where there is none."""
        try:
            meta = self.bucket.ask(lambda store: store.head(self.object_path(key)))
        except FileNotFoundError:
            return None
        return Version(tag=_tag(meta), modified=meta["last_modified"])

    def write_if(self, key: str, data: bytes, seen: Tag | None) -> Tag | None:
        """Write a small object if it is still in the state `seen`; if `seen` is None, if there is none.

        Returns:
            The new state, or None when somebody else was faster.

        Raises:
            CacheError: the store does not know conditional writes.
        """
        from obstore.exceptions import AlreadyExistsError, NotSupportedError, PreconditionError

        self._require_writable()
        mode: Any = "create" if seen is None else dict(seen)

        def put(store: Any) -> Any:
            try:
                return store.put(self.object_path(key), data, mode=mode, use_multipart=False)
            except (NotSupportedError, NotImplementedError) as error:
                raise no_conditions(self) from error

        try:
            written = _tag(self.bucket.ask(put, writing=seen is None))
        except (AlreadyExistsError, PreconditionError, FileNotFoundError):
            # the answer to a request that was sent twice is that of the second: look whether the first succeeded
            return self._tag_of(key, data)
        if not written:
            raise no_conditions(self)
        return written

    def _tag_of(self, key: str, data: bytes) -> Tag | None:
        """The state of an object if it holds `data`."""
        version = self.version(key)
        try:
            return version.tag if version and self.read(key) == data else None
        except FileNotFoundError:
            return None

    def _web_names(self, key: str) -> list[str]:
        """What can be known without a listing.

        A sealed cache has no commits beside its manifest, and nobody writes it. Image tables are found by their names.
        """
        if key in (COMMITS, WRITERS):
            if self.exists(SEAL):
                return []
            why = f"over plain HTTP only a sealed cache can be read, and there is no {SEAL}"
        elif key == DATASETS:
            return []
        else:
            why = "over plain HTTP only a sealed cache can be read, by its whole url"
        raise CacheError(
            f"{self.url} cannot be listed",
            why=why,
            fix="give the url of a sealed cache, or use the store's own protocol (s3://, gs://, az://)",
        )

    def _require_writable(self) -> None:
        if self.scheme in ("http", "https"):
            _refuse_writing(self)


def no_conditions(place: Place) -> CacheError:
    """What to say of a store in which two writers could not be told apart."""
    return CacheError(
        f"no cache can be written to {place}",
        why="this object store does not know conditional writes (If-None-Match, If-Match), so that two writers would "
        "not notice each other",
        fix="use a newer version of the store's server, or extract to a local folder and copy the cache there",
    )


def _refuse_writing(place: Place) -> NoReturn:
    raise CacheError(
        f"nothing can be written to {place}",
        why="web servers are for reading",
        fix="write to s3://, gs://, az:// or a folder",
    )


def _tag(meta: Any) -> Tag:
    return tuple((name, meta[name]) for name in ("e_tag", "version") if meta.get(name))
