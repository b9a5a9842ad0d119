"""Are webdataset tars read by their headers, from a disk and from a server, and are damaged ones refused?"""

import io
import socket
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from range_server import serve
from s3_server import use_server

from vlmx.cache_specs.object_store import bucket_of
from vlmx.cache_specs.places import place_of
from vlmx.errors import BackendError, DataError, UsageError
from vlmx.extract.sources import ImageSource, open_source


def photo(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (level, 0, 0)).save(file, "png")
    return file.getvalue()


def contents(source: ImageSource) -> dict[str, bytes]:
    return {record.key: record.load() for record in source.records()}


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_webdataset_tars_by_braces_glob_and_path(tmp_path: Path) -> None:
    photos = [photo(level) for level in range(4)]
    folder = tmp_path / "shards"
    folder.mkdir()
    write_tar(folder / "00.tar", {"s/000.png": photos[0], "s/000.json": b"{}", "s/001.left.png": photos[1]})
    write_tar(folder / "01.tar", {"s/002.png": photos[2], "s/003.cls": b"7"})
    expected = {"s/000.png": photos[0], "s/001.left.png": photos[1], "s/002.png": photos[2]}
    for data in (f"{folder}/{{00..01}}.tar", f"{folder}/*.tar"):
        source = open_source(data)
        assert list(contents(source).items()) == list(expected.items())
        assert source.name == "shards"
        assert "3 images; left out: 2 other files (.json 1, .cls 1)" in source.describe
    assert open_source(f"{folder}/01.tar").name == "01"


def test_tars_that_are_missing_or_named_twice(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"p.png": photo(1)})
    with pytest.raises(DataError, match=r"2 of 3 tar files are missing"):
        open_source(f"{tmp_path}/{{0..2}}.tar")
    with pytest.raises(UsageError, match="a brace too many or too few"):
        open_source(f"{tmp_path}/{{0..2.tar")
    with pytest.raises(DataError, match="no file matches"):
        open_source(f"{tmp_path}/x*.tar")
    with pytest.raises(DataError, match="1 tar files are named twice"):
        open_source(f"{tmp_path}/{{0,0}}.tar")
    write_tar(tmp_path / "1.tar", {"notes.txt": b"x"})
    with pytest.raises(DataError, match=r"no image in 1 tar files.*1 other files \(\.txt 1\)"):
        open_source(f"{tmp_path}/1.tar")


@pytest.mark.parametrize(
    ("first", "last", "words"),
    [
        (0, 512 + 100, "unexpected end of data"),  # within the first image
        (0, 1024 + 1, "neither a header nor the end mark"),  # within the second header
        (0, 1024 + 512, "ends within 1.png|unexpected end of data"),  # after the second header
        (512, 10240, "invalid header|bad checksum|truncated|invalid"),  # begins with pixels
        (0, 0, "empty file"),
    ],
)
def test_truncated_tars_are_refused(tmp_path: Path, first: int, last: int, words: str) -> None:
    write_tar(tmp_path / "0.tar", {"0.png": photo(1), "1.png": photo(2)})
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[first:last])
    with pytest.raises(DataError, match=f"cannot read the tar .*({words})"):
        open_source(f"{tmp_path}/0.tar")


def test_damage_between_members_is_not_taken_for_the_end(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"0.png": photo(1), "1.png": photo(2)})
    damaged = bytearray((tmp_path / "0.tar").read_bytes())
    damaged[1024 + 20] ^= 0xFF  # in the name of the second member: its checksum is wrong
    (tmp_path / "0.tar").write_bytes(damaged)
    with pytest.raises(DataError, match="neither a header nor the end mark at byte 1,024"):
        open_source(f"{tmp_path}/0.tar")


def test_a_tar_without_its_end_mark_is_read_and_said(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"0.png": photo(1), "1.png": photo(2)})
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[:2048])
    source = open_source(f"{tmp_path}/0.tar")
    assert len(source.images) == 2
    assert "1 tars lack their end mark and may be cut off (0.tar)" in source.describe


def test_links_in_a_tar_are_counted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        info = tarfile.TarInfo("0.png")
        info.size = len(photo(1))
        tar.addfile(info, io.BytesIO(photo(1)))
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.LNKTYPE, "0.png"
        tar.addfile(link)
    assert "1 images; left out: 1 other files (links 1)" in open_source(f"{tmp_path}/0.tar").describe


def test_tars_on_a_server_are_listed_by_their_headers(tmp_path: Path) -> None:
    pytest.importorskip("obstore", reason="obstore is not installed")
    large = [photo(level) + bytes(300_000) for level in range(6)]
    for number in range(2):
        members = {f"{number}/{i}.png": large[3 * number + i] for i in range(3)} | {f"{number}/0.json": b"{}"}
        write_tar(tmp_path / "my shards" / f"{number}.tar", members)
    with serve(tmp_path) as server:
        source = open_source(f"{server.url}/my%20shards/{{0..1}}.tar")
        listing = sum(size for _, _, size in server.requests)
        assert listing < 8 * 17_000 < sum(map(len, large)) / 10
        assert contents(source) == {f"{index // 3}/{index % 3}.png": data for index, data in enumerate(large)}
        assert sum(size for _, _, size in server.requests) == listing + sum(map(len, large))
        assert source.name == "my-shards"
        assert "2 tar files" in source.describe
        assert "6 images; left out: 2 other files (.json 2)" in source.describe

        stamps = [record.stamp() for record in source.images]
        assert None not in stamps
        write_tar(tmp_path / "my shards" / "1.tar", {"1/0.png": photo(9)})
        again = open_source(f"{server.url}/my%20shards/{{0..1}}.tar")
        assert [record.stamp() for record in again.images[:3]] == stamps[:3]
        assert again.images[3].stamp() not in stamps


def test_tars_in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore", reason="obstore is not installed")
    url = use_server(monkeypatch).url("tars")
    for number in range(2):
        write_tar(tmp_path / "0.tar", {f"{number}.png": photo(number)})
        place_of(url).write(f"photos/{number}.tar", (tmp_path / "0.tar").read_bytes())
    for tars in ("{0..1}.tar", "*.tar"):
        source = open_source(f"{url}/photos/{tars}")
        assert contents(source) == {"0.png": photo(0), "1.png": photo(1)}
        assert source.name == "photos"
    with pytest.raises(DataError, match="no file matches"):
        open_source(f"{url}/photos/x*.tar")
    with pytest.raises(DataError, match=r"there is no file s3://.*/photos/2\.tar"):
        open_source(f"{url}/photos/2.tar")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    bucket_of.cache_clear()
    with pytest.raises(DataError, match=r"refuses access.*AWS_SECRET_ACCESS_KEY"):
        open_source(f"{url}/photos/0.tar")
    bucket_of.cache_clear()


def test_servers_that_do_not_give_what_is_asked(tmp_path: Path) -> None:
    pytest.importorskip("obstore", reason="obstore is not installed")
    write_tar(tmp_path / "0.tar", {"0.png": photo(1)})
    with serve(tmp_path, ranges=False) as server:
        with pytest.raises(DataError, match="does not give parts of files"):
            open_source(f"{server.url}/0.tar")
        with pytest.raises(DataError, match=r"there is no file .*/1\.tar"):
            open_source(f"{server.url}/1.tar")
    with pytest.raises(UsageError, match=r"signed for whole files"):
        open_source("https://example.org/0.tar?token=1")
    with pytest.raises(UsageError, match="web servers do not list"):
        open_source("https://example.org/*.tar")
    with pytest.raises(UsageError, match="'ftp' is not one of"):
        open_source("ftp://example.org/0.tar")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # nobody listens there
        with pytest.raises(BackendError, match=r"cannot be reached.*Connection refused"):
            open_source(f"http://127.0.0.1:{unused.getsockname()[1]}/0.tar")


def test_a_truncated_tar_on_a_server_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("obstore", reason="obstore is not installed")
    write_tar(tmp_path / "0.tar", {"0.png": photo(1), "1.png": photo(2)})
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:1600])
    with serve(tmp_path) as server, pytest.raises(DataError, match="cannot read the tar"):
        open_source(f"{server.url}/0.tar")
