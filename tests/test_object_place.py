"""Does an object store keep what a cache needs of a place: whole objects, listings, claims, and clear errors?"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from object_process import Process
from s3_server import S3Server, slow_network, use_server

from vlmx.cache_specs.object_store import bucket_of
from vlmx.cache_specs.places import LocalPlace, Place, place_of
from vlmx.errors import BackendError, CacheError

pytest.importorskip("obstore", reason="obstore is not installed")

from vlmx.cache_specs.leases import LeaseClaims
from vlmx.cache_specs.object_place import ObjectPlace

RENEW_S, STALE_S = 0.4, 2.0


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> S3Server:
    return use_server(monkeypatch)


@pytest.fixture
def root(server: S3Server, request: pytest.FixtureRequest) -> str:
    return server.url(request.node.name)


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_a_place_keeps_files(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    place = place_of(tmp_path / "caches" if kind == "local" else request.getfixturevalue("root"))
    assert (place.names(), place.size("a"), place.exists("a")) == ([], None, False)
    with pytest.raises(FileNotFoundError):
        place.read("a")
    place.write("a", b"one")
    place.write("a", b"two")
    assert (place.read("a"), place.size("a")) == (b"two", 3)
    odd = "vit@64x64-0a+b/x y.json"
    place.write(odd, b"")
    assert (place.names(), place.names("vit@64x64-0a+b"), place.read(odd)) == (
        ["a", "vit@64x64-0a+b"],
        ["x y.json"],
        b"",
    )
    child = place.child("vit@64x64-0a+b")
    assert (child.name, child.parent, child.size("x y.json")) == ("vit@64x64-0a+b", place, 0)
    assert place_of(child.url) == child
    place.write("deep/er/b", b"b")
    place.write("deeper", b"c")
    place.remove_tree("deep")
    place.remove("a")
    place.remove("a")
    place.remove_tree("never was")
    assert (place.exists("deep/er/b"), place.read("deeper"), place.exists("a")) == (False, b"c", False)


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_a_stream_is_one_file_or_none(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    place = place_of(tmp_path if kind == "local" else request.getfixturevalue("root"))
    parts = [os.urandom(size) for size in (1, 7_000_001, 0, 13_000_000, 4)]
    assert place.write_stream("f", iter(parts)) == 20_000_006
    assert place.read("f") == b"".join(parts)

    def cut() -> Iterator[bytes]:
        yield bytes(18_000_000)
        raise KeyError("in the middle")

    for key in ("f", "g"):
        with pytest.raises(KeyError, match="in the middle"):
            place.write_stream(key, cut())
    assert place.read("f") == b"".join(parts)
    assert not place.exists("g")


def test_a_killed_upload_leaves_no_object(root: str) -> None:
    with Process("upload", root, 40, 60) as process:
        assert process.hear() == "half"
    assert place_of(root).names() == []


def test_an_upload_takes_little_memory(root: str) -> None:
    with Process("upload", root, 250, 0) as process:
        assert process.hear() == "half"
        assert int(process.hear()) < 160
    assert place_of(root).size("large") == 250 << 20


def test_one_of_many_writers_wins(root: str) -> None:
    place = ObjectPlace(root)
    won = []

    def compete(name: int) -> None:
        if place.write_if("x", b"%d" % name, seen):
            won.append(b"%d" % name)

    seen = None
    for round_ in range(3):
        threads = [threading.Thread(target=compete, args=(10 * round_ + number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won == [place.read("x")]
        version = place.version("x")
        assert version is not None
        seen, won = version.tag, []
    place.remove("x")
    assert place.write_if("x", b"", seen) is None


def test_claims_exclude_each_other(root: str) -> None:
    one, two = LeaseClaims(ObjectPlace(root)), LeaseClaims(ObjectPlace(root))
    with one.guard():
        assert (one.take(0), one.take(0), one.take(1), one.others(), one.job()) == (True, True, True, [], None)
        one.set_job({"shares": 2})
    with two.guard():
        assert (two.take(0), two.take(2), two.job()) == (False, True, {"shares": 2})
        assert [line.split(" (")[0] for line in two.others()] == [f"process {os.getpid()} on {os.uname().nodename}"]
    one.still_mine()
    with one.guard():
        one.drop(0)
    with two.guard():
        assert two.take(0)
        two.clear()
        assert two.job() is not None  # somebody else is there
    one.close()
    with two.guard():
        two.clear()
        assert two.job() is None
    two.close()
    assert ObjectPlace(root).names("writers") == []


def test_the_guard_is_held_by_one(root: str) -> None:
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        claims = LeaseClaims(ObjectPlace(root))
        for _ in range(3):
            with claims.guard():
                inside += 1
                most = max(most, inside)
                time.sleep(0.01)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_reports_reach_other_processes(root: str) -> None:
    one, two = (LeaseClaims(ObjectPlace(root), renew_s=0.1) for _ in range(2))
    for share, claims in enumerate((one, two)):
        with claims.guard():
            assert claims.take(share)
    one.report(5)
    two.report(7)
    deadline = time.monotonic() + 60
    while (one.reports(), two.reports()) != (12, 12) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (one.reports(), two.reports()) == (12, 12)
    one.close()
    two.close()


def test_a_dead_process_is_followed_at_once(root: str) -> None:
    claims = LeaseClaims(ObjectPlace(root))
    with Process("hold", root, 10, 60) as holder:
        assert holder.hear() == "taken"
        with claims.guard():
            assert not claims.take(0)
        holder.send(signal.SIGKILL)
        holder.popen.wait()
        with claims.guard():
            assert (claims.others(), claims.take(0)) == ([], True)
    claims.close()


def test_a_process_that_stood_still_must_stop(root: str) -> None:
    claims = LeaseClaims(ObjectPlace(root), renew_s=RENEW_S, stale_s=STALE_S)
    with Process("hold", root, RENEW_S, STALE_S) as holder:
        assert (holder.hear(), holder.ask()) == ("taken", "mine")
        time.sleep(STALE_S + 1.1)  # it is renewed meanwhile
        with claims.guard():
            assert not claims.take(0)
        holder.send(signal.SIGSTOP)
        with claims.guard():
            assert not claims.take(0)
        time.sleep(STALE_S + 1.1)  # the store's clock counts seconds
        with claims.guard():
            assert claims.take(0)
        holder.send(signal.SIGCONT)
        assert holder.ask().startswith("lost: another process may have taken over")
        claims.still_mine()
    claims.close()


@pytest.mark.parametrize("kind", ["knows none", "ignores them"])
def test_a_store_without_conditional_writes_gets_no_cache(kind: str, root: str, tmp_path: Path) -> None:
    from obstore.store import LocalStore, MemoryStore

    class Forgetful(MemoryStore):
        def put(self, path: str, file: bytes, **options: Any) -> Any:  # type: ignore[override]
            return super().put(path, file)

    place = ObjectPlace(root)
    store = LocalStore(tmp_path) if kind == "knows none" else Forgetful()
    place.bucket._hasty = place.bucket._patient = store
    claims = LeaseClaims(place)
    with pytest.raises(CacheError, match="does not know conditional writes"), claims.guard():
        pass
    claims.close()


def test_a_wrong_key_is_named(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    bucket_of.cache_clear()
    for ask in (
        lambda: place_of(root).names(),
        lambda: place_of(root).write("a", b""),
        lambda: place_of(root).read("a"),
    ):
        with pytest.raises(CacheError, match="refuses access") as caught:
            ask()
        assert "SignatureDoesNotMatch" in caught.value.why
        assert "AWS_SECRET_ACCESS_KEY" in caught.value.fix


def test_a_missing_bucket_is_named(server: S3Server) -> None:
    for ask in (lambda place: place.names(), lambda place: place.read("a")):
        with pytest.raises(CacheError, match="there is no bucket s3://nowhere-at-all"):
            ask(place_of("s3://nowhere-at-all/caches"))


def test_a_store_that_cannot_be_reached_is_said_soon(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    bucket_of.cache_clear()
    started = time.monotonic()
    with pytest.raises(BackendError, match="cannot be reached") as caught:
        place_of(root).names()
    assert "AWS_ENDPOINT_URL is http://127.0.0.1:9" in caught.value.why
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("url", ["ftp://host/x", "s3://"])
def test_urls_that_name_no_place(url: str) -> None:
    with pytest.raises(CacheError, match=r"names no bucket|caches cannot lie at"):
        place_of(url)


def test_what_a_store_must_be_told_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    bucket_of.cache_clear()
    with pytest.raises(BackendError, match=r"az://container cannot be used.*AZURE_STORAGE_ACCOUNT_NAME"):
        place_of("az://container/caches")


def test_web_servers_are_read_only(server: S3Server) -> None:
    place = place_of(f"{server.http}/caches")
    with pytest.raises(CacheError, match="nothing can be written"):
        place.write("a", b"")
    with pytest.raises(CacheError, match="nothing can be written"):
        place.write_stream("a", [b""])
    with pytest.raises(CacheError, match="cannot be listed"):
        place.names()


def test_without_obstore_the_command_is_named() -> None:
    code = (
        "import sys; sys.modules['obstore'] = None\nfrom vlmx.cache_specs.places import place_of\nplace_of('s3://b/x')"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "BackendError" in found.stderr
    assert "pip install 'vlmx[remote]'" in found.stderr


def test_a_forked_process_is_told_why_it_cannot_read(root: str) -> None:
    with Process("fork_and_read", root) as process:
        assert "start method 'spawn'" in process.hear()


def test_places_go_to_other_processes(root: str) -> None:
    import pickle

    place: Place = pickle.loads(pickle.dumps(ObjectPlace(root)))
    place.write("a", b"a")
    assert (place, place.names()) == (ObjectPlace(root), ["a"])
    assert place != LocalPlace(root)


def test_lost_answers_are_asked_for_again(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = [False]
    with slow_network(server.endpoint, 0, (lost.pop() if lost else False for _ in iter(int, 1))) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        bucket_of.cache_clear()
        place = ObjectPlace(server.url("lost"))
        place.write("a", b"a")
        lost += [True, True]
        assert (place.read("a"), lost) == (b"a", [])
        lost += [True]
        place.write("b", b"b")
        lost += [True]
        tag = place.write_if("c", b"1", None)  # it was written; what is asked again finds it there
        assert (tag is not None, lost) == (True, [])
        lost += [True]
        assert place.write_if("c", b"2", tag) is not None
        lost += [True]
        parts = [os.urandom(1 << 20)] * 40
        assert place.write_stream("d", parts) == 40 << 20
        assert (place.names(), place.read("c"), place.read("d"), lost) == (
            ["a", "b", "c", "d"],
            b"2",
            b"".join(parts),
            [],
        )


def test_the_network_of_these_tests_is_slow(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with slow_network(server.endpoint, 0.05) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        bucket_of.cache_clear()
        place = place_of(server.url("slow"))
        place.write("a", b"a")
        started = time.monotonic()
        for _ in range(4):
            assert place.read("a") == b"a"
        assert time.monotonic() - started > 0.2
