"""What does the reader ask of the files that tokens lie in, be they on a disk or in an object store?

A key is a file's path below the cache's folder, with "/" between its parts, e.g. "tokens.zarr/tokens/c/0/0/0".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from numpy.typing import NDArray


class Wanted(NamedTuple):
    """Bytes of one file that lie together, and where they shall go.

    Attributes:
        key: the file.
        offset: of the first byte.
        buffers: writable, C-contiguous memory of bytes; filled to the end one after the other: an image's tokens lie
            in one, their checksum in the next.
    """

    key: str
    offset: int
    buffers: tuple[memoryview, ...]

    @property
    def length(self) -> int:
        """Bytes that are wanted."""
        return sum(buffer.nbytes for buffer in self.buffers)


class Span(NamedTuple):
    """Bytes of one file that will be wanted soon."""

    key: str
    offset: int
    length: int


class TokenFileError(Exception):
    """A file is not there, is shorter than what was wanted of it, or cannot be read.

    Attributes:
        key: the file.
        why: what is the matter with it, for the user: "it does not exist".
    """

    def __init__(self, key: str, why: str) -> None:
        super().__init__(f"{key}: {why}")
        self.key = key
        self.why = why


class TokenFiles(ABC):
    """Positioned reads of files that never change; made by `Place.token_files`, one for each process that reads.

    Any number of threads may use one. Errors that are not about a file (no network, no permission for the bucket) are
    VlmxErrors of the place.
    """

    @abstractmethod
    def tail(self, key: str, length: int) -> tuple[bytes, int]:
        """The last `length` bytes of a file (all of a shorter one), and the file's size.

        Raises:
            TokenFileError: it is not there, or cannot be read.
        """

    @abstractmethod
    def fetch(self, wanted: Sequence[Wanted], arrived: Callable[[int], None] | None = None) -> None:
        """Fill all buffers, in any order and side by side where that is faster.

        Args:
            wanted: what to read.
            arrived: called with a position in `wanted` as soon as its buffers are full, in the calling thread: bytes
                are checked while they are in the processor's cache, or while others are on their way. What it raises
                ends the fetch.

        Raises:
            TokenFileError: a file is not there, is too short, or cannot be read. What the buffers hold is then unknown.
        """

    def at_hand(self, key: str, offset: int, length: int) -> NDArray[Any] | None:
        """Bytes of a file that lie in this process's memory already; None if they do not, then they can be fetched.

        Returns:
            A view of them, to be copied at once: as uint32 where offset and length are multiples of 4, else as uint8.

        Raises:
            TokenFileError: the file is not there, or is not what it was.
        """
        return None

    def announce(self, spans: Sequence[Span]) -> None:  # noqa: B027  # a hint, which not every place can use
        """Say what will be fetched soon; returns at once and never raises."""

    @abstractmethod
    def close(self) -> None:
        """Let go of open files and connections."""
