"""Do several writers fill one cache without losing or spoiling anything, and is it the same as that of one?"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cache_samples import (
    GOOD,
    IDS,
    SCALES,
    SHAPE,
    SLOTS,
    commit,
    content,
    shard_path,
    spec_of,
    tokens_of,
    values_of,
    write,
)

from vlmx.cache_specs.ids import ImageEntry, ImageTable, image_id
from vlmx.cache_specs.manifest import COMMITS, MANIFEST, _with_crc, is_sealed, read_manifest, shard_line
from vlmx.cache_specs.quantize import Quantization, calibrate
from vlmx.cache_specs.reader import open_cache
from vlmx.cache_specs.rubbish import find_rubbish
from vlmx.cache_specs.settle import forget_shards, replace_shards
from vlmx.cache_specs.spec import Codec, DType
from vlmx.cache_specs.writer import CacheWriter, Part
from vlmx.errors import CacheCorruptError, CacheError

MANY = [image_id(b"many %d" % number) for number in range(30)]  # seven full shards and one of two images


def writer_of(root: Path, part: Part | None = None) -> CacheWriter:
    return CacheWriter(root, spec_of(), SHAPE, slots=SLOTS, part=part)


def in_child(work: object) -> int:
    """Run `work` in a forked process that is then alive, with its claims, until it is killed; gives its pid."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        kept = work()  # type: ignore[operator]
        os.write(told, b"x")
        time.sleep(60)
        os._exit(kept is None)
    assert os.read(ready, 1) == b"x"
    os.close(ready)
    os.close(told)
    return child


def test_two_writers_make_different_shards_and_the_store_of_one(tmp_path: Path) -> None:
    alone = content(write(tmp_path / "one", MANY))
    made: dict[int, list[int]] = {0: [], 1: []}
    with writer_of(tmp_path / "two", Part(index=0, count=2)) as first:
        with writer_of(tmp_path / "two", Part(index=1, count=2)) as second:
            plans = first.plan(MANY)
            assert second.plan(MANY) == plans
            for number, writer in (0, first), (1, second), (0, first), (0, first), (1, second), (0, first), (0, first):
                for plan in writer.next_share():
                    made[number].append(plan.index)
                    commit(writer, plan)
            (last,) = second.next_share()
            assert first.next_share() == []
            commit(second, last)
            assert made == {0: [0, 2, 4, 6, 5], 1: [1, 3]}
            assert last.index == 7
            assert second.seal()
        assert first.next_share() == []
        assert first.missing == []
        assert first.seal()
    assert content(tmp_path / "two" / spec_of().name) == alone


@pytest.mark.parametrize("order", [[7, 0, 3], [0, 1, 2], [6, 7]])
def test_a_writer_that_comes_later_plans_the_same_shards(tmp_path: Path, order: list[int]) -> None:
    with writer_of(tmp_path, Part(index=0, count=8)) as first:
        plans = {plan.index: plan for plan in first.plan(MANY)}
        for index in order:
            commit(first, plans[index])
        with writer_of(tmp_path, Part(index=1, count=8)) as second:
            assert {plan.index: plan for plan in second.plan(MANY)} == {
                index: plan for index, plan in plans.items() if index not in order
            }


def test_a_dead_writers_share_is_taken_over(tmp_path: Path) -> None:
    cache = tmp_path / spec_of().name

    def one_of_two_shards() -> CacheWriter:
        writer = writer_of(tmp_path, Part(index=1, count=2))
        writer.plan(MANY)
        commit(writer, writer.next_share()[0])
        assert [plan.index for plan in writer.next_share()] == [3]
        return writer

    child = in_child(one_of_two_shards)
    try:
        with writer_of(tmp_path, Part(index=0, count=2)) as writer:
            writer.plan(MANY)
            while share := writer.next_share():
                for plan in share:
                    commit(writer, plan)
            assert [plan.index for plan in writer.missing] == [3]  # the other one is alive
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            (plan,) = writer.next_share()
            assert plan.index == 3
            assert not writer.seal()
            assert writer.next_share() == []  # it was given already
            commit(writer, plan)
            assert writer.seal()
    finally:
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
    assert content(cache) == content(write(tmp_path / "alone", MANY))


def test_the_number_of_writers_may_change_between_runs(tmp_path: Path) -> None:
    write(tmp_path, MANY, part=Part(index=0, count=3), stop_after=2)
    write(tmp_path, MANY, part=Part(index=1, count=2), stop_after=3)
    assert content(write(tmp_path, MANY)) == content(write(tmp_path / "alone", MANY))


def test_a_second_single_writer_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    with writer_of(tmp_path) as first:
        for plan in first.plan(IDS)[:1]:
            commit(first, plan)
        for part in (None, Part(index=0, count=2)):
            with pytest.raises(CacheError, match="another process is writing") as caught:
                writer_of(tmp_path, part)
            assert f"process {os.getpid()} on" in caught.value.why
        with pytest.raises(CacheError, match="another process is writing"):
            forget_shards(tmp_path / spec_of().name, [0])
        for plan in first.next_share():
            commit(first, plan)
        first.seal()
    assert content(tmp_path / spec_of().name) == content(write(tmp_path / "alone"))


def test_writers_with_other_images_are_refused(tmp_path: Path) -> None:
    with writer_of(tmp_path, Part(index=0, count=2)) as first:
        first.plan(IDS)
        with writer_of(tmp_path, Part(index=1, count=2)) as second, pytest.raises(CacheError, match="another process"):
            second.plan(MANY)


def test_records_go_into_the_manifest_ordered_by_shard(tmp_path: Path) -> None:
    cache = tmp_path / spec_of().name
    with writer_of(tmp_path) as writer:
        plans = writer.plan(IDS)
        for plan in reversed(plans):
            commit(writer, plan)
        assert len((cache / MANIFEST).read_bytes().splitlines()) == 1
        assert list(read_manifest(cache).shards) == [0, 1, 2]
        writer.seal()
    assert not (cache / COMMITS).exists()
    assert [json.loads(line)["index"] for line in (cache / MANIFEST).read_bytes().splitlines()[1:]] == [0, 1, 2]
    assert content(cache) == content(write(tmp_path / "in order"))


def test_a_manifest_of_an_earlier_version_that_was_cut_off_is_read_and_mended(tmp_path: Path) -> None:
    cache = write(tmp_path)
    whole = content(cache)
    lines = (cache / MANIFEST).read_bytes().splitlines(keepends=True)
    old = lines[0].replace(b'"format":2', b'"format":1')
    old = _with_crc(old[: old.rindex(b',"crc32c"')] + b"}")
    (cache / MANIFEST).write_bytes(b"".join([old, *lines[1:-1]]) + lines[-1][:30])
    (cache / "SEALED.json").unlink()
    assert list(read_manifest(cache).shards) == [0, 1]
    write(tmp_path)
    assert content(cache) == whole


def test_a_replaced_shard_keeps_the_seal(tmp_path: Path) -> None:
    cache = write(tmp_path)
    manifest = read_manifest(cache)
    replace_shards(cache, [manifest.shards[1]])
    assert is_sealed(cache, read_manifest(cache))
    assert content(cache) == content(write(tmp_path / "other"))


def test_what_killed_writers_left_behind_is_removed(tmp_path: Path) -> None:
    cache = write(tmp_path, IDS[:4], seal=False)
    (cache / "partial").mkdir(exist_ok=True)
    (cache / "partial" / "host-1-0").write_bytes(b"half a shard")
    (cache / COMMITS).mkdir(exist_ok=True)
    (cache / COMMITS / ".1.json.99.tmp").write_bytes(b"half a record")
    shard_path(cache, 1).parent.mkdir(parents=True)
    shard_path(cache, 1).write_bytes(b"a shard without a record")
    write(tmp_path)
    assert content(cache) == content(write(tmp_path / "clean"))


def test_eight_bits_lose_what_was_recorded(tmp_path: Path) -> None:
    cache = write(tmp_path, dtype="int8")
    manifest = read_manifest(cache)
    assert manifest.header.quantization == SCALES
    values_BND = np.stack([values_of(image) for image in GOOD])
    codes_BND = np.stack([tokens_of(image, "int8") for image in GOOD])
    lost_BND = SCALES.decode(codes_BND).astype(np.float64) - values_BND
    expected = np.sqrt(np.square(lost_BND).sum() / np.square(values_BND, dtype=np.float64).sum())
    assert manifest.error.relative == pytest.approx(expected, rel=1e-6)
    assert 0.004 < manifest.error.relative < 0.02
    assert manifest.error.values == values_BND.size
    assert manifest.error.clipped == 0


def test_scales_do_not_let_a_huge_channel_spoil_the_others() -> None:
    tokens_BND = np.random.default_rng(0).standard_normal((8, 50, 6)).astype(np.float32)
    tokens_BND[..., 2] += 300
    scales = calibrate(tokens_BND)
    codes_BND = scales.encode(tokens_BND)
    error_BND = np.abs(scales.decode(codes_BND) - tokens_BND)
    assert error_BND.max() <= scales.scale_D.max() * 0.51
    assert scales.scale_D.max() < 0.06
    assert scales.error(tokens_BND, codes_BND).clipped == 0
    assert scales.error(tokens_BND + 50, scales.encode(tokens_BND + 50)).clipped == tokens_BND.size
    assert Quantization.from_dict(json.loads(json.dumps(scales.to_dict()))) == scales


@pytest.mark.parametrize(
    ("dtype", "codec"), [("int8", "crc32c"), ("int8", "blosc"), ("bfloat16", "blosc"), ("float16", "blosc")]
)
def test_zarr_python_writes_the_same_shards_of_every_profile(tmp_path: Path, dtype: DType, codec: Codec) -> None:
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec

    ours = write(tmp_path, GOOD, dtype, codec=codec)
    tokens_BND = np.stack([tokens_of(image, dtype) for image in GOOD])
    item = tokens_BND.itemsize
    blosc = [BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=item, blocksize=0)]
    theirs = zarr.create_array(
        tmp_path / "theirs.zarr",
        shape=tokens_BND.shape,
        chunks=(1, 6, 4),
        shards=(SLOTS, 6, 4),
        dtype=tokens_BND.dtype,
        compressors=[*(blosc if codec == "blosc" else []), Crc32cCodec()],
        filters=None,
        fill_value=0,
        config={"write_empty_chunks": True},
    )
    for start in range(0, len(GOOD), SLOTS):
        theirs[start : start + SLOTS] = tokens_BND[start : start + SLOTS]
    for index in range(3):
        their_shard = tmp_path / "theirs.zarr" / "c" / str(index) / "0" / "0"
        assert their_shard.read_bytes() == shard_path(ours, index).read_bytes()
    group = zarr.open_group(ours / "tokens.zarr", mode="r")
    np.testing.assert_array_equal(group["tokens"][:], tokens_BND)
    if dtype == "int8":
        np.testing.assert_array_equal(group["scale"][:], SCALES.scale_D)
        np.testing.assert_array_equal(group["offset"][:], SCALES.offset_D)


def test_a_damaged_record_costs_its_own_shard_only(tmp_path: Path) -> None:
    cache = write(tmp_path, MANY, seal=False, stop_after=3)
    for content_of_it in (b"", b"{}", (cache / COMMITS / "1.json").read_bytes()[:-9]):
        (cache / COMMITS / "1.json").write_bytes(content_of_it)
        manifest = read_manifest(cache)
        assert (list(manifest.shards), manifest.damaged) == ([0, 2], ("1.json",))
    assert find_rubbish(tmp_path, older_than_s=0).rubbish[0].kind != "shard"
    assert content(write(tmp_path, MANY)) == content(write(tmp_path / "clean", MANY))


def test_a_manifest_that_is_newer_than_a_record_wins(tmp_path: Path) -> None:
    cache = write(tmp_path, MANY)
    whole = content(cache)
    old = json.dumps({"index": 1}).encode()
    (cache / COMMITS).mkdir()
    record = replace(read_manifest(cache).shards[1], digest="0" * 64)
    (cache / COMMITS / "1.json").write_bytes(shard_line(record))
    (cache / COMMITS / "2.json").write_bytes(old)
    assert read_manifest(cache).shards[1].digest != "0" * 64
    assert open_cache(cache, allow_partial=True).sealed
    write(tmp_path, MANY)
    assert content(cache) == whole


def test_a_damaged_last_line_of_the_manifest_is_damage(tmp_path: Path) -> None:
    cache = write(tmp_path, MANY)
    (cache / "SEALED.json").unlink()
    lines = (cache / MANIFEST).read_bytes().splitlines(keepends=True)
    (cache / MANIFEST).write_bytes(b"".join(lines[:-1]) + lines[-1].replace(b"shard", b"shord"))
    with pytest.raises(CacheCorruptError, match="line 9 does not match its checksum"):
        read_manifest(cache)


def test_reading_beside_a_writer_that_seals_is_never_called_damage(tmp_path: Path) -> None:
    cache = write(tmp_path, MANY[:4])
    stop = threading.Event()
    wrong: list[str] = []

    def read() -> None:
        while not stop.is_set():
            try:
                open_cache(cache, allow_partial=True)
            except CacheCorruptError as error:
                wrong.append(str(error))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for count in range(5, len(MANY)):
        write(tmp_path, MANY[:count])
    stop.set()
    for reader in readers:
        reader.join()
    assert wrong == []


def test_tables_that_two_processes_add_to_lose_nothing(tmp_path: Path) -> None:
    def add(first: int) -> None:
        for number in range(first, first + 40):
            ImageTable.merge(tmp_path, "photos", [ImageEntry(key=f"{number}", id=f"{number:064x}", width=1, height=1)])

    threads = [threading.Thread(target=add, args=(first,)) for first in (0, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ImageTable.open(tmp_path, "photos")) == 80


def test_scales_that_do_not_fit_are_told_from_those_that_do() -> None:
    dice = np.random.default_rng(0)
    tokens_BND = dice.standard_normal((64, 50, 6)).astype(np.float32)
    scales = calibrate(tokens_BND)
    assert scales.error(tokens_BND, scales.encode(tokens_BND)).fits
    wider_BND = tokens_BND * 3
    assert not scales.error(wider_BND, scales.encode(wider_BND)).fits
