"""How are parts of files on a disk read at the speed of a memory copy, without a crash when a file is cut short?

Two ways, measured against each other:

- Bytes that lie in the page cache are copied out of a mapping of the file. That is up to twice as fast as `preadv`,
  whose cost grows with the number of pages (they are small where a file was first read at random).
- All others are announced to the kernel together, so that the disk has many requests at once, and then read with
  `preadv`. Page faults of a mapping would wait for one small request after the other: a tenth of the speed.

`mincore` tells which way to go; where it has said yes thousands of times, only every eighth image asks it.

Touching a page of a mapping that the file no longer has would kill the process (SIGBUS), so the file's size is asked
for each time. What remains is a file that is cut short in place within the millisecond between the question and the
end of a batch's copies (writers of caches never do that, they replace whole files by renaming, and a mapping keeps the
old file), and a disk that fails to read back a page that was thrown out of memory unnoticed.

Where the answers of `mincore` mean nothing (files that are neither owned nor writable, other systems than Linux), or a
file cannot be mapped, everything is read with `preadv`.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmx.cache_specs.token_files import Span, TokenFileError, TokenFiles, Wanted

OPEN_FILES_MAX = 4096
DESCRIPTORS_A_FILE = 2  # the mapping holds one of its own
ASK_EVERY = 8
SURE_AFTER = 4096  # times that mincore must say yes, one after the other
WORD = 4
_PAGE = mmap.PAGESIZE
_AT_ONCE = getattr(os, "RWF_NOWAIT", 0)


class LocalTokenFiles(TokenFiles):
    """The files below a folder.

    Args:
        folder: of the cache.
        mapped: False: never map files.
        open_files: how many files stay open; None: what a quarter of the process's limit allows.
    """

    def __init__(self, folder: Path, *, mapped: bool = True, open_files: int | None = None) -> None:
        self._folder = folder
        self._mapped = mapped
        self._limit = open_files or _room_for_files()
        self._files: dict[str, _File] = {}
        self._lock = threading.Lock()
        self._questions = 0
        self._doubt = SURE_AFTER

    def at_hand(self, key: str, offset: int, length: int) -> NDArray[Any] | None:
        file = self._files.get(key) or self._file(key)
        if file.address is None or offset + length > file.size:
            return None
        file.check_size()
        self._questions += 1
        if self._doubt or self._questions % ASK_EVERY == 0:
            if not _in_memory(file.address + offset, length):
                self._doubt = SURE_AFTER
                return None
            self._doubt = max(0, self._doubt - 1)
        if offset % WORD or length % WORD:
            return file.bytes_F[offset : offset + length]
        return file.words_F[offset // WORD : (offset + length) // WORD]

    def tail(self, key: str, length: int) -> tuple[bytes, int]:
        file = self._file(key)
        data = bytearray(min(length, file.size))
        if data:
            file.wait_for(Wanted(key, file.size - len(data), (memoryview(data),)))
        return bytes(data), file.size

    def fetch(self, wanted: Sequence[Wanted], arrived: Callable[[int], None] | None = None) -> None:
        waiting: list[tuple[int, _File]] = []
        for position, want in enumerate(wanted):
            file = self._files.get(want.key) or self._file(want.key)
            if not file.copy(want):
                waiting.append((position, file))
            elif arrived is not None:
                arrived(position)
        if len(waiting) > 1:
            for position, file in waiting:
                file.announce(wanted[position].offset, wanted[position].length)
        for position, file in waiting:
            file.wait_for(wanted[position])
            if arrived is not None:
                arrived(position)

    def announce(self, spans: Sequence[Span]) -> None:
        for span in spans if self._doubt else ():  # else everything has long been in memory
            with suppress(TokenFileError):
                self._file(span.key).announce(span.offset, span.length)

    def close(self) -> None:
        with self._lock:
            self._files.clear()

    def _file(self, key: str) -> _File:
        with self._lock:
            file = self._files.get(key)
            if file is None:
                if len(self._files) >= self._limit:
                    self._files.pop(next(iter(self._files)))  # whoever still reads from it keeps it open
                file = self._files[key] = _File(self._folder / key, key, mapped=self._mapped)
            return file


class _File:
    """An open file; closed when the last thread that reads from it lets go.

    Attributes:
        size: bytes, when it was opened.
        address: of its first byte in memory; None where it is not mapped.
        bytes_F, words_F: its content in memory, where it is mapped; words are uint32.
    """

    def __init__(self, path: Path, key: str, *, mapped: bool) -> None:
        self._key = key
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            status = os.fstat(self._descriptor)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise TokenFileError(key, "it does not exist") from error
        except OSError as error:
            raise self._unreadable(error) from error
        self.size = status.st_size
        self._map: mmap.mmap | None = None
        truthful = _mincore is not None and (status.st_uid == os.geteuid() or os.access(path, os.W_OK))
        if mapped and truthful and self.size:
            with suppress(OSError):  # e.g. a file system that has no mappings
                self._map = mmap.mmap(self._descriptor, self.size, prot=mmap.PROT_READ)
        self.address: int | None = None
        if self._map is not None:
            self.bytes_F = np.frombuffer(self._map, dtype=np.uint8)
            self.words_F = np.frombuffer(self._map, dtype=np.uint32, count=self.size // WORD)
            self.address = self.bytes_F.ctypes.data

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def check_size(self) -> None:
        """Make sure that the mapping still has a file behind it."""
        if self._map is not None and self._map.size() != self.size:
            raise TokenFileError(
                self._key, f"it was {self.size} bytes when it was opened and is {self._map.size()} now"
            )

    def copy(self, want: Wanted) -> bool:
        """Fill the buffers if the bytes are in memory; False: they have to be waited for."""
        if self.address is None:
            return self._preadv_at_once(want)
        self.check_size()
        offset, length = want.offset, want.length
        if offset + length > self.size or not _in_memory(self.address + offset, length):
            return False
        for buffer in want.buffers:
            end = offset + buffer.nbytes
            np.frombuffer(buffer, dtype=np.uint8)[:] = self.bytes_F[offset:end]
            offset = end
        return True

    def _preadv_at_once(self, want: Wanted) -> bool:
        if not _AT_ONCE:
            return False
        try:
            return os.preadv(self._descriptor, want.buffers, want.offset, _AT_ONCE) == want.length
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL):
                raise self._unreadable(error) from error
            return False

    def announce(self, offset: int, length: int) -> None:
        """Have the disk read these bytes into memory."""
        if sys.platform == "linux":
            with suppress(OSError):
                os.posix_fadvise(self._descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def wait_for(self, want: Wanted) -> None:
        """Fill the buffers, from the disk if need be."""
        offset, buffers = want.offset, list(want.buffers)
        while buffers:
            try:
                count = os.preadv(self._descriptor, buffers, offset)
            except OSError as error:
                raise self._unreadable(error) from error
            if count == 0:
                size = os.fstat(self._descriptor).st_size
                raise TokenFileError(self._key, f"it is {size} bytes, {want.length} at {want.offset} were to be read")
            offset += count
            while buffers and count >= buffers[0].nbytes:
                count -= buffers.pop(0).nbytes
            if count:
                buffers[0] = buffers[0][count:]

    def _unreadable(self, error: OSError) -> TokenFileError:
        return TokenFileError(self._key, f"it cannot be read: {error.strerror}")


def _libc_mincore() -> Any:
    """The C library's mincore(address, length, answer), or None where its answers are not those of Linux."""
    if sys.platform != "linux":
        return None
    mincore = ctypes.PyDLL(None).mincore  # too short to let other threads run meanwhile
    mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    mincore.restype = ctypes.c_int
    return mincore


_mincore = _libc_mincore()


class _Answer(threading.local):
    """Room for mincore's answer, a byte for each page."""

    def __init__(self) -> None:
        self.grow(1024)

    def grow(self, pages: int) -> None:
        self.pages = pages
        self.bytes = bytearray(pages)
        self._exported = (ctypes.c_char * pages).from_buffer(self.bytes)
        self.address = ctypes.addressof(self._exported)


_answer = _Answer()


def _in_memory(address: int, length: int) -> bool:
    """Whether these bytes of a mapping can be read without waiting for a disk."""
    length += address % _PAGE
    pages = (length - 1) // _PAGE + 1
    answer = _answer
    if pages > answer.pages:
        answer.grow(pages)
    if _mincore(address - address % _PAGE, length, answer.address):
        return False
    return answer.bytes.find(0, 0, pages) < 0


def _room_for_files() -> int:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return OPEN_FILES_MAX
    return min(OPEN_FILES_MAX, max(4, limit // 2 // DESCRIPTORS_A_FILE))
