"""How does the reader get many small pieces of large objects quickly, though each request takes a while?

Ranged requests, many in flight; pieces that lie close together come with one request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from typing import TYPE_CHECKING, Any

from vlmx.cache_specs.token_files import TokenFileError, TokenFiles, Wanted
from vlmx.errors import VlmxError

if TYPE_CHECKING:
    from vlmx.cache_specs.object_place import ObjectPlace

REQUESTS_AT_ONCE = 32
GAP_BYTES_MAX = 128 << 10  # what is read for nothing takes less time than another request
REQUEST_BYTES_MAX = 16 << 20


class ObjectTokenFiles(TokenFiles):
    """Positioned reads of objects; see `TokenFiles`.

    Args:
        place: of the cache.
    """

    def __init__(self, place: ObjectPlace) -> None:
        self._place = place
        self._pool = ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="vlmx-objects")

    def tail(self, key: str, length: int) -> tuple[bytes, int]:
        from obstore.exceptions import NotSupportedError

        path = self._place.object_path(key)

        def last(store: Any) -> tuple[bytes, int]:
            try:
                found = store.get(path, options={"range": {"suffix": length}})
                return bytes(found.bytes()), found.meta["size"]
            except NotSupportedError:  # Azure wants to be told where the end is
                size = store.head(path)["size"]
                start = max(0, size - length)
                return bytes(store.get_range(path, start=start, end=size)), size

        try:
            return self._place.bucket.ask(last)
        except FileNotFoundError as error:
            raise TokenFileError(key, "it does not exist") from error

    def fetch(self, wanted: Sequence[Wanted], arrived: Callable[[int], None] | None = None) -> None:
        requests = {
            self._pool.submit(self._request, [wanted[position] for position in positions]): positions
            for positions in _requests(wanted)
        }
        try:
            for request in as_completed(requests):
                request.result()
                if arrived is not None:
                    for position in requests[request]:
                        arrived(position)
        finally:
            for request in requests:
                request.cancel()
            wait(requests)  # nobody may write into the caller's buffers after this

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def read(self, key: str, start: int, end: int) -> memoryview:
        """Bytes of an object from `start` up to `end`, exclusive.

        Raises:
            TokenFileError: it is not there, or too short.
        """
        path = self._place.object_path(key)
        try:
            got = self._place.bucket.ask(lambda store: store.get_range(path, start=start, end=end))
        except FileNotFoundError as error:
            raise TokenFileError(key, "it does not exist") from error
        except VlmxError as error:
            if "416" in error.why or "InvalidRange" in error.why:
                raise TokenFileError(key, f"it ends before byte {start}") from error
            raise
        content = memoryview(got)
        if content.nbytes < end - start:
            raise TokenFileError(key, f"it ends at byte {start + content.nbytes}")
        return content

    def _request(self, pieces: Sequence[Wanted]) -> None:
        """Fill the buffers of pieces of one object with one request."""
        start = pieces[0].offset
        content = self.read(pieces[0].key, start, max(piece.offset + piece.length for piece in pieces))
        for piece in pieces:
            at = piece.offset - start
            for buffer in piece.buffers:
                buffer.cast("B")[:] = content[at : at + buffer.nbytes]
                at += buffer.nbytes


def _requests(wanted: Sequence[Wanted]) -> Iterator[list[int]]:
    """Positions of pieces that lie close together in one object: one request for each list."""
    together: list[int] = []
    start = end = 0
    for position in sorted(range(len(wanted)), key=lambda position: wanted[position][:2]):
        piece = wanted[position]
        if together:
            near = piece.offset - end <= GAP_BYTES_MAX and piece.offset + piece.length - start <= REQUEST_BYTES_MAX
            if piece.key != wanted[together[0]].key or not near:
                yield together
                together = []
        if not together:
            start, end = piece.offset, 0
        end = max(end, piece.offset + piece.length)
        together.append(position)
    if together:
        yield together
