"""Is each image read once, by one process, however often and by however many it is asked for?"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from vlmx.cache_specs.ids import image_id
from vlmx.cache_specs.places import place_of
from vlmx.errors import DataError
from vlmx.extract import inventory
from vlmx.extract.inventory import SourceImage, count_sources, take_inventory
from vlmx.extract.sources import ImageRecord, ImageSource, open_source
from vlmx.extract.stamps import StampFile

# Reads a folder's images slowly, one thread, and writes down which; argv: folder, root, log.
SLOW_READER = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from vlmx.extract import inventory
from vlmx.extract.sources import open_source, source as settings

settings.SETTLED_NS = 0
inventory.SAVE_EVERY_S, inventory.SAVE_SHARE = 0.0, 1.0
folder, root, log = sys.argv[1:]

def load(record):
    time.sleep(0.01)
    with open(log, "a") as file:
        file.write(record.key + "\\n")
    return record.load()

source = open_source(folder)
source = replace(source, images=tuple(replace(one, load=partial(load, one)) for one in source.images))
with ThreadPoolExecutor(1) as pool:
    images = inventory.take_inventory(source, pool, root=root, ahead=2, check=lambda: None)
print(len({image.id for image in images}))
"""


def make_photos(folder: Path, count: int) -> None:
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (4 + number, 3), (number, 0, 0)).save(folder / f"{number:03}.png")


class Shelf:
    """Images in memory that count how often they are read."""

    def __init__(self, contents: dict[str, bytes]) -> None:
        self.contents = contents
        self.stamps: dict[str, str | None] = dict.fromkeys(contents, "first")
        self.read: list[str] = []

    def _load(self, key: str) -> bytes:
        self.read.append(key)
        return self.contents[key]

    def source(self) -> ImageSource:
        records = [
            ImageRecord(key=key, load=partial(self._load, key), stamp=partial(self.stamps.get, key))
            for key in self.contents
        ]
        return ImageSource(name="shelf", describe="a shelf", images=tuple(records))


def take(source: ImageSource, root: Path) -> list[SourceImage]:
    with ThreadPoolExecutor(2) as pool:
        return take_inventory(source, pool, root=root, ahead=8, check=lambda: None)


def test_what_did_not_change_is_not_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shelf = Shelf({f"{number}.png": bytes([number]) for number in range(200)})
    first = take(shelf.source(), tmp_path)
    assert [image.id for image in first] == [image_id(data) for data in shelf.contents.values()]
    assert sorted(shelf.read) == sorted(shelf.contents)
    shelf.read.clear()

    shelf.stamps["7.png"], shelf.contents["7.png"] = "second", b"other"
    shelf.stamps["8.png"] = None  # nothing vouches for it
    second = take(shelf.source(), tmp_path)
    assert sorted(shelf.read) == ["7.png", "8.png"]
    assert [image.key for image in second] == list(shelf.contents)
    assert [image.id for image in second] == [image_id(data) for data in shelf.contents.values()]
    assert "shelf: 198 of 200 images were known from an earlier run, and not read" in capsys.readouterr().err


def test_sizes_are_remembered_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmx.extract.sources.source.SETTLED_NS", 0)
    make_photos(tmp_path / "photos", 3)
    (tmp_path / "photos" / "no-image.jpg").write_text("<html>")
    expected = [("000.png", (4, 3)), ("001.png", (5, 3)), ("002.png", (6, 3)), ("no-image.jpg", None)]
    for _ in range(2):
        images = take(open_source(str(tmp_path / "photos")), tmp_path / "caches")
        assert [(image.key, image.source_wh) for image in images] == expected
    assert (tmp_path / "caches" / "datasets" / "photos.stamps.jsonl").is_file()


def test_fewer_images_forget_nothing(tmp_path: Path) -> None:
    shelf = Shelf({f"{number}.png": bytes([number]) for number in range(20)})
    take(shelf.source(), tmp_path)
    take(shelf.source().first(3), tmp_path)
    shelf.read.clear()
    take(shelf.source(), tmp_path)
    assert shelf.read == []


@pytest.mark.parametrize("damage", ["{}", '{"stamps": 99}\n["0.png", "first", "00"]\n', "", "\0\0\0"])
def test_a_damaged_file_of_stamps_costs_only_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    shelf = Shelf({"0.png": b"0", "1.png": b"1"})
    take(shelf.source(), tmp_path)
    path = tmp_path / "datasets" / "shelf.stamps.jsonl"
    whole = path.read_text()
    for text in (damage, whole[:-40], whole.replace('"first"', "3")):
        path.write_text(text)
        shelf.read.clear()
        assert [image.id for image in take(shelf.source(), tmp_path)] == [image_id(b"0"), image_id(b"1")]
        assert shelf.read
        assert path.read_text() == whole


def test_interrupted_it_keeps_what_was_read(tmp_path: Path) -> None:
    shelf = Shelf({f"{number}.png": bytes([number]) for number in range(100)})

    def stop_at_half() -> None:
        if len(shelf.read) >= 50:
            raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as pool, pytest.raises(KeyboardInterrupt):
        take_inventory(shelf.source(), pool, root=tmp_path, ahead=4, check=stop_at_half)
    before = len(shelf.read)
    take(shelf.source(), tmp_path)
    assert 100 <= len(shelf.read) <= 110
    assert len(shelf.read) - before <= 60


def test_one_key_for_two_contents_is_an_error(tmp_path: Path) -> None:
    records = tuple(ImageRecord(key="a.png", load=lambda data=data: data) for data in (b"1", b"2"))  # type: ignore[misc]
    with pytest.raises(DataError, match=r"two different images are named 'a\.png'"):
        take(ImageSource(name="tars", describe="two tars", images=records), tmp_path)
    assert not (tmp_path / "datasets").exists()  # nothing vouches for these, nothing is remembered


def test_a_file_that_is_gone_is_an_error(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos", 2)
    source = open_source(str(tmp_path / "photos"))
    (tmp_path / "photos" / "001.png").unlink()
    with pytest.raises(DataError, match=r"cannot read the image '001\.png'"):
        take(source, tmp_path)


def start(folder: Path, root: Path, log: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_READER, str(folder), str(root), str(log)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_killed_the_next_process_goes_on(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos", 150)
    first = start(tmp_path / "photos", tmp_path, tmp_path / "log-1")
    while len(lines_of(tmp_path / "log-1")) < 30:
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    second = start(tmp_path / "photos", tmp_path, tmp_path / "log-2")
    done = lines_of(tmp_path / "log-1")
    printed, err = second.communicate(timeout=60)
    assert printed == "150\n", err
    assert "were known from an earlier run" in err
    again = set(done) & set(lines_of(tmp_path / "log-2"))
    assert 30 <= len(done) < 150
    assert len(again) <= 10  # those since it saved last
    assert set(done) | set(lines_of(tmp_path / "log-2")) == {f"{number:03}.png" for number in range(150)}


def test_of_two_processes_one_reads(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos", 120)
    both = [start(tmp_path / "photos", tmp_path, tmp_path / "log") for _ in range(2)]
    ended = [process.communicate(timeout=60) for process in both]
    assert [printed for printed, _ in ended] == ["120\n", "120\n"]
    assert sorted(lines_of(tmp_path / "log")) == [f"{number:03}.png" for number in range(120)]
    assert sum("waiting for another process that reads the images of photos" in err for _, err in ended) <= 1
    assert sum("120 of 120 images were known from an earlier run" in err for _, err in ended) == 1


def test_saving_takes_a_bounded_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    monkeypatch.setattr(inventory, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(StampFile, "write", lambda self, known: (saved.append(len(known)), time.sleep(0.01))[0])
    shelf = Shelf({f"{number}.png": bytes([number]) for number in range(100)})
    started = time.perf_counter()
    take(shelf.source(), tmp_path)
    assert saved[-1] == 100
    assert len(saved) <= 2 + (time.perf_counter() - started) / 0.2


def test_stamps_of_an_object_store_lie_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore", reason="obstore is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one, other = (StampFile(place_of(url), "photos").path for url in ("s3://bucket/caches", "s3://bucket/others"))
    assert one.name == other.name == "photos.stamps.jsonl"
    assert one.is_relative_to(tmp_path / "vlmx" / "stamps")
    assert one != other


def test_how_much_of_each_source_is_new() -> None:
    def images(ids: str) -> list[SourceImage]:
        return [SourceImage(key=str(index), id=id, source_wh=(1, 1), load=bytes) for index, id in enumerate(ids)]

    vqa, ref, last = count_sources({"vqav2": images("abcc"), "refcoco": images("bcdx"), "last": images("xd")}, "cdx")
    assert vqa.describe == "vqav2: 4 images (3 different), 2 already there, 1 new"
    assert ref.describe == "refcoco: 4 images, 1 already there, 1 in a data set before it, 2 new"
    assert last.describe == "last: 2 images, 0 already there, 2 in a data set before it, 0 new"
