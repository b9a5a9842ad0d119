"""Is a cache on an object store the same as one on a disk: its bytes, its resuming, its errors, and what reads it?"""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from cache_samples import BROKEN, GOOD, IDS, SCALES, SHAPE, SLOTS, commit, content, flip, spec_of, tokens_of
from cache_samples import write as write_local
from object_process import Process
from PIL import Image
from s3_server import BUCKET, S3Server, slow_network, use_server

from vlmx import cli
from vlmx.cache_specs import audit, survey
from vlmx.cache_specs.catalog import find, list_caches
from vlmx.cache_specs.claims import GUARD
from vlmx.cache_specs.layout import PROVENANCE, shard_key
from vlmx.cache_specs.manifest import SEAL
from vlmx.cache_specs.object_store import bucket_of
from vlmx.cache_specs.places import Place, place_of
from vlmx.cache_specs.reader import TokenReader, open_cache
from vlmx.cache_specs.spec import Codec, DType
from vlmx.cache_specs.token_files import Wanted
from vlmx.cache_specs.token_source import TokenSource
from vlmx.cache_specs.writer import CacheWriter
from vlmx.errors import CacheCorruptError, CacheError, UnknownNameError

pytest.importorskip("obstore", reason="obstore is not installed")

from vlmx.cache_specs.object_files import GAP_BYTES_MAX, ObjectTokenFiles, _requests
from vlmx.cache_specs.object_place import ObjectPlace
from vlmx.cache_specs.pull import PulledTokenFiles, pull_through

NAME = spec_of().name
VIT = ("--backbone", "vit-mini-scenes", "--weights", "random:0")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> S3Server:
    return use_server(monkeypatch)


@pytest.fixture
def root(server: S3Server, request: pytest.FixtureRequest) -> str:
    return server.url(request.node.name.split("[")[0])


def fill(root: str, dtype: DType = "float16", codec: Codec = "crc32c") -> Place:
    """The sample cache, on the object store."""
    with CacheWriter(root, spec_of(dtype, codec=codec), SHAPE, slots=SLOTS, calibrate=lambda: SCALES) as writer:
        plans = writer.plan(IDS)
        writer.begin_run({"command": "test"}, plans)
        while share := writer.next_share():
            for plan in share:
                commit(writer, plan)
        assert writer.seal()
        return writer.place


def objects(place: Place, key: str = "") -> dict[str, bytes]:
    """Every object of a cache but those that differ from one extraction to the next."""
    found: dict[str, bytes] = {}
    for name in place.names(key):
        below = f"{key}/{name}".lstrip("/")
        if place.exists(below):
            found[below] = place.read(below)
        else:
            found |= objects(place, below)
    return {name: data for name, data in found.items() if name not in (PROVENANCE, GUARD)}


def good_tokens(dtype: DType = "float16") -> np.ndarray:
    return np.stack([tokens_of(image, dtype) for image in GOOD])


@pytest.mark.parametrize(
    ("dtype", "codec"), [("float16", "crc32c"), ("bfloat16", "blosc"), ("int8", "crc32c"), ("float32", "crc32c")]
)
def test_the_bytes_are_those_of_a_local_cache(dtype: DType, codec: Codec, root: str, tmp_path: Path) -> None:
    place = fill(root, dtype, codec)
    assert objects(place) == content(write_local(tmp_path, dtype=dtype, codec=codec))
    reader = open_cache(place)
    order = [*reversed(GOOD), *GOOD[:4]]
    expected = np.concatenate([good_tokens(dtype)[::-1], good_tokens(dtype)[:4]])
    np.testing.assert_array_equal(reader.read(order), expected)
    with pytest.raises(CacheError, match="1 of 1 images are not in cache"):
        reader.read([BROKEN])


def test_other_libraries_read_it(root: str) -> None:
    import zarr
    from obstore.store import S3Store
    from zarr.storage import ObjectStore

    place = fill(root)
    store = S3Store(BUCKET, prefix=place.url.removeprefix(f"s3://{BUCKET}/"), client_options={"allow_http": True})
    group = zarr.open_group(ObjectStore(store, read_only=True), path="tokens.zarr", mode="r")
    rows = [row for row, image in enumerate(IDS) if image != BROKEN]
    np.testing.assert_array_equal(np.stack([group["tokens"][row] for row in rows]), good_tokens())


def test_names_and_urls_find_it(root: str, server: S3Server, tmp_path: Path) -> None:
    place = fill(root)
    assert list_caches(root) == [NAME]
    for where, text in (
        (root, NAME),
        (root, "vit-s"),
        (tmp_path, place.url),
        (tmp_path, f"{root}/vit-s"),
        (tmp_path, place),
    ):
        assert find(where, text) == place
    web = place_of(f"{server.http}/{root.rsplit('/', 1)[1]}")
    assert find(web, NAME) == find(tmp_path, web.child(NAME).url) == web.child(NAME)
    with pytest.raises(UnknownNameError):
        find(root, "vit-x")
    with pytest.raises(CacheError, match=r"is not a cache"):
        find(tmp_path, f"{root}/nothing")


def test_a_killed_extraction_goes_on(root: str, tmp_path: Path) -> None:
    with Process("write", root, 0, 1, 60) as process:
        assert [process.hear(), process.hear()] == ["begun", "committed"]
        process.send(signal.SIGKILL)
        process.popen.wait()
    place = place_of(root).child(NAME)
    assert not place.exists(SEAL)
    with pytest.raises(CacheError, match="has not come to its end"):
        open_cache(place)
    assert len(open_cache(place, allow_partial=True)) == SLOTS
    with Process("write", root, 0, 1, 0) as process:
        assert [process.hear() for _ in range(4)] == ["begun", "committed", "committed", "sealed"]
    assert objects(place) == content(write_local(tmp_path))


def test_a_second_writer_is_refused(root: str, tmp_path: Path) -> None:
    with Process("write", root, 0, 1, 1) as first:
        assert first.hear() == "begun"
        with Process("write", root, 0, 1, 0) as second:
            said = second.hear()
        assert said.startswith(
            f"refused: another process is writing {NAME}; it is held by process {first.popen.pid} on"
        )
        assert [first.hear() for _ in range(4)] == ["committed", "committed", "committed", "sealed"]
    assert objects(place_of(root).child(NAME)) == content(write_local(tmp_path))


def test_several_processes_share_the_work_and_one_dies(root: str, tmp_path: Path) -> None:
    with Process("write", root, 0, 2, 60) as first, Process("write", root, 1, 2, 0.2) as second:
        assert [first.hear(), first.hear()] == ["begun", "committed"]
        assert second.hear() == "begun"
        first.send(signal.SIGKILL)
        first.popen.wait()
        said = ""
        while said not in ("sealed", "left to others"):
            said = second.hear()
    if said == "left to others":  # it was through before the first one died
        with Process("write", root, 0, 2, 0) as third:
            while said != "sealed":
                said = third.hear()
    assert objects(place_of(root).child(NAME)) == content(write_local(tmp_path))


def test_damage_is_named(root: str, tmp_path: Path) -> None:
    place = fill(root)
    key = shard_key(1)
    whole = place.read(key)
    damaged = {
        "checksum": whole[:50] + bytes([whole[50] ^ 1]) + whole[51:],
        "bytes": whole[:-5],
        "index": whole[:-9] + b"\1\1\1\1" + whole[-5:],
    }
    for why, data in damaged.items():
        place.write(key, data)
        with pytest.raises(CacheCorruptError, match=f"shard 1 of cache {NAME} is damaged.*{why}"):
            open_cache(place).read([IDS[4], IDS[6]])
    place.write(key, whole)
    reader = open_cache(place)
    reader.read([IDS[4]])
    place.write(key, whole[:60])
    with pytest.raises(CacheCorruptError, match="it ends"):
        reader.read([IDS[6], IDS[7]])
    place.remove(key)
    for broken in (reader, open_cache(place)):
        with pytest.raises(CacheCorruptError, match="it does not exist"):
            broken.read([IDS[6]])


def test_sealed_caches_are_read_over_the_web(root: str, server: S3Server) -> None:
    place = fill(root)
    url = f"{server.http}/{root.rsplit('/', 1)[1]}/{NAME}"
    np.testing.assert_array_equal(open_cache(url).read(GOOD), good_tokens())
    assert (survey.info(url).images, survey.info(url).sealed) == (len(GOOD), True)
    assert audit.verify(url, full=True).ok
    place.remove(SEAL)
    with pytest.raises(CacheError, match=r"cannot be listed.*only a sealed cache"):
        open_cache(url)


def test_pieces_that_lie_together_come_together() -> None:
    def want(key: str, offset: int, length: int) -> Wanted:
        return Wanted(key, offset, (memoryview(bytearray(length)),))

    far = 1100 + GAP_BYTES_MAX
    wanted = [
        want("b", 0, 10),
        want("a", 1000, 100),
        want("a", far + 1, 10),
        want("a", 0, 900),
        want("a", far - 300, 5),
    ]
    assert list(_requests(wanted)) == [[3, 1, 4, 2], [0]]
    assert list(_requests([want("a", 0, 10), want("a", 11 + GAP_BYTES_MAX, 10)])) == [[0], [1]]
    assert list(_requests([want("a", 0, 9 << 20), want("a", 9 << 20, 9 << 20)])) == [[0], [1]]
    assert list(_requests([])) == []


def test_reads_wait_for_one_request_and_not_for_many(
    root: str, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine images of three shards over a slow line: the indices, and then all images at once."""
    import zarr
    from obstore.store import S3Store
    from zarr.storage import ObjectStore

    place = fill(root)
    delay_s = 0.2
    with slow_network(server.endpoint, delay_s) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        bucket_of.cache_clear()
        reader = open_cache(place.url)
        reader.read(GOOD)
        started = time.monotonic()
        np.testing.assert_array_equal(reader.read(GOOD[::-1]), good_tokens()[::-1])
        ours_s = time.monotonic() - started
        store = S3Store(BUCKET, prefix=place.url.removeprefix(f"s3://{BUCKET}/"), client_options={"allow_http": True})
        array = zarr.open_group(ObjectStore(store, read_only=True), path="tokens.zarr", mode="r")["tokens"]
        started = time.monotonic()
        for row, image in enumerate(IDS):
            if image != BROKEN:
                array[row]
        theirs_s = time.monotonic() - started
    assert delay_s < ours_s < 3 * delay_s
    assert theirs_s > 3 * ours_s


def read_until(source: TokenSource, folder: Path, copies: int) -> None:
    """Read everything until so many shards are copied."""
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*/*.shard"))) < copies:
        np.testing.assert_array_equal(source.read(GOOD), good_tokens())
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_shards_come_to_the_disk(root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = fill(root)
    source = TokenReader(pull_through(place, tmp_path))
    read_until(source, tmp_path, 3)
    assert capsys.readouterr().err.count("are copied to") == 1
    assert sorted(tmp_path.glob("*/*.shard")) == sorted(tmp_path.glob("*/*"))
    assert {path.read_bytes() for path in tmp_path.glob("*/*.shard")} == {place.read(shard_key(i)) for i in range(3)}
    place.remove_tree("tokens.zarr")
    np.testing.assert_array_equal(source.read(GOOD[::-1]), good_tokens()[::-1])


def test_a_damaged_copy_is_made_again(root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = fill(root)
    read_until(TokenReader(pull_through(place, tmp_path)), tmp_path, 3)
    good = {path: path.read_bytes() for path in tmp_path.glob("*/*.shard")}
    one, two, three = good
    flip(one, 60)
    two.write_bytes(b"")
    three.unlink()
    source = open_cache(place, pull=tmp_path)
    np.testing.assert_array_equal(source.read(GOOD), good_tokens())
    assert "is damaged: it is deleted and made again" in capsys.readouterr().err
    read_until(source, tmp_path, 3)
    assert {path: path.read_bytes() for path in tmp_path.glob("*/*.shard")} == good


def test_processes_share_copies(root: str, tmp_path: Path) -> None:
    place = fill(root)
    with Process("pull", place.url, tmp_path, 10) as one, Process("pull", place.url, tmp_path, 10) as two:
        assert (one.hear(), two.hear()) == ("read", "read")
    assert len(list(tmp_path.glob("*/*.shard"))) == 3


def test_a_damaged_shard_is_not_copied(root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = fill(root)
    whole = place.read(shard_key(1))
    place.write(shard_key(1), whole[:60] + bytes([whole[60] ^ 1]) + whole[61:])
    TokenReader(pull_through(place, tmp_path)).read([IDS[4]])  # the damage is in another image
    wait_for_note("the image at byte 52 does not match its checksum", capsys)
    assert not list(tmp_path.glob("*/*.shard"))


def test_a_full_disk_keeps_reads_remote(root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = fill(root)
    assert isinstance(place, ObjectPlace)
    files = PulledTokenFiles(place, ObjectTokenFiles(place), tmp_path, reserve_bytes=1 << 60)
    key, buffer = shard_key(0), bytearray(8)
    files.fetch([Wanted(key, 0, (memoryview(buffer),))])
    assert buffer == place.read(key)[:8]
    wait_for_note("left", capsys)
    assert not list(tmp_path.glob("*/*.shard"))
    files.close()


def wait_for_note(why: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The line that says that shards are not copied any more."""
    said, deadline = "", time.monotonic() + 60
    while "are copied, they are read remotely" not in said and time.monotonic() < deadline:
        time.sleep(0.02)
        said += capsys.readouterr().err
    assert f"no more shards of {NAME}" in said
    assert why in said


def test_commands_take_urls(root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def vlmx(*arguments: str) -> str:
        with suppress(SystemExit):
            cli.main(list(arguments))
        return capsys.readouterr().out.strip()

    for number in range(3):
        Image.new("RGB", (90, 60), (80 * number, 9, 9)).save(tmp_path / f"{number}.png")
    given = ["extract", *VIT, "--data", str(tmp_path), "--name", "photos", "--out"]
    name = vlmx(*given, root)
    assert vlmx("list", "caches", "--root", root) == name
    assert name in vlmx("cache", "ls", "--root", root)
    assert f"{root}/{name}" in vlmx("cache", "info", f"{root}/{name}")
    assert "every byte read" in vlmx("cache", "verify", "vit-mini", "--full", "--root", root)
    assert vlmx(*given, root) == name
    assert vlmx(*given, str(tmp_path / "caches")) == name
    remote, local = open_cache(name, root), open_cache(name, tmp_path / "caches")
    np.testing.assert_array_equal(remote.read(sorted(remote.ids)), local.read(sorted(remote.ids)))
    assert not list(Path.cwd().glob("s3:*"))
