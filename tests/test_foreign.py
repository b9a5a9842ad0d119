"""Are Zarr arrays that somebody else wrote read, whatever their layout, and never wrongly?"""

from __future__ import annotations

import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from cache_samples import GOOD, IDS, flip, spec_of, tokens_of, write
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec

from vlmx.cache_specs import foreign
from vlmx.cache_specs.foreign import open_zarr
from vlmx.cache_specs.layout import ARRAY, shard_key
from vlmx.cache_specs.loader import TokenLoader
from vlmx.errors import CacheCorruptError, CacheError, SpecMismatchError

ROWS = 9
TOKENS: NDArray[Any] = np.random.default_rng(0).standard_normal((ROWS, 6, 4)).astype(np.float16)
CHUNKED: dict[str, dict[str, Any]] = {
    "one chunk for many images": {"chunks": (4, 6, 4), "compressors": None},
    "an image in several chunks": {"chunks": (1, 3, 2), "compressors": ZstdCodec()},
    "shards with zstd": {"chunks": (1, 6, 4), "shards": (4, 6, 4), "compressors": ZstdCodec()},
    "shards of several images a chunk": {"chunks": (2, 6, 4), "shards": (4, 6, 4), "compressors": Crc32cCodec()},
    "Zarr v2": {"chunks": (1, 6, 4), "zarr_format": 2},
}
OURS: dict[str, list[Any]] = {"crc32c": [Crc32cCodec()], "blosc": [BloscCodec(cname="zstd"), Crc32cCodec()]}


@pytest.fixture(params=["zarr-python", "tensorstore"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "tensorstore":
        pytest.importorskip("tensorstore")
    else:
        monkeypatch.setattr(foreign, "find_spec", lambda _: None)
    return str(request.param)


def store(path: Path, **layout: Any) -> Path:
    group = zarr.open_group(path, mode="w", zarr_format=layout.get("zarr_format", 3))
    array = group.create_array(
        "tokens", shape=TOKENS.shape, dtype=TOKENS.dtype, **{k: v for k, v in layout.items() if k != "zarr_format"}
    )
    array[:] = TOKENS
    return path


def store_ours(path: Path, behind: list[Any], *, index_location: str = "end") -> Path:
    """An array of our layout that zarr-python wrote, but for what is asked."""
    sharding = ShardingCodec(
        chunk_shape=(1, 6, 4),
        codecs=[BytesCodec(), *behind],
        index_location=index_location,  # type: ignore[arg-type]
    )
    group = zarr.open_group(path, mode="w")
    array = group.create_array(
        "tokens", shape=TOKENS.shape, chunks=(4, 6, 4), dtype=TOKENS.dtype, serializer=sharding, compressors=None
    )
    array[:] = TOKENS
    return path


def check(reader: foreign.ForeignReader) -> None:
    wanted = ["7", "0", "7", "8", "3"]
    np.testing.assert_array_equal(reader.read(wanted), TOKENS[[7, 0, 7, 8, 3]])
    out_BND = np.empty((5, 6, 4), np.float16)
    assert reader.read(wanted, out_BND) is out_BND
    np.testing.assert_array_equal(reader.read_float32(wanted), TOKENS[[7, 0, 7, 8, 3]].astype(np.float32))
    assert (len(reader), reader.shape.num_tokens, reader.shape.dim, reader.sealed) == (ROWS, 6, 4, True)
    assert (reader.logical_dtype, reader.parts) == ("float16", ())
    reader.announce(wanted)
    copy = pickle.loads(pickle.dumps(reader))
    np.testing.assert_array_equal(copy.read(wanted), out_BND)
    with TokenLoader(reader, [["1"], ["2", "3"]]) as loader:
        assert [len(batch) for batch in loader] == [1, 2]


@pytest.mark.parametrize("layout", CHUNKED.values(), ids=CHUNKED)
def test_other_layouts_go_through_a_library(tmp_path: Path, layout: dict[str, Any], library: str) -> None:
    reader = open_zarr(store(tmp_path / "some.zarr", **layout))
    assert reader.library == library
    check(reader)
    check(open_zarr(tmp_path / "some.zarr" / "tokens"))


def test_an_index_at_the_start_goes_through_a_library(tmp_path: Path, library: str) -> None:
    reader = open_zarr(store_ours(tmp_path / "some.zarr", [Crc32cCodec()], index_location="start"))
    assert reader.library == library
    check(reader)


@pytest.mark.parametrize("behind", OURS.values(), ids=OURS)
def test_our_layout_is_read_by_us_whoever_wrote_it(tmp_path: Path, behind: list[Any]) -> None:
    path = store_ours(tmp_path / "some.zarr", behind)
    reader = open_zarr(path)
    assert reader.library == "vlmx"
    check(reader)
    flip(path / "tokens/c/1/0/0", 8)
    with pytest.raises(CacheCorruptError, match="damaged") as caught:
        open_zarr(path).read(["0", "4"])
    assert caught.value.why == "shard 1: the checksum does not match for row 4"
    (path / "tokens/c/1/0/0").unlink()
    with pytest.raises(CacheCorruptError, match="damaged"):
        open_zarr(path).announce(["4"])


def test_damage_is_an_error_of_ours_whoever_finds_it(tmp_path: Path, library: str) -> None:
    path = store(tmp_path / "some.zarr", **CHUNKED["shards of several images a chunk"])
    flip(path / "tokens/c/0/0/0", 8)
    with pytest.raises(CacheCorruptError, match=r"some\.zarr/tokens is damaged"):
        open_zarr(path).read(["0"])


def test_the_manifest_of_a_cache_says_which_image_a_row_is(tmp_path: Path, library: str) -> None:
    """A cache whose array somebody packed with another codec."""
    cache = write(tmp_path, dtype="bfloat16")
    array = zarr.open_array(cache / ARRAY, mode="r")
    values, attributes = array[:], dict(array.attrs)
    packed = zarr.open_group(cache / "tokens.zarr", mode="a").create_array(
        "tokens", shape=values.shape, chunks=(1, 6, 4), dtype=values.dtype, overwrite=True, attributes=attributes
    )
    packed[:] = values
    reader = open_zarr(cache)
    assert (reader.library, reader.logical_dtype, reader.spec) == (library, "bfloat16", spec_of("bfloat16"))
    assert (reader.shape.grid, reader.name) == ((2, 3), cache.name)
    np.testing.assert_array_equal(
        reader.read([IDS[9], IDS[0]]), np.stack([tokens_of(image, "bfloat16") for image in (IDS[9], IDS[0])])
    )
    assert list(reader.ids) == GOOD
    with pytest.raises(CacheError, match="1 of 1 images are not in"):
        reader.read([IDS[5]])


def test_ids_and_spec_may_be_given(tmp_path: Path) -> None:
    path = store_ours(tmp_path / "some.zarr", [Crc32cCodec()])
    names = [f"image {row}" for row in range(ROWS)]
    reader = open_zarr(path, ids=names, spec=spec_of(), grid=(2, 3))
    assert (reader.spec, reader.shape.grid) == (spec_of(), (2, 3))
    np.testing.assert_array_equal(reader.read(["image 5"])[0], TOKENS[5])
    (tmp_path / "ids.txt").write_text("\n".join("abcdefghi") + "\n")
    np.testing.assert_array_equal(open_zarr(path, ids=tmp_path / "ids.txt").read(["b"])[0], TOKENS[1])
    with pytest.raises(CacheError, match="the ids do not fit") as caught:
        open_zarr(path, ids=["a", "b", "b"])
    assert caught.value.why == "2 different ids in 3 for 9 rows"
    with pytest.raises(SpecMismatchError, match="holds float16"):
        open_zarr(path, spec=spec_of("float32"))
    with pytest.raises(CacheError, match="has 6 tokens an image, a grid of"):
        open_zarr(path, grid=(2, 2))
    with pytest.raises(CacheError, match="nobody says which encoder made the tokens"):
        _ = open_zarr(path).spec
    with pytest.raises(CacheError, match="1 of 2 images of 'photos' are not in"):
        open_zarr(path).require(["3", "stranger"], data="photos")


def test_what_is_no_array_of_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="has no Zarr array 'tokens'"):
        open_zarr(tmp_path)
    path = store(tmp_path / "some.zarr", chunks=(1, 6, 4))
    with pytest.raises(CacheError, match="has no Zarr array 'features'"):
        open_zarr(path, "features")
    group = zarr.open_group(path, mode="a")
    group.create_array("flat", shape=(3, 4), dtype="float16")
    group.create_array("counts", shape=(3, 4, 5), dtype="int64")
    with pytest.raises(CacheError, match=r"is not \[image, token, channel\]"):
        open_zarr(path, "flat")
    with pytest.raises(CacheError, match="holds int64, which are no tokens"):
        open_zarr(path, "counts")


@pytest.mark.skipif(find_spec("tensorstore") is not None, reason="tensorstore reads bfloat16")
def test_bfloat16_of_another_layout_needs_tensorstore(tmp_path: Path) -> None:
    path = store(tmp_path / "some.zarr", chunks=(1, 6, 4))
    metadata = path / "tokens" / "zarr.json"
    metadata.write_text(metadata.read_text().replace('"float16"', '"bfloat16"'))
    with pytest.raises(CacheError, match="holds bfloat16, which zarr-python cannot read"):
        open_zarr(path)


def test_our_own_caches_open_as_arrays_of_others(tmp_path: Path) -> None:
    cache = write(tmp_path)
    reader = open_zarr(cache / "tokens.zarr")
    assert reader.library == "vlmx"
    np.testing.assert_array_equal(reader.read(["9"])[0], tokens_of(IDS[9]))
    assert (cache / shard_key(0)).is_file()
    with pytest.raises(CacheCorruptError, match="damaged"):
        reader.read(["5"])  # a row without tokens
