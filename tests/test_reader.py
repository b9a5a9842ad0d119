"""Does the reader give what was written and nothing else, however files, threads and processes behave?"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_samples import BROKEN, GOOD, IDS, SCALES, flip, tokens_of, write
from numpy.typing import NDArray

from vlmx.cache_specs import checksum, local_files
from vlmx.cache_specs.chunks import ChunkReader
from vlmx.cache_specs.layout import shard_key
from vlmx.cache_specs.local_files import LocalTokenFiles
from vlmx.cache_specs.reader import TokenReader, open_cache
from vlmx.cache_specs.spec import Codec, DType
from vlmx.cache_specs.token_files import Span, TokenFileError, TokenFiles, Wanted
from vlmx.errors import CacheCorruptError, CacheError

KINDS: list[tuple[DType, Codec]] = [
    ("float16", "crc32c"),
    ("bfloat16", "crc32c"),
    ("float32", "crc32c"),
    ("int8", "crc32c"),
    ("float16", "blosc"),
    ("int8", "blosc"),
]


@pytest.fixture(params=["mapped", "preadv", "not in memory"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All ways to read a file: out of a mapping, where there can be none, and from the disk."""
    if request.param == "preadv":
        monkeypatch.setattr(local_files, "_mincore", None)
    if request.param == "not in memory":
        monkeypatch.setattr(local_files, "_in_memory", lambda *_: False)
    return str(request.param)


def expected(ids: list[str], dtype: DType = "float16") -> NDArray[Any]:
    return np.stack([tokens_of(image, dtype) for image in ids])


def shard(cache: Path, index: int) -> Path:
    return cache / shard_key(index)


@pytest.mark.parametrize(("dtype", "codec"), KINDS)
@pytest.mark.parametrize("verify", ["first-touch", "always", "never"])
def test_any_order_with_duplicates(tmp_path: Path, dtype: DType, codec: Codec, verify: Any, way: str) -> None:
    reader = open_cache(write(tmp_path, dtype=dtype, codec=codec), verify=verify)
    wanted = [IDS[9], IDS[0], IDS[9], IDS[2], IDS[7], IDS[9]]
    out_BND = np.full((6, 6, 4), 7, dtype=reader.storage_dtype)
    for _ in range(3):
        out_BND[:] = 7
        assert reader.read(wanted, out_BND) is out_BND
        np.testing.assert_array_equal(out_BND, expected(wanted, dtype))
        np.testing.assert_array_equal(reader.read(wanted), expected(wanted, dtype))
    assert reader.read([]).shape == (0, 6, 4)


def test_an_image_that_comes_twice_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    fill = ChunkReader.fill

    def counted(self: ChunkReader, rows: Mapping[int, int], out_BND: NDArray[Any]) -> None:
        asked.append(len(rows))
        fill(self, rows, out_BND)

    monkeypatch.setattr(ChunkReader, "fill", counted)
    reader = open_cache(write(tmp_path), verify="always")
    reader.read([IDS[1], IDS[1], IDS[0], IDS[1]])
    assert asked == [2]


def test_eight_bits_come_as_codes_and_as_what_they_stand_for(tmp_path: Path) -> None:
    reader = open_cache(write(tmp_path, dtype="int8"))
    codes_BND = reader.read(GOOD)
    assert codes_BND.dtype == np.int8
    np.testing.assert_array_equal(reader.scale, SCALES.scale_D)
    np.testing.assert_array_equal(reader.offset, SCALES.offset_D)
    floats_BND = reader.read_float32(GOOD)
    np.testing.assert_allclose(floats_BND, codes_BND * SCALES.scale_D + SCALES.offset_D, rtol=1e-6, atol=1e-7)
    assert open_cache(write(tmp_path / "other"), allow_partial=True).scale is None


def test_codes_become_floats_on_the_device(tmp_path: Path) -> None:
    import torch

    from vlmx.models.tokens import to_floats

    reader = open_cache(write(tmp_path, dtype="int8"))
    scale, offset = torch.from_numpy(SCALES.scale_D), torch.from_numpy(SCALES.offset_D)
    codes = torch.from_numpy(reader.read(GOOD))
    floats = to_floats(codes, torch.float32, scale_D=scale, offset_D=offset)
    np.testing.assert_allclose(floats.numpy(), reader.read_float32(GOOD), rtol=1e-6, atol=1e-7)
    assert to_floats(codes, torch.bfloat16, scale_D=scale, offset_D=offset).dtype == torch.bfloat16
    assert to_floats(torch.ones(1, 2, 3, dtype=torch.bfloat16), torch.float32).dtype == torch.float32


def test_a_slot_without_tokens_is_no_image(tmp_path: Path) -> None:
    reader = open_cache(write(tmp_path), verify="never")
    with pytest.raises(CacheError, match="1 of 2 images are not in cache"):
        reader.read([GOOD[0], BROKEN])


@pytest.mark.parametrize(("dtype", "codec"), KINDS)
def test_every_flipped_byte_is_found_on_reading(tmp_path: Path, dtype: DType, codec: Codec) -> None:
    """A thousand random places in the shards: their tokens, checksums and indices."""
    cache = write(tmp_path, dtype=dtype, codec=codec)
    dice = np.random.default_rng(0)
    paths = [shard(cache, index) for index in range(3)]
    pristine = [path.read_bytes() for path in paths]
    for _ in range(1000 // len(KINDS) + 1):
        number = int(dice.integers(3))
        damaged = bytearray(pristine[number])
        damaged[int(dice.integers(len(damaged)))] ^= int(dice.integers(1, 256))
        paths[number].write_bytes(damaged)
        with pytest.raises(CacheCorruptError, match=f"shard {number} of cache"):
            open_cache(cache).read(GOOD)
        paths[number].write_bytes(pristine[number])
    np.testing.assert_array_equal(open_cache(cache).read(GOOD), expected(GOOD, dtype))


def test_damage_names_the_image_and_the_command(tmp_path: Path, way: str) -> None:
    cache = write(tmp_path)
    flip(shard(cache, 1), 60)  # the second chunk of the shard; its second image could not be decoded
    with pytest.raises(CacheCorruptError) as caught:
        open_cache(cache).read(GOOD)
    assert caught.value.why == f"the checksum does not match for image {IDS[6]}"
    assert caught.value.fix == f"`vlmx cache repair {cache}` makes the damaged shards again"
    np.testing.assert_array_equal(open_cache(cache).read(IDS[:4]), expected(IDS[:4]))


def test_when_checksums_are_compared(tmp_path: Path) -> None:
    cache = write(tmp_path)
    readers = {verify: open_cache(cache, verify=verify) for verify in ("first-touch", "always", "never")}
    for reader in readers.values():
        reader.read(GOOD)
    with open(shard(cache, 0), "r+b") as file:  # in place: the files that are open see it
        file.write(b"\xff\xff")
    for verify in ("first-touch", "never"):
        assert readers[verify].read([IDS[0]]).tobytes()[:2] == b"\xff\xff"
    with pytest.raises(CacheCorruptError, match="checksum"):
        readers["always"].read([IDS[0]])


@pytest.mark.parametrize("keep", [0, 3, 100, 150, 200])
def test_a_file_that_is_cut_short_while_it_is_open_is_an_error(tmp_path: Path, keep: int, way: str) -> None:
    cache = write(tmp_path)
    reader = open_cache(cache)
    reader.read(GOOD)
    os.truncate(shard(cache, 0), keep)
    with pytest.raises(CacheCorruptError, match="shard 0"):
        reader.read(IDS[:4])
    np.testing.assert_array_equal(reader.read(IDS[6:]), expected(IDS[6:]))
    with pytest.raises(CacheCorruptError, match=f"it is {keep} bytes"):
        open_cache(cache).read(IDS[:4])


def test_a_large_file_that_is_cut_short_kills_nobody(tmp_path: Path) -> None:
    """Pages beyond the end of a mapped file would end the process with SIGBUS."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 22))
    files = LocalTokenFiles(tmp_path)
    room = bytearray(1 << 20)
    for offset, length, kind in ((3 << 20, 1 << 20, np.uint32), (5, 1000, np.uint8), (8, 6, np.uint8)):
        here = files.at_hand("file", offset, length)
        assert here is not None
        assert here.dtype == kind
        assert here.tobytes() == path.read_bytes()[offset : offset + length]
    assert files.at_hand("file", 3 << 20, (1 << 20) + 4) is None
    os.truncate(path, 2 << 20)
    with pytest.raises(TokenFileError, match="it was 4194304 bytes when it was opened and is 2097152 now"):
        files.at_hand("file", 3 << 20, len(room))
    with pytest.raises(TokenFileError, match="is 2097152 now"):
        files.fetch([Wanted("file", 3 << 20, (memoryview(room),))])


def test_a_file_that_was_replaced_is_read_as_it_was(tmp_path: Path) -> None:
    cache = write(tmp_path)
    reader = open_cache(cache)
    reader.read(GOOD)
    (tmp_path / "new").write_bytes(b"")
    os.replace(tmp_path / "new", shard(cache, 0))
    np.testing.assert_array_equal(reader.read(GOOD), expected(GOOD))


def test_a_file_that_vanished_before_it_was_opened(tmp_path: Path, way: str) -> None:
    cache = write(tmp_path)
    reader = open_cache(cache)
    shard(cache, 2).unlink()
    with pytest.raises(CacheCorruptError, match="shard 2") as caught:
        reader.read([IDS[9]])
    assert caught.value.why == "it does not exist"
    reader.announce(GOOD[:2])
    with pytest.raises(CacheCorruptError, match="shard 2"):
        reader.announce([IDS[9], "a stranger"])


def test_mincore_is_asked_less_often_once_it_is_sure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(8192))
    monkeypatch.setattr(local_files, "SURE_AFTER", 10)
    answers: Iterator[bool] = iter([True] * 10 + [True] * 5 + [False] + [True] * 99)
    asked: list[bool] = []

    def in_memory(*_: int) -> bool:
        asked.append(next(answers))
        return asked[-1]

    monkeypatch.setattr(local_files, "_in_memory", in_memory)
    files = LocalTokenFiles(tmp_path)
    given = [files.at_hand("file", 0, 16) is None for _ in range(10 + 6 * 8 + 10)]
    assert given.count(True) == 1
    assert 10 + 6 + 8 <= len(asked) <= 10 + 6 + 12  # all, then every eighth until one says no, then all again


def test_files_are_closed_when_there_are_many(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 5000)
    files = LocalTokenFiles(tmp_path, open_files=3)
    for _ in range(2):
        for number in range(20):
            assert files.tail(str(number), 4) == (bytes([number]) * 4, 5000)
    assert 3 <= open_below(tmp_path) <= 2 * 3
    files.close()
    assert open_below(tmp_path) == 0


def open_below(folder: Path) -> int:
    """Files of this process below a folder."""
    names = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return sum(os.readlink(name).startswith(str(folder)) for name in names if os.path.lexists(name))


def test_the_tail_of_a_short_and_of_an_empty_file(tmp_path: Path, way: str) -> None:
    (tmp_path / "short").write_bytes(b"abc")
    (tmp_path / "empty").write_bytes(b"")
    files: TokenFiles = LocalTokenFiles(tmp_path)
    assert files.tail("short", 10) == (b"abc", 3)
    assert files.tail("empty", 10) == (b"", 0)
    files.announce([Span("short", 0, 3), Span("missing", 0, 3)])
    with pytest.raises(TokenFileError, match="missing: it does not exist"):
        files.tail("missing", 10)
    with pytest.raises(TokenFileError, match=r"short: it is 3 bytes, 4 at 0 were to be read"):
        files.fetch([Wanted("short", 0, (memoryview(bytearray(4)),))])
    one, two = bytearray(1), bytearray(2)
    files.fetch([Wanted("short", 0, (memoryview(one), memoryview(two)))])
    assert (bytes(one), bytes(two)) == (b"a", b"bc")


def test_what_the_fetch_is_told_ends_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    seen: list[int] = []

    def arrived(position: int) -> None:
        seen.append(position)
        raise KeyError(position)

    wanted = [Wanted("file", k, (memoryview(bytearray(1)),)) for k in range(3)]
    with pytest.raises(KeyError):
        LocalTokenFiles(tmp_path).fetch(wanted, arrived)
    assert seen == [0]


def test_threads_share_a_reader_with_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setattr(local_files, "_room_for_files", lambda: 1)
    reader = open_cache(write(tmp_path))
    wanted = expected(GOOD)

    def work(seed: int) -> bool:
        dice = np.random.default_rng(seed)
        for _ in range(200):
            chosen = dice.integers(0, len(GOOD), 4)
            if not np.array_equal(reader.read([GOOD[k] for k in chosen]), wanted[chosen]):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_a_forked_process_reads_with_its_own_files(tmp_path: Path) -> None:
    reader = open_cache(write(tmp_path))
    assert isinstance(reader, TokenReader)
    reader.read(GOOD)
    files = reader._chunks._local.files
    assert isinstance(files, LocalTokenFiles)
    files._lock.acquire()  # as another thread may have done at the moment of the fork
    try:
        child = os.fork()
        if child == 0:
            threading.Timer(20, os._exit, [2]).start()
            os._exit(0 if np.array_equal(reader.read(GOOD), expected(GOOD)) else 1)
    finally:
        files._lock.release()
    assert os.waitpid(child, 0)[1] == 0
    np.testing.assert_array_equal(reader.read(GOOD), expected(GOOD))


def _read_sum(reader: TokenReader) -> float:
    return float(reader.read_float32(GOOD).sum())


def test_a_spawned_process_gets_a_reader_by_pickle(tmp_path: Path) -> None:
    reader = open_cache(write(tmp_path), verify="always")
    reader.read(GOOD)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_read_sum, (reader,)) == _read_sum(reader)
    copy = pickle.loads(pickle.dumps(open_cache(write(tmp_path / "open", seal=False), allow_partial=True)))
    np.testing.assert_array_equal(copy.read(GOOD), expected(GOOD))


def test_the_checksum_is_that_of_the_standard() -> None:
    import google_crc32c

    assert checksum.crc32c(b"123456789") == 0xE3069283  # RFC 3720's check value
    tokens_ND = tokens_of(GOOD[0])
    for content in (tokens_ND.data, memoryview(bytearray(tokens_ND.tobytes())), b"", tokens_ND.tobytes()):
        assert checksum.crc32c(content) == google_crc32c.value(bytes(content))
