"""How are batches of tokens in memory before they are asked for? Threads fill a ring of buffers ahead of the consumer.

Threads, not processes: reading is copying, which does not hold Python's lock, while a batch that another process read
has to be copied once more. The buffers are used again and again, because fresh memory costs as much as the copy itself,
and they are page-locked where CUDA is in use, so that copies to the GPU need no staging.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from vlmx.cache_specs.buffers import aligned_empty, pinned_empty
from vlmx.cache_specs.token_source import TokenSource
from vlmx.errors import CacheError


class TokenLoader:
    """The tokens of batches of images, in their order; a context manager, and an iterator that ends with the batches.

        with TokenLoader(cache, batches) as loader:
            for tokens_BND in loader:
                ...

    What it gives is [images, tokens, channels] in storage dtype, in one of the loader's own buffers: valid until the
    next batch is asked for (a copy to a GPU that runs by itself must have come to its end by then).

    Args:
        source: the cache, or several joined ones.
        batches: image ids of each batch; they are taken from here a little before they are read.
        threads: how many batches are read at the same time.
        ahead: how many batches are read, being read or waiting to be read while the consumer has one.
        pin: page-locked buffers; None: if torch is in use and has CUDA.

    Raises:
        CacheError, CacheCorruptError: see `TokenSource.read`; when the batch is asked for, after those before it.
    """

    def __init__(
        self,
        source: TokenSource,
        batches: Iterable[Sequence[str]],
        *,
        threads: int = 2,
        ahead: int = 4,
        pin: bool | None = None,
    ) -> None:
        assert threads >= 1
        assert ahead >= 1
        self._source = source
        self._batches = iter(batches)
        self._ahead = ahead
        self._pin = _cuda_in_use() if pin is None else pin
        self._waiting: deque[tuple[Future[NDArray[Any]], NDArray[Any]]] = deque()
        self._free: list[NDArray[Any]] = []
        self._lent: NDArray[Any] | None = None
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="token-loader")
        self._announcer = ThreadPoolExecutor(1, thread_name_prefix="token-loader-announcer")

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return self

    def __next__(self) -> NDArray[Any]:
        if self._lent is not None:
            self._free.append(self._lent)
            self._lent = None
        while len(self._waiting) <= self._ahead and (ids := next(self._batches, None)) is not None:
            room_BND = self._room(len(ids))
            self._announcer.submit(self._announce, list(ids))
            reading = self._pool.submit(self._source.read, list(ids), out=room_BND[: len(ids)])
            self._waiting.append((reading, room_BND))
        if not self._waiting:
            self.close()
            raise StopIteration
        reading, self._lent = self._waiting.popleft()
        return reading.result()

    def __enter__(self) -> TokenLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading and end the threads; what was read ahead is lost. Afterwards there are no more batches."""
        self._batches = iter(())
        self._waiting.clear()
        for pool in (self._announcer, self._pool):
            pool.shutdown(wait=True, cancel_futures=True)
        self._free.clear()

    def _announce(self, ids: Sequence[str]) -> None:
        """Let the disk begin with a batch while those before it are read."""
        with suppress(CacheError):  # is raised again where the batch is read
            self._source.announce(ids)

    def _room(self, images: int) -> NDArray[Any]:
        """A free buffer for so many images, or more."""
        while self._free:
            room_BND = self._free.pop()
            if len(room_BND) >= images:
                return room_BND
        make = pinned_empty if self._pin else aligned_empty
        return make((images, self._source.num_tokens, self._source.shape.dim), self._source.storage_dtype)


def _cuda_in_use() -> bool:
    """Whether torch has been imported, so that batches may go to a GPU, and finds one."""
    return "torch" in sys.modules and bool(sys.modules["torch"].cuda.is_available())
