"""Is what comes out of a cache what went in, whatever happened in between?"""

from __future__ import annotations

import os
import pickle
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
from cache_samples import BROKEN, GOOD, IDS, SHAPE, SLOTS, ZERO, content, shard_path, spec_of, tokens_of, write

from vlmx.cache_specs.audit import read_runs
from vlmx.cache_specs.catalog import find, list_caches
from vlmx.cache_specs.ids import image_id
from vlmx.cache_specs.places import LocalPlace
from vlmx.cache_specs.reader import open_cache
from vlmx.cache_specs.spec import DType, TokenShape
from vlmx.cache_specs.writer import CacheWriter
from vlmx.errors import (
    CacheError,
    SpecMismatchError,
    UnknownNameError,
    UsageError,
)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return write(tmp_path / "caches")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_any_order_with_duplicates(tmp_path: Path, dtype: DType) -> None:
    reader = open_cache(write(tmp_path, dtype=dtype))
    wanted = [IDS[9], IDS[0], IDS[9], ZERO, IDS[7]]
    expected_BND = np.stack([tokens_of(image, dtype) for image in wanted])
    for _ in range(2):  # the second time without comparing checksums
        read_BND = reader.read(wanted)
        assert read_BND.dtype == expected_BND.dtype
        np.testing.assert_array_equal(read_BND, expected_BND)
    out_BND = np.full((5, 6, 4), 7, dtype=reader.storage_dtype)
    assert reader.read(wanted, out_BND) is out_BND
    np.testing.assert_array_equal(out_BND, expected_BND)
    assert reader.read([]).shape == (0, 6, 4)
    assert (reader.num_tokens, reader.shape.grid, reader.logical_dtype, reader.sealed) == (6, (2, 3), dtype, True)
    assert list(reader.ids) == GOOD
    assert reader.failed == {BROKEN: "truncated"}


def test_bfloat16_becomes_float32_without_loss(tmp_path: Path) -> None:
    import torch

    reader = open_cache(write(tmp_path, dtype="bfloat16"))
    bits_BND = torch.from_numpy(reader.read(GOOD).view(np.int16))
    expected_BND = bits_BND.view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(reader.read_float32(GOOD), expected_BND)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_zarr_python_writes_the_same_shards_and_opens_ours(tmp_path: Path, dtype: DType) -> None:
    import zarr
    from zarr.codecs import Crc32cCodec

    ours = write(tmp_path, GOOD, dtype)
    tokens_BND = np.stack([tokens_of(image, dtype) for image in GOOD])
    theirs = zarr.create_array(
        tmp_path / "theirs.zarr",
        shape=tokens_BND.shape,
        chunks=(1, 6, 4),
        shards=(SLOTS, 6, 4),
        dtype=tokens_BND.dtype,
        compressors=[Crc32cCodec()],
        filters=None,
        fill_value=0,
        config={"write_empty_chunks": True},
    )
    for start in range(0, len(GOOD), SLOTS):
        theirs[start : start + SLOTS] = tokens_BND[start : start + SLOTS]
    for index in range(3):  # the last shard holds one image
        assert (tmp_path / "theirs.zarr" / "c" / str(index) / "0" / "0").read_bytes() == shard_path(
            ours, index
        ).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(ours / "tokens.zarr", mode="r")
        array = group["tokens"]
        np.testing.assert_array_equal(array[:], tokens_BND)
    assert array.attrs["vlmx:logical_dtype"] == dtype
    assert array.metadata.dimension_names == ("image", "token", "channel")
    assert group.attrs["vlmx"]["backbone"] == "vit-s-in21k"


def test_images_are_encoded_once_and_failed_ones_never_again(tmp_path: Path) -> None:
    write(tmp_path, IDS[:6])
    with CacheWriter(tmp_path, spec_of(), SHAPE) as writer:
        assert writer.images_per_shard == SLOTS
        assert writer.pending([IDS[7], *IDS[:6], IDS[7]]) == [IDS[7]]
        assert [(plan.index, len(plan.ids)) for plan in writer.plan(IDS)] == [(2, 4)]
    cache = write(tmp_path)
    reader = open_cache(cache)
    np.testing.assert_array_equal(reader.read(GOOD), np.stack([tokens_of(image) for image in GOOD]))
    assert [run["shards"] for run in read_runs(cache)] == [[[0, 1]], [[2, 2]]]


def test_a_second_extraction_of_the_same_images_changes_nothing(cache: Path) -> None:
    before = content(cache)
    write(cache.parent)
    assert content(cache) == before


def test_a_cache_without_a_seal_is_refused_unless_asked_for(tmp_path: Path) -> None:
    cache = write(tmp_path, seal=False)
    with pytest.raises(CacheError, match="goes on where it stopped"):
        open_cache(cache)
    assert not open_cache(cache, allow_partial=True).sealed


def test_committing_to_a_sealed_cache_opens_it_again(cache: Path) -> None:
    write(cache.parent, [*IDS, image_id(b"new")], seal=False)
    with pytest.raises(CacheError, match="has not come to its end"):
        open_cache(cache)


def test_missing_images_are_counted_and_the_command_named(cache: Path) -> None:
    reader = open_cache(cache)
    strangers = [image_id(b"stranger %d" % number) for number in range(5)]
    with pytest.raises(CacheError, match="6 of 7 images are not in cache") as caught:
        reader.require([BROKEN, *strangers, IDS[0], IDS[0]], data="photos/")
    assert strangers[0][:12] in caught.value.why
    assert "1 of them could not be decoded, e.g. truncated" in caught.value.why
    assert "vlmx extract --backbone vit-s-in21k --res 32x48 --weights random:0 --data photos/" in caught.value.fix
    with pytest.raises(CacheError, match="1 of 1 images"):
        reader.read([strangers[0]])
    with pytest.raises(CacheError) as caught:
        reader.require([BROKEN], data="photos/")
    assert caught.value.fix.startswith("leave them out, or put readable files in their place and give vlmx extract")


def test_names_prefixes_paths_and_near_misses(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="no cache exists yet"):
        find(tmp_path, "vit-s")
    cache = write(tmp_path)
    assert list_caches(tmp_path) == [cache.name]
    for text in (cache.name, "vit-s-in21k@32", "vit-s", str(cache), cache):
        assert find(tmp_path, text) == LocalPlace(cache)
    with pytest.raises(UnknownNameError, match="did you mean 'vit-s-in21k@32x48'"):
        find(tmp_path, "vit-s-in1k@32")
    other = write(tmp_path, dtype="float32")
    with pytest.raises(CacheError, match="is more than one cache") as caught:
        find(tmp_path, "vit-s-in21k@32")
    assert cache.name in caught.value.why
    assert other.name in caught.value.why
    (tmp_path / "photos").mkdir()
    with pytest.raises(CacheError, match="is not a cache"):
        find(tmp_path, tmp_path / "photos")


def test_another_spec_is_refused_field_by_field(cache: Path) -> None:
    reader = open_cache(cache)
    reader.require_spec(spec_of())
    with pytest.raises(SpecMismatchError) as caught:
        reader.require_spec(spec_of("float32", "vit-b-in1k"))
    assert caught.value.why == "backbone: vit-s-in21k, not vit-b-in1k; dtype: float16, not float32"


def test_a_writer_refuses_a_folder_with_other_tokens(cache: Path) -> None:
    with pytest.raises(SpecMismatchError, match="grid"):
        CacheWriter(cache.parent, spec_of(), TokenShape(grid=(3, 2), dim=4))
    cache.rename(cache.with_name(spec_of("float32").name))
    with pytest.raises(SpecMismatchError, match="dtype: float16, not float32"):
        CacheWriter(cache.parent, spec_of("float32"), SHAPE)


def test_a_forked_process_reads_with_its_own_files(cache: Path) -> None:
    reader = open_cache(cache)
    reader.read(GOOD)
    reader._chunks._local._lock.acquire()  # as another thread may have done at the moment of the fork
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        same = np.array_equal(reader.read(GOOD), np.stack([tokens_of(image) for image in GOOD]))
        os._exit(0 if same else 1)
    reader._chunks._local._lock.release()
    assert os.waitpid(child, 0)[1] == 0
    np.testing.assert_array_equal(reader.read([IDS[0]])[0], tokens_of(IDS[0]))


def test_a_reader_can_be_sent_to_another_process(cache: Path) -> None:
    copy = pickle.loads(pickle.dumps(open_cache(cache)))
    np.testing.assert_array_equal(copy.read([IDS[8]])[0], tokens_of(IDS[8]))


def test_what_a_reader_cannot_fill_or_does_not_know_is_refused(cache: Path) -> None:
    reader = open_cache(cache)
    for out in (np.empty((3, 6, 4), np.float16), np.empty((2, 6, 4), np.float32), np.empty((2, 4, 6), np.float16).mT):
        with pytest.raises(ValueError, match="C-contiguous, is needed"):
            reader.read(IDS[:2], out)
    with pytest.raises(UsageError, match="verify is 'frist'"):
        open_cache(cache, verify="frist")  # type: ignore[arg-type]


def test_caches_that_differ_in_their_numbers_are_told_apart(tmp_path: Path) -> None:
    write(tmp_path)
    write(tmp_path, dtype="int8", codec="blosc")
    with pytest.raises(CacheError, match="is more than one cache") as caught:
        find(tmp_path, "vit-s")
    assert "(float16, last)" in caught.value.why
    assert "(int8, blosc, last)" in caught.value.why


def test_a_home_folder_and_a_trailing_slash_are_understood(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(cache.parent))
    assert find("~", cache.name + "/") == LocalPlace(cache)
