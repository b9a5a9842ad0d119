"""How are pieces of a file on a server read: https://, s3://, gs://, az://?"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlsplit

from vlmx.cache_specs.places import REMOTE_SCHEMES
from vlmx.errors import BackendError, CacheError, DataError, UsageError

if TYPE_CHECKING:
    from typing_extensions import Buffer

T = TypeVar("T")

WINDOW_BYTES = 16 << 10  # what one request brings when headers are read: small members that lie side by side share it


class RemoteFile:
    """A file on a server, read by ranges; for any number of threads.

    Credentials and endpoints come from the usual environment variables, as for caches on object stores.

    Attributes:
        url: its address.
        size: bytes.
        stamp: a text that changes when the file does; None when the server tells nothing of that kind.

    Raises:
        BackendError: the library for object stores is not installed, or the server cannot be reached.
        DataError: there is no such file, or we may not read it.
        UsageError: an address of a kind that is not known.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        scheme = parts.scheme.lower()
        if scheme not in REMOTE_SCHEMES:
            raise UsageError(f"'{url}' cannot be read", why=f"'{scheme}' is not one of {', '.join(REMOTE_SCHEMES)}")
        if parts.query:
            raise UsageError(
                f"'{url}' cannot be read",
                why="addresses with a '?' are signed for whole files, and vlmx reads parts of them",
                fix="fetch the files and give their paths, or use s3:// with credentials in the environment",
            )
        if importlib.util.find_spec("obstore") is None:
            raise BackendError(
                f"{url} cannot be read",
                why="obstore, the library for files on servers, is not installed",
                fix="pip install 'vlmx[remote]'",
            )

        from vlmx.cache_specs.object_store import bucket_of

        self.url = url
        self._bucket = bucket_of(scheme, parts.netloc)
        self._path = unquote(parts.path).lstrip("/")
        about = self._ask(lambda store: store.head(self._path))
        self.size = int(about["size"])
        version = about.get("e_tag") or str(about.get("last_modified") or "")
        self.stamp = f"{self.size}-{version}" if version else None

    def read(self, offset: int, length: int) -> bytes:
        """The bytes of a range that lies in the file.

        Raises:
            BackendError: the server cannot be reached.
            DataError: the file is gone, or the server does not give ranges.
        """
        if not length:
            return b""
        return bytes(self._ask(lambda store: store.get_range(self._path, start=offset, length=length)))

    def _ask(self, ask: Callable[[Any], T]) -> T:
        from obstore.exceptions import NotSupportedError

        def ask_for_part(store: Any) -> T:
            try:
                return ask(store)
            except NotSupportedError as error:
                raise DataError(
                    f"the server of {self.url} does not give parts of files",
                    why=str(error).splitlines()[0],
                    fix="fetch the files and give their paths",
                ) from error

        try:
            return self._bucket.ask(ask_for_part)
        except FileNotFoundError as error:
            raise DataError(f"there is no file {self.url}", why=str(error), fix="check the address") from error
        except CacheError as error:
            raise DataError(error.what, why=error.why, fix=error.fix) from error


class RangedReader(io.RawIOBase):
    """A remote file as a file object: small reads are served from a window of one request."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._position = 0
        self._window = b""
        self._window_start = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        target = memoryview(buffer).cast("B")
        length = max(0, min(len(target), self._file.size - self._position))
        if not length:
            return 0
        start = self._position - self._window_start
        if start < 0 or start + length > len(self._window):
            wanted = min(max(length, WINDOW_BYTES), self._file.size - self._position)
            self._window = self._file.read(self._position, wanted)
            self._window_start = self._position
            start = 0
        target[:length] = self._window[start : start + length]
        self._position += length
        return length
