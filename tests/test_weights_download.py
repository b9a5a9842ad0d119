"""Do downloads arrive whole, go on after an interruption, and refuse what is not the file? With real HTTP servers."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from vlmx.errors import OutOfSpaceError, WeightsError
from vlmx.extract import weights
from vlmx.extract.backbones.catalogue import row
from vlmx.extract.weights.download import TRIES, from_url

DATA = bytes(range(256)) * 20_000  # 5 MB


@dataclass
class Behaviour:
    """How the server answers, and what it was asked."""

    data: bytes = DATA
    ranges: bool = True
    etag: str = '"one"'
    last_modified: str = ""
    stop_after: list[int] = field(default_factory=list)  # bytes of an answer, one entry an answer; then whole answers
    content_type: str = "application/octet-stream"
    status: int = 200
    length: int | None = -1  # -1: the right one; None: none
    wait_s: float = 0.0  # between pieces of 100 kB
    asked: list[str] = field(default_factory=list)  # the Range of each request, "" if none


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range", "")
            behaviour.asked.append(wanted)
            start = 0
            fresh = self.headers.get("If-Range") in (behaviour.etag, behaviour.last_modified)
            if behaviour.ranges and wanted and fresh:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start and start >= len(behaviour.data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(behaviour.data)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = behaviour.data[start:]
            self.send_response(206 if start else behaviour.status)
            self.send_header("Content-Type", behaviour.content_type)
            if behaviour.etag:
                self.send_header("ETag", behaviour.etag)
            if behaviour.last_modified:
                self.send_header("Last-Modified", behaviour.last_modified)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(behaviour.data) - 1}/{len(behaviour.data)}")
            if behaviour.length is not None:
                self.send_header("Content-Length", str(len(body) if behaviour.length == -1 else behaviour.length))
            self.end_headers()
            if behaviour.stop_after:
                body = body[: behaviour.stop_after.pop(0)]
            for begin in range(0, len(body), 100_000):
                try:
                    self.wfile.write(body[begin : begin + 100_000])
                except OSError:
                    return
                time.sleep(behaviour.wait_s)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/w.pth"
    finally:
        server.shutdown()
        server.server_close()


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".w.pth.lock")


def test_a_file_arrives_and_nothing_else_stays(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(Behaviour()) as url:
        assert from_url(url, tmp_path / "new/w.pth").read_bytes() == DATA
    assert left_in(tmp_path / "new") == ["w.pth"]
    assert "5,120/5,120 kB" in capfd.readouterr().err


def test_find_downloads_into_the_named_folder_or_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("VLMX_WEIGHTS", str(tmp_path / "named"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    behaviour = Behaviour()
    with serving(behaviour) as url:
        mine = replace(row("vmamba-t-in1k"), url=url, file="w.pth")
        assert weights.find(mine) == tmp_path / "named/w.pth"
        assert weights.find(mine) == tmp_path / "named/w.pth"
        monkeypatch.delenv("VLMX_WEIGHTS")
        assert weights.find(mine) == tmp_path / "cache/vlmx/weights/w.pth"
    assert behaviour.asked == ["", ""]


def test_offline_asks_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMX_WEIGHTS", str(tmp_path))
    behaviour = Behaviour()
    with serving(behaviour) as url, pytest.raises(WeightsError, match="no download: offline mode"):
        weights.find(replace(row("vmamba-t-in1k"), url=url, file="w.pth"))
    assert behaviour.asked == []
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    ("etag", "last_modified"), [('"one"', ""), ("", "Wed, 21 Oct 2015 07:28:00 GMT"), ('W/"x"', "Wed, 21 Oct 2015")]
)
def test_a_broken_connection_goes_on_where_it_ended(tmp_path: Path, etag: str, last_modified: str) -> None:
    behaviour = Behaviour(stop_after=[1_000_000, 500_000], etag=etag, last_modified=last_modified)
    with serving(behaviour) as url:
        assert from_url(url, tmp_path / "w.pth").read_bytes() == DATA
    assert behaviour.asked == ["", "bytes=1000000-", "bytes=1500000-"]


def test_a_server_without_ranges_starts_again(tmp_path: Path) -> None:
    behaviour = Behaviour(stop_after=[1_000_000], ranges=False)
    with serving(behaviour) as url:
        assert from_url(url, tmp_path / "w.pth").read_bytes() == DATA
    assert behaviour.asked == ["", "bytes=1000000-"]


def test_a_server_without_a_validator_is_asked_for_all(tmp_path: Path) -> None:
    behaviour = Behaviour(stop_after=[1_000_000], etag="")
    with serving(behaviour) as url:
        assert from_url(url, tmp_path / "w.pth").read_bytes() == DATA
    assert behaviour.asked == ["", ""]


def test_a_connection_that_keeps_breaking_is_given_up_and_the_part_is_kept(tmp_path: Path) -> None:
    behaviour = Behaviour(stop_after=[1000] * TRIES)
    with serving(behaviour) as url:
        with pytest.raises(WeightsError, match=rf"broke off; {1000 * TRIES} of 5120000 bytes.* kept in .*w\.pth\.part"):
            from_url(url, tmp_path / "w.pth")
        assert left_in(tmp_path) == ["w.pth.part", "w.pth.part.json"]
        assert from_url(url, tmp_path / "w.pth").read_bytes() == DATA
    assert behaviour.asked[-1] == f"bytes={1000 * TRIES}-"
    assert left_in(tmp_path) == ["w.pth"]


def test_another_file_at_the_same_address_is_not_glued_to_the_old_beginning(tmp_path: Path) -> None:
    behaviour = Behaviour(stop_after=[1000] * TRIES)
    with serving(behaviour) as url:
        with pytest.raises(WeightsError):
            from_url(url, tmp_path / "w.pth")
        behaviour.data, behaviour.etag = b"other" * 1000, '"two"'
        assert from_url(url, tmp_path / "w.pth").read_bytes() == b"other" * 1000


def test_a_part_of_another_address_is_not_continued(tmp_path: Path) -> None:
    (tmp_path / "w.pth.part").write_bytes(b"x" * 100)
    (tmp_path / "w.pth.part.json").write_text(json.dumps({"url": "http://other", "validator": '"one"'}))
    with serving(Behaviour()) as url:
        assert from_url(url, tmp_path / "w.pth").read_bytes() == DATA


@pytest.mark.parametrize("extra", [0, 7])
def test_a_part_that_is_whole_or_too_long(tmp_path: Path, extra: int) -> None:
    with serving(Behaviour()) as url:
        (tmp_path / "w.pth.part").write_bytes(DATA + b"x" * extra)
        (tmp_path / "w.pth.part.json").write_text(json.dumps({"url": url, "validator": '"one"'}))
        assert from_url(url, tmp_path / "w.pth").read_bytes() == DATA
    assert left_in(tmp_path) == ["w.pth"]


def test_a_killed_download_goes_on(tmp_path: Path) -> None:
    behaviour = Behaviour(wait_s=0.05)
    path = tmp_path / "w.pth"
    with serving(behaviour) as url:
        code = (
            "from pathlib import Path\nfrom vlmx.extract.weights.download import from_url\n"
            f"from_url({url!r}, Path({str(path)!r}))"
        )
        for end in (signal.SIGKILL, signal.SIGINT):
            before = len(behaviour.asked)
            part_before = (tmp_path / "w.pth.part").stat().st_size if before else 0
            process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline and (
                len(behaviour.asked) == before
                or not (tmp_path / "w.pth.part").exists()
                or (tmp_path / "w.pth.part").stat().st_size < part_before + 200_000
            ):
                time.sleep(0.01)
            process.send_signal(end)
            assert process.wait() != 0
            assert not path.exists()
            assert 0 < (tmp_path / "w.pth.part").stat().st_size < len(DATA)
        behaviour.wait_s = 0
        assert from_url(url, path).read_bytes() == DATA
    assert [bool(re.fullmatch(r"bytes=[1-9]\d+-", asked)) for asked in behaviour.asked] == [False, True, True]


def test_two_processes_download_once(tmp_path: Path) -> None:
    behaviour = Behaviour(wait_s=0.01)
    found: list[Path] = []
    with serving(behaviour) as url:
        threads = [threading.Thread(target=lambda: found.append(from_url(url, tmp_path / "w.pth"))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [path.read_bytes() == DATA for path in found] == [True] * 3
    assert behaviour.asked == [""]


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        (Behaviour(status=404), "cannot be downloaded; HTTP status 404"),
        (Behaviour(status=503), "cannot be downloaded; HTTP status 503"),
        (Behaviour(content_type="text/html; charset=utf-8", data=b"<p>sign in</p>"), "is a web page, not weights"),
        (Behaviour(data=b"<!DOCTYPE html><p>sign in</p>"), "is a web page, not weights"),
    ],
)
def test_answers_that_are_not_the_file(tmp_path: Path, behaviour: Behaviour, message: str) -> None:
    with serving(behaviour) as url, pytest.raises(WeightsError, match=message):
        from_url(url, tmp_path / "w.pth")
    assert left_in(tmp_path) == []


def test_a_length_that_is_wrong(tmp_path: Path) -> None:
    message = "broke off; 5120000 of 5120010 bytes arrived"
    with serving(Behaviour(length=len(DATA) + 10, ranges=False)) as url, pytest.raises(WeightsError, match=message):
        from_url(url, tmp_path / "w.pth")
    assert "w.pth" not in left_in(tmp_path)


def test_no_length_is_taken_as_it_comes(tmp_path: Path) -> None:
    with serving(Behaviour(length=None)) as url:
        assert from_url(url, tmp_path / "w.pth").read_bytes() == DATA


def test_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Behaviour()) as url:
        pass
    with pytest.raises(WeightsError, match="cannot be reached; no network, or the server is down"):
        from_url(url, tmp_path / "w.pth")
    assert left_in(tmp_path) == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("VLMX_WEIGHTS", str(tmp_path))
    with pytest.raises(WeightsError, match=r"not on this machine; no 'w\.pth' in .*no download: .* cannot be reached"):
        weights.find(replace(row("vmamba-t-in1k"), url=url, file="w.pth"))


def test_a_disk_that_is_too_small_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with serving(Behaviour()) as url, pytest.raises(OutOfSpaceError, match=r"5\.1 MB are missing"):
        from_url(url, tmp_path / "w.pth")


def test_a_full_disk_keeps_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2M", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    try:
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**9}))  # full only later
        with serving(Behaviour()) as url:
            with pytest.raises(OutOfSpaceError, match="goes on where it stopped"):
                from_url(url, disk / "w.pth")
            kept = (disk / "w.pth.part").stat().st_size
            assert kept > 1_000_000
            assert (disk / "w.pth.part").read_bytes() == DATA[:kept]
            subprocess.run(["mount", "-o", "remount,size=20M", str(disk)], check=True)
            assert from_url(url, disk / "w.pth").read_bytes() == DATA
    finally:
        subprocess.run(["umount", str(disk)], check=True)


HUB_COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("known", [True, False])
def test_rows_of_the_hub_go_through_its_library(tmp_path: Path, known: bool) -> None:
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(f"{self.command} {self.path}")
            if self.path != "/org/name/resolve/main/w.safetensors" or not known:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("X-Repo-Commit", HUB_COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(DATA).hexdigest()}"')
            self.send_header("Content-Length", str(len(DATA)))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            if known:
                self.wfile.write(DATA)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    code = """if True:
        from dataclasses import replace
        from vlmx.errors import WeightsError
        from vlmx.extract import weights
        from vlmx.extract.backbones.catalogue import row
        url = "https://huggingface.co/org/name/resolve/main/w.safetensors"
        try:
            print(weights.find(replace(row("vit-b-in1k"), url=url)))
        except WeightsError as error:
            print(error)
    """
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_HUB_CACHE": str(tmp_path / "hub")}
    env |= {"VLMX_WEIGHTS": str(tmp_path / "mine"), "XDG_CACHE_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    try:
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    finally:
        server.shutdown()
        server.server_close()
    assert any("/org/name/resolve/main/w.safetensors" in line for line in asked)
    if known:
        path = Path(done.stdout.strip())
        assert path == tmp_path / "hub/models--org--name/snapshots" / HUB_COMMIT / "w.safetensors"
        assert path.read_bytes() == DATA
    else:
        assert "are not on this machine" in done.stdout
        assert "could not be read from the Hugging Face hub; 404" in done.stdout
