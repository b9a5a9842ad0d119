"""Does a cache survive kills, full disks and damage?"""

from __future__ import annotations

import errno
import itertools
import os
import resource
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_samples import GOOD, IDS, SHAPE, SLOTS, commit, content, flip, shard_path, spec_of, tokens_of, write

from vlmx.cache_specs.audit import verify
from vlmx.cache_specs.claims import WRITERS
from vlmx.cache_specs.ids import image_id
from vlmx.cache_specs.manifest import MANIFEST, SEAL
from vlmx.cache_specs.places import PARTIAL
from vlmx.cache_specs.reader import TokenReader, open_cache
from vlmx.cache_specs.settle import forget_shards
from vlmx.cache_specs.writer import CacheWriter, Part
from vlmx.errors import CacheCorruptError, CacheError, OutOfSpaceError


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return write(tmp_path / "caches")


def at_the_nth_call(count: int, torn: bool) -> None:
    """Let this process die by SIGKILL at the count-th system call that changes the disk: before it, or halfway."""
    calls = itertools.count(1)

    def deadly(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            if next(calls) == count:
                if torn and name == "fsync" and stat.S_ISREG(os.fstat(arguments[0]).st_mode):
                    os.truncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return counted

    for name in ("fsync", "replace", "mkdir", "unlink", "rmdir", "ftruncate", "pwrite"):
        setattr(os, name, deadly(name, getattr(os, name)))


def killed_at(root: Path, count: int, torn: bool, part: Part | None = None) -> bool:
    """Write the cache in a process that is killed at its count-th such call; False when it came to its end."""
    child = os.fork()
    if child == 0:
        at_the_nth_call(count, torn)
        write(root, part=part)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of fsyncs take a minute on a disk."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


@pytest.mark.parametrize(("torn", "part"), [(False, None), (True, None), (False, Part(index=1, count=2))])
def test_killed_anywhere_and_started_again_gives_the_same_bytes(memory: Path, torn: bool, part: Part | None) -> None:
    whole = content(write(memory / "whole"))
    assert {MANIFEST, SEAL, "tokens.zarr/zarr.json", "tokens.zarr/tokens/c/2/0/0"} <= set(whole)
    deaths = 0
    for count in itertools.count(1):
        root = memory / str(count)
        if not killed_at(root, count, torn, part):
            break
        deaths += 1
        survivor = root / spec_of().name
        if (survivor / MANIFEST).exists():
            reader = TokenReader(survivor, allow_partial=True)
            stored = list(reader.ids)
            assert part is not None or stored == GOOD[: len(stored)]
            for tokens_ND, image in zip(reader.read(stored), stored, strict=True):
                np.testing.assert_array_equal(tokens_ND, tokens_of(image))
        assert content(write(root)) == whole, count
        shutil.rmtree(root)
    assert deaths > 40


def test_a_second_writer_is_refused_and_nothing_is_lost(cache: Path) -> None:
    extra = [image_id(b"more %d" % number) for number in range(3)]
    first = CacheWriter(cache.parent, spec_of(), SHAPE)
    (plan,) = first.plan([*IDS, *extra])
    with pytest.raises(CacheError, match=f"held by process {os.getpid()} on") as caught:
        CacheWriter(cache.parent, spec_of(), SHAPE)
    assert "another process is writing" in caught.value.what
    with pytest.raises(CacheError, match="another process is writing"):
        forget_shards(cache, [0])
    commit(first, plan)
    first.seal()
    first.close()
    CacheWriter(cache.parent, spec_of(), SHAPE).close()
    assert len(open_cache(cache)) == 12


def test_a_full_disk_is_one_clear_error_and_nothing_is_lost(cache: Path) -> None:
    extra = [image_id(b"more %d" % number) for number in range(3)]
    with CacheWriter(cache.parent, spec_of(), SHAPE) as writer:
        (plan,) = writer.plan([*IDS, *extra])
        with full_device(), pytest.raises(OutOfSpaceError, match="no space left"):
            commit(writer, plan)
        assert os.listdir(cache / PARTIAL) == []
        assert not shard_path(cache, plan.index).exists()
        commit(writer, plan)  # space was made
        writer.seal()
    reader = open_cache(cache)
    np.testing.assert_array_equal(reader.read(extra), np.stack([tokens_of(image) for image in extra]))


@contextmanager
def full_device() -> Iterator[None]:
    """Whatever file this process brings to the disk, the disk has no room for it."""
    fsync = os.fsync

    def no_space(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.fsync = no_space
    try:
        yield
    finally:
        os.fsync = fsync


def test_a_file_that_could_not_be_finished_leaves_nothing(cache: Path) -> None:
    (image,) = extra = [image_id(b"one more")]
    before = content(cache)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with CacheWriter(cache.parent, spec_of(), SHAPE) as writer:
        (plan,) = writer.plan([*IDS, *extra])
        resource.setrlimit(resource.RLIMIT_FSIZE, (60, hard))  # the kernel refuses the write that would pass it
        try:
            with pytest.raises(OutOfSpaceError, match="no space left"):
                commit(writer, plan)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        left = content(cache)
        assert {name: left[name] for name in before if name != SEAL} == {k: v for k, v in before.items() if k != SEAL}
        assert {name for name in left.keys() - before.keys() if not name.startswith(WRITERS)} == set()
        commit(writer, plan)
        writer.seal()
    np.testing.assert_array_equal(open_cache(cache).read(extra)[0], tokens_of(image))


def test_a_shard_that_was_never_committed_is_thrown_away(cache: Path) -> None:
    before = content(cache)
    written = write(cache.parent, [*IDS, image_id(b"one more")])
    (written / MANIFEST).write_bytes(before[MANIFEST])  # as if killed between the shard and its record
    write(cache.parent)
    assert content(cache) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_can_be_emptied_and_gone_on_with(small_disk: Path, memory: Path) -> None:
    ids = [image_id(b"x%d" % number) for number in range(100)]
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(16_000))
    for _ in range(2):
        with pytest.raises(OutOfSpaceError, match="no space left"):
            write(small_disk, ids)
        ballast.unlink(missing_ok=True)
    cache = small_disk / spec_of().name
    reader = TokenReader(cache, allow_partial=True)
    assert len(reader) >= SLOTS
    stored = list(reader.ids)
    np.testing.assert_array_equal(reader.read(stored), np.stack([tokens_of(image) for image in stored]))
    moved = memory / "larger" / cache.name
    shutil.copytree(cache, moved)
    assert content(write(moved.parent, ids)) == content(write(memory / "whole", ids))


@pytest.mark.parametrize("keep", [0, 10, 100])
def test_a_truncated_shard_is_found_quickly(cache: Path, keep: int) -> None:
    os.truncate(shard_path(cache, 2), keep)
    with pytest.raises(CacheCorruptError, match="were written"):
        open_cache(cache).read([IDS[9]])
    assert "were written" in verify(cache, full=False).damaged[2].why


def test_a_missing_shard_is_found(cache: Path) -> None:
    shard_path(cache, 1).unlink()
    with pytest.raises(CacheCorruptError, match="does not exist"):
        open_cache(cache).read([IDS[4]])
    assert verify(cache, full=False).damaged[1].why == "it does not exist"


def test_damaged_shards_are_forgotten_and_made_again(cache: Path) -> None:
    before = content(cache)
    flip(shard_path(cache, 1), 3)
    forget_shards(cache, [1])
    with pytest.raises(CacheError, match="has not come to its end"):
        open_cache(cache)
    assert content(write(cache.parent)) == before
    assert verify(cache, full=True).ok
