"""How do rows of a sharded array get into memory, verified, at close to the speed of a memory copy?

Each row (an image) is one chunk of a shard file: where it lies comes from the shard's index (read once, checked), its
bytes go straight into the caller's array, and its CRC-32C is compared the first time that this process reads it.

Shapes: out_BND [rows, tokens, channels] in storage dtype.
"""

from __future__ import annotations

import os
import threading
from array import array
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from vlmx.cache_specs.checksum import crc32c
from vlmx.cache_specs.places import Place
from vlmx.cache_specs.shards import NOTHING, decode_chunk, read_index
from vlmx.cache_specs.sizing import CRC_BYTES, index_bytes
from vlmx.cache_specs.spec import Codec
from vlmx.cache_specs.token_files import Span, TokenFileError, TokenFiles, Wanted

if TYPE_CHECKING:
    from typing_extensions import Buffer

INDICES_AT_ONCE = 16
WORD = 4  # bytes; copies are quicker in words than in bytes
Verify = Literal["first-touch", "always", "never"]


class ShardDamagedError(Exception):
    """A shard is not what was written.

    Attributes:
        index: of the shard.
        why: what is the matter with it.
        row: of the array that was to be read; None when it is the whole shard that cannot be read.
    """

    def __init__(self, index: int, why: str, row: int | None = None) -> None:
        super().__init__(f"shard {index}: {why}")
        self.index = index
        self.why = why
        self.row = row


@dataclass(frozen=True, kw_only=True)
class ChunkLayout:
    """Where the rows lie.

    Attributes:
        array: what precedes `c/<shard>/0/0` in the key of a shard: "" or "folder/".
        slots: rows of a shard.
        row_bytes: tokens of one row, uncompressed, without checksum.
        codec: what each row went through.
        shard_bytes: sizes of the shards' files; None where they are not known.
    """

    array: str
    slots: int
    row_bytes: int
    codec: Codec
    shard_bytes: Mapping[int, int] | None


class ChunkReader:
    """Reads rows by number. Any number of threads may; after a fork each process has its own open files.

    Args:
        place: of the files.
        layout: where the rows lie.
        verify: when checksums are compared.
    """

    def __init__(self, place: Place, layout: ChunkLayout, verify: Verify) -> None:
        self._place = place
        self._layout = layout
        self._verify: Verify = verify
        self._local = _Local(place)

    def fill(self, rows: Mapping[int, int], out_BND: NDArray[Any]) -> None:
        """Read rows, each into its place in `out_BND` (C-contiguous).

        Args:
            rows: number of the row -> place.

        Raises:
            ShardDamagedError: bytes are not what was written.
        """
        local, layout = self._here(), self._layout
        slots, size, compressed = layout.slots, layout.row_bytes, layout.codec != "crc32c"
        shards, at_hand = local.shards, local.files.at_hand
        out_BF = out_BND.reshape(len(out_BND), -1).view(np.uint8)
        trusted: list[tuple[NDArray[Any], int]] = []
        untrusted: list[tuple[NDArray[Any], int, int]] = []
        waiting: list[int] = []
        try:
            # first all questions, then all copies, after each of which the processor's cache has forgotten this code
            for row, place in rows.items():
                index, slot = divmod(row, slots)
                shard = shards.get(index)
                if shard is None:
                    self._open_shards(local, rows)
                    shard = shards[index]
                offset = shard.offsets[slot]
                if offset == NOTHING:
                    raise ShardDamagedError(index, "it holds nothing for", row)
                if compressed:
                    waiting.append(row)
                elif shard.trusted[slot]:
                    here = at_hand(shard.key, offset, size)
                    waiting.append(row) if here is None else trusted.append((here, place))
                else:
                    here = at_hand(shard.key, offset, size + CRC_BYTES)
                    waiting.append(row) if here is None else untrusted.append((here, row, place))
            _copy(trusted, out_BF)
            for here, row, place in untrusted:
                content, crc = here[: size // here.itemsize], here[size // here.itemsize :]
                _copy([(content, place)], out_BF)
                if not self._matches(shards[row // slots], row % slots, out_BF[place], crc.tobytes()):
                    waiting.append(row)  # is compared again, and raises if it is not better then
            if waiting:
                self._wait_for({row: rows[row] for row in waiting}, out_BF, out_BND)
        except TokenFileError as error:
            raise ShardDamagedError(local.index_of[error.key], error.why) from error

    def _wait_for(self, rows: Mapping[int, int], out_BF: NDArray[np.uint8], out_BND: NDArray[Any]) -> None:
        """Fetch rows that are not at hand, and check and decompress each as soon as it is there."""
        local, slots = self._here(), self._layout.slots
        arrivals = []
        for row, place in rows.items():
            shard, slot = local.shards[row // slots], row % slots
            content = out_BF[place].data
            if self._layout.codec != "crc32c":
                content = memoryview(bytearray(shard.lengths[slot] - CRC_BYTES))
            want = Wanted(shard.key, shard.offsets[slot], (content, memoryview(bytearray(CRC_BYTES))))
            arrivals.append(_Arrival(want=want, shard=shard, row=row, out_ND=out_BND[place]))
        local.files.fetch([arrival.want for arrival in arrivals], lambda position: self._check(arrivals[position]))

    def announce(self, rows: Sequence[int]) -> None:
        """Say that rows will be read soon.

        Raises:
            ShardDamagedError: an index is not what was written.
        """
        local, slots = self._here(), self._layout.slots
        self._open_shards(local, rows)
        chunks = [(local.shards[row // slots], row % slots) for row in rows]
        spans = [Span(shard.key, shard.offsets[slot], shard.lengths[slot]) for shard, slot in chunks]
        local.files.announce([span for span in spans if span.offset != NOTHING])

    def _check(self, arrival: _Arrival) -> None:
        """Compare and decompress what has arrived."""
        content, crc = arrival.want.buffers
        index, slot = divmod(arrival.row, self._layout.slots)
        if not self._matches(arrival.shard, slot, content, crc):
            raise ShardDamagedError(index, "the checksum does not match for", arrival.row)
        if self._layout.codec != "crc32c":
            try:
                decode_chunk(content, self._layout.codec, arrival.out_ND)
            except ValueError as error:
                raise ShardDamagedError(index, f"{error}; this is", arrival.row) from error

    def _matches(self, shard: _Shard, slot: int, content: Buffer, crc: Buffer) -> bool:
        """Whether a chunk has its checksum, or is trusted to have it."""
        if not shard.trusted[slot]:
            if crc32c(content) != int.from_bytes(crc, "little"):
                return False
            if self._verify == "first-touch":
                shard.trusted[slot] = 1
        return True

    def _open_shards(self, local: _Local, rows: Iterable[int]) -> None:
        """Read the indices of shards that are not known yet; those of an object store at the same time."""
        slots = self._layout.slots
        new = {index for row in rows if (index := row // slots) not in local.shards}
        if self._place.is_local or len(new) < 2:
            for index in new:
                self._open_shard(local, index)
        else:
            with ThreadPoolExecutor(min(len(new), INDICES_AT_ONCE)) as pool:
                list(pool.map(lambda index: self._open_shard(local, index), new))

    def _open_shard(self, local: _Local, index: int) -> None:
        layout, slots = self._layout, self._layout.slots
        key = f"{layout.array}c/{index}/0/0"
        local.index_of[key] = index
        try:
            tail, size = local.files.tail(key, index_bytes(slots))
            if layout.shard_bytes is not None and size != layout.shard_bytes[index]:
                raise ShardDamagedError(index, f"it is {size} bytes, {layout.shard_bytes[index]} were written")
            chunk_bytes = layout.row_bytes + CRC_BYTES if layout.codec == "crc32c" else None
            index_S2 = read_index(tail, size, slots, chunk_bytes)
        except TokenFileError as error:
            raise ShardDamagedError(index, error.why) from error
        except ValueError as error:
            raise ShardDamagedError(index, str(error)) from error
        held_S = (index_S2[:, 0] != NOTHING).astype(np.uint8)
        trusted = bytearray(held_S.tobytes()) if self._verify == "never" else bytearray(slots)
        offsets, lengths = (_compact(numbers_S) for numbers_S in index_S2.T)
        local.shards.setdefault(index, _Shard(key=key, offsets=offsets, lengths=lengths, trusted=trusted))

    def _here(self) -> _Local:
        """What this process has open; after a fork the parent's is left alone."""
        if self._local.pid != os.getpid():
            self._local = _Local(self._place)
        return self._local


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """Where each slot's chunk lies in the file, and which ones need not be compared with their checksum (any more).

    Attributes:
        offsets, lengths: of each slot's chunk, checksum included; NOTHING for both where there is none.
        trusted: 1 for a slot that holds a chunk and is not compared.
    """

    key: str
    offsets: Sequence[int]
    lengths: Sequence[int]
    trusted: bytearray


@dataclass(frozen=True, kw_only=True)
class _Arrival:
    """A row whose bytes are on their way."""

    want: Wanted
    shard: _Shard
    row: int
    out_ND: NDArray[Any]


class _Local:
    """What one process has open: the files, and all indices that were read."""

    def __init__(self, place: Place) -> None:
        self.pid = os.getpid()
        self.shards: dict[int, _Shard] = {}
        self.index_of: dict[str, int] = {}
        self._place = place
        self._files: TokenFiles | None = None
        self._lock = threading.Lock()

    @property
    def files(self) -> TokenFiles:
        if self._files is None:
            with self._lock:
                self._files = self._files or self._place.token_files()
        return self._files


def _copy(sources: Iterable[tuple[NDArray[Any], int]], out_BF: NDArray[np.uint8]) -> None:
    """Copy bytes, or words, of one row each into their places.

    A loop over words is quicker than memmove, which some processors slow down by a fifth where the source does not
    begin at a multiple of 32 as the target does.
    """
    words_BF = out_BF if out_BF.shape[1] % WORD else out_BF.view(np.uint32)
    for source_F, place in sources:
        if source_F.itemsize == WORD:
            np.positive(source_F, out=words_BF[place])
        else:
            out_BF[place] = source_F


def _compact(numbers_S: NDArray[np.int64]) -> Sequence[int]:
    """Whole numbers in little memory, quick to index: as a range where chunk follows chunk."""
    first = int(numbers_S[0])
    step = int(numbers_S[1]) - first if len(numbers_S) > 1 else 0
    regular = range(first, first + step * len(numbers_S), step) if step else ()
    if len(regular) == len(numbers_S) and (np.diff(numbers_S) == step).all():
        return regular
    return array("q", numbers_S.astype(np.int64).tobytes())
