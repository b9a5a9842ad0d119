"""Does a verification find whatever is wrong with a cache, name it, and say what is in it otherwise?"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from cache_samples import (
    BROKEN,
    GOOD,
    IDS,
    SCALES,
    SHAPE,
    SLOTS,
    content,
    flip,
    shard_path,
    spec_of,
    values_of,
    write,
)

from vlmx.cache_specs import audit
from vlmx.cache_specs.audit import read_runs, verify, wrong_metadata
from vlmx.cache_specs.compare import choose, compare, distance_of
from vlmx.cache_specs.ids import ImageEntry, ImageTable, image_id
from vlmx.cache_specs.layout import ARRAY, GROUP, PROVENANCE
from vlmx.cache_specs.manifest import MANIFEST, SEAL, read_manifest
from vlmx.cache_specs.places import LocalPlace, place_of
from vlmx.cache_specs.spec import Codec, DType
from vlmx.cache_specs.survey import info, survey
from vlmx.cache_specs.token_files import TokenFiles, Wanted
from vlmx.cache_specs.writer import CacheWriter, Part
from vlmx.errors import CacheCorruptError, CacheError

CHUNK = 6 * 4 * 2 + 4  # float16 tokens of one image, and their checksum


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return write(tmp_path / "caches")


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("dtype", "codec"), [("float16", "crc32c"), ("int8", "crc32c"), ("bfloat16", "blosc")])
def test_a_sound_cache_passes(tmp_path: Path, dtype: DType, codec: Codec, full: bool) -> None:
    report = verify(write(tmp_path, dtype=dtype, codec=codec), full=full)
    assert report.ok
    assert (report.shards, report.images, report.failed, report.sealed) == (3, 9, 1, True)
    assert report.bytes == sum(shard_path(Path(report.place.url), index).stat().st_size for index in range(3))


def test_damage_is_named_by_shard_image_and_offset(cache: Path) -> None:
    flip(shard_path(cache, 0), 2 * CHUNK + 5)
    assert verify(cache, full=False).ok
    (damage,) = verify(cache, full=True).damaged.values()
    assert (damage.index, damage.key) == (0, "tokens.zarr/tokens/c/0/0/0")
    assert damage.why == "1 of its images do not match their checksums"
    assert damage.images == {IDS[2]: 2 * CHUNK}


@pytest.mark.parametrize("codec", ["crc32c", "blosc"])
def test_every_flipped_byte_is_found_and_only_its_image_named(tmp_path: Path, codec: Codec) -> None:
    cache = write(tmp_path, codec=codec)
    path = shard_path(cache, 1)
    sound = path.read_bytes()
    index_at = len(sound) - 16 * SLOTS - 4
    named = set()
    for position in range(len(sound)):
        flip(path, position)
        (damage,) = verify(cache, full=True).damaged.values()
        assert damage.index == 1
        if position < index_at:
            ((image, offset),) = damage.images.items()
            named.add(image)
            assert offset is not None
            assert offset <= position
        else:  # the index: nothing says which images are meant
            assert set(damage.images) == {image for image in IDS[4:8] if image != BROKEN}
        path.write_bytes(sound)
    assert named == {image for image in IDS[4:8] if image != BROKEN}
    assert verify(cache, full=True).ok


def test_quick_finds_sizes_indices_and_missing_files(cache: Path) -> None:
    flip(shard_path(cache, 0), -10)
    os.truncate(shard_path(cache, 1), 100)
    shard_path(cache, 2).unlink()
    damaged = verify(cache, full=False).damaged
    assert damaged[0].why == "its index does not match its checksum"
    assert damaged[1].why == f"it is 100 bytes, {3 * CHUNK + 16 * SLOTS + 4} were written"
    assert damaged[2].why == "it does not exist"
    assert damaged[2].images == {IDS[8]: 0, IDS[9]: CHUNK}


def test_a_whole_shard_of_another_cache_is_found(tmp_path: Path, cache: Path) -> None:
    """Its checksums are all right, its digest is not."""
    other = write(tmp_path / "other", list(reversed(GOOD)))
    shutil.copy(shard_path(other, 0), shard_path(cache, 0))
    assert verify(cache, full=False).ok
    (damage,) = verify(cache, full=True).damaged.values()
    assert damage.why == "its digest is not the one in the manifest"


def test_a_shard_with_another_image_missing_is_found(tmp_path: Path, cache: Path) -> None:
    other = write(tmp_path / "other", [*IDS[:4], BROKEN, IDS[4], *IDS[6:]])
    shutil.copy(shard_path(other, 1), shard_path(cache, 1))
    assert verify(cache, full=False).damaged[1].why == "slot 0 is absent, against the manifest"


def test_pieces_are_bounded_and_every_byte_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = write(tmp_path)
    monkeypatch.setattr(audit, "PIECE_BYTES", 2 * CHUNK + 1)
    read: list[tuple[str, int, int]] = []
    files = type(place_of(cache).token_files())
    fetch = files.fetch

    def counting(self: TokenFiles, wanted: Sequence[Wanted]) -> None:
        read.extend((one.key, one.offset, one.length) for one in wanted)
        fetch(self, wanted)

    monkeypatch.setattr(files, "fetch", counting)
    assert verify(cache, full=True, threads=2).ok
    for index in range(3):
        mine = sorted((offset, length) for key, offset, length in read if f"/{index}/0/0" in key)
        position = 0
        for offset, length in mine:
            assert offset == position
            assert length <= 2 * CHUNK + 1 or length == 16 * SLOTS + 4
            position += length
        assert position == shard_path(cache, index).stat().st_size


def test_a_seal_of_other_shards_is_a_problem(cache: Path) -> None:
    seal = json.loads((cache / SEAL).read_text())
    (cache / SEAL).write_text(json.dumps({**seal, "images": 10}))
    report = verify(cache, full=False)
    assert not report.ok
    assert "SEALED.json and manifest.jsonl describe different shards" in report.problems[0]


def test_metadata_that_zarr_needs_is_checked(tmp_path: Path) -> None:
    cache = write(tmp_path, dtype="int8")
    array = cache / ARRAY / "zarr.json"
    array.write_text(json.dumps(json.loads(array.read_text())))  # laid out in another way: no difference
    assert verify(cache, full=False).ok
    flip(cache / GROUP / "scale" / "c" / "0", 1)
    (cache / GROUP / "offset" / "zarr.json").unlink()
    array.write_text(array.read_text().replace("10", "11"))
    report = verify(cache, full=False)
    assert not report.ok
    assert report.metadata == {
        f"{ARRAY}/zarr.json": "it does not describe what the manifest says",
        f"{GROUP}/scale/c/0": "it does not describe what the manifest says",
        f"{GROUP}/offset/zarr.json": "it does not exist",
    }
    assert wrong_metadata(LocalPlace(cache), read_manifest(cache)) == report.metadata
    (cache / SEAL).unlink()  # its length may be that of an earlier moment, but no file may be gone
    assert verify(cache, full=False).metadata == {f"{GROUP}/offset/zarr.json": "it does not exist"}


def test_an_unfinished_cache_is_verified_as_far_as_it_is(tmp_path: Path) -> None:
    report = verify(write(tmp_path, stop_after=2), full=True)
    assert report.ok
    assert (report.shards, report.sealed) == (2, False)


def test_a_torn_line_of_provenance_is_shown_as_such(cache: Path) -> None:
    with open(cache / PROVENANCE, "a") as file:
        file.write('{"time": "2026')
    runs = read_runs(cache)
    assert runs[0]["command"] == "test"
    assert runs[1] == {"unreadable": '{"time": "2026'}


def test_ls_has_a_line_for_every_cache_whatever_its_state(tmp_path: Path, cache: Path) -> None:
    root = cache.parent
    write(root, dtype="bfloat16", codec="blosc", stop_after=1)
    damaged = write(root, dtype="int8")
    flip(damaged / MANIFEST, 40)
    future = write(root, dtype="float32")
    _rewrite_header(future, format=99)
    (root / "vit-s-in21k@32x48-0123456789ab").mkdir()
    (root / "photos").mkdir()
    lines = {line.name: line for line in survey(root)}
    assert len(lines) == 5
    sound = lines.pop(cache.name)
    assert (sound.images, sound.failed, sound.dtype, sound.sealed, sound.problem) == (9, 1, "float16", True, "")
    unfinished = lines.pop(spec_of("bfloat16", codec="blosc").name)
    assert (unfinished.images, unfinished.codec, unfinished.sealed) == (4, "blosc", False)
    assert "line 1 does not match its checksum" in lines.pop(damaged.name).problem
    assert "it is format 99, this vlmx knows 1" in lines.pop(future.name).problem
    assert [line.problem for line in lines.values()] == ["it has no manifest.jsonl"]


def _rewrite_header(cache: Path, **changes: object) -> None:
    from vlmx.cache_specs.manifest import _line, _parse

    first, *rest = (cache / MANIFEST).read_bytes().splitlines(keepends=True)
    (cache / MANIFEST).write_bytes(_line({**(_parse(first) or {}), **changes}) + b"".join(rest))


def test_info_counts_data_sets_errors_and_writers(tmp_path: Path) -> None:
    cache = write(tmp_path, dtype="int8")
    ImageTable.merge(tmp_path, "all-there", _entries(GOOD[:3]))
    ImageTable.merge(tmp_path, "half", _entries([GOOD[0], image_id(b"stranger")]))
    (tmp_path / "datasets" / "half.stamps.jsonl").write_text("")
    (tmp_path / "datasets" / "torn.jsonl").write_text("{")
    found = info(cache)
    coverage = {data.dataset: (data.present, data.images) for data in found.datasets if not data.problem}
    assert coverage == {"all-there": (3, 3), "half": (1, 2)}
    assert [data.dataset for data in found.datasets if data.problem] == ["torn"]
    values = np.stack([values_of(image) for image in GOOD])
    lost = SCALES.decode(SCALES.encode(values)) - values
    assert found.error is not None
    assert found.error.relative == pytest.approx(np.linalg.norm(lost) / np.linalg.norm(values), rel=1e-5)
    assert found.disk_bytes is not None
    assert found.disk_bytes >= found.bytes > 0
    assert found.writers == ()
    with CacheWriter(tmp_path, spec_of("int8"), SHAPE, part=Part(index=0, count=2)):
        assert info(cache).writers == (f"process {os.getpid()} on {os.uname().nodename}",)
    assert info(cache).writers == ()


def _entries(ids: list[str]) -> list[ImageEntry]:
    return [ImageEntry(key=f"{number}.png", id=image, width=4, height=4) for number, image in enumerate(ids)]


def test_equal_caches_are_identical_and_their_copies_too(tmp_path: Path, cache: Path) -> None:
    found = compare(cache, write(tmp_path / "again"), sample=None)
    assert found.identical_bytes
    assert found.alike
    assert found.distance is not None
    assert (found.distance.images, found.distance.identical, found.distance.max_abs) == (9, 9, 0.0)


def test_other_images_in_another_order_are_compared_by_image(tmp_path: Path, cache: Path) -> None:
    stranger = image_id(b"stranger")
    other = write(tmp_path / "other", [stranger, *reversed(GOOD[2:])])
    found = compare(cache, other, sample=3)
    assert not found.alike
    assert not found.identical_bytes
    assert (found.only_first, found.only_second, found.common) == (tuple(GOOD[:2]), (stranger,), 7)
    assert found.distance is not None
    assert (found.distance.images, found.distance.identical) == (3, 3)


def test_another_dtype_is_another_spec_and_tokens_are_still_compared(tmp_path: Path, cache: Path) -> None:
    found = compare(cache, write(tmp_path / "other", dtype="int8"), sample=None)
    assert found.spec == ("dtype: float16, not int8",)
    assert not found.alike
    assert found.distance is not None
    values = np.stack([values_of(image) for image in GOOD])
    decoded = SCALES.decode(SCALES.encode(values))
    off = np.linalg.norm(decoded - values.astype(np.float16), axis=(1, 2))
    norms = np.maximum(np.linalg.norm(values.astype(np.float16).astype(np.float64), axis=(1, 2)), 1e-12)
    assert found.distance.relative == pytest.approx((off / norms).max(), rel=1e-3)


def test_distance_of_tokens() -> None:
    first = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
    second = np.array([[3.0, 4.5], [0.0, 0.0]], np.float32)
    found = distance_of(first, second, identical=False)
    assert (found.max_abs, found.relative) == (0.5, 0.1)
    assert found.cosine == pytest.approx((9 + 18) / (5 * np.hypot(3, 4.5)))
    assert distance_of(first, -first, identical=False).cosine == -1.0


def test_the_sample_is_the_same_whatever_the_order() -> None:
    ids = [hashlib.sha256(b"%d" % number).hexdigest() for number in range(100)]
    assert choose(ids, 5) == choose(reversed(ids), 5)
    assert len(set(choose(ids, 5))) == 5
    assert sorted(choose(ids, 1000)) == sorted(ids)


def test_damaged_tokens_are_no_difference_but_an_error(tmp_path: Path, cache: Path) -> None:
    other = write(tmp_path / "other")
    flip(shard_path(other, 0), 5)
    with pytest.raises(CacheCorruptError, match="shard 0"):
        compare(cache, other, sample=None)
    with pytest.raises(CacheError, match="is not a cache"):
        compare(cache, tmp_path, sample=None)


def test_a_verification_changes_nothing(cache: Path) -> None:
    before = content(cache)
    times = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    verify(cache, full=True)
    info(cache)
    assert content(cache) == before
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == times
