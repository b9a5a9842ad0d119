"""Does every kind of --data give its images, in one order, and say what it left out or cannot do?"""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from vlmx.errors import DataError, UsageError
from vlmx.extract.images import ImageSource, open_source


def write_photo(path: Path, level: int) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (level, 0, 0)).save(path)
    return path.read_bytes()


def contents(source: ImageSource) -> dict[str, bytes]:
    return {record.key: record.load() for record in source.records()}


def test_folder_is_sorted_recursive_and_counts_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "my photos"
    b = write_photo(folder / "b.png", 1)
    a = write_photo(folder / "deep" / "er" / "a.JPG", 2)
    (folder / "notes.txt").write_text("x")
    (folder / "deep" / "list.txt").write_text("x")
    source = open_source(str(folder))
    assert list(contents(source).items()) == [("b.png", b), ("deep/er/a.JPG", a)]
    assert source.name == "my-photos"
    assert source.describe == f"folder {folder}: 2 images; left out: 2 other files (.txt 2)"


def test_linked_folders_are_read_and_loops_are_not_followed(tmp_path: Path) -> None:
    photo = write_photo(tmp_path / "elsewhere" / "p.png", 1)
    folder = tmp_path / "photos"
    folder.mkdir()
    os.symlink(tmp_path / "elsewhere", folder / "linked")
    os.symlink(folder, folder / "loop")
    assert contents(open_source(str(folder))) == {"linked/p.png": photo}


def test_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it is empty"):
        open_source(str(tmp_path))
    (tmp_path / "0.tar").touch()
    with pytest.raises(DataError, match=r"for its tars, give --data"):
        open_source(str(tmp_path))


def test_llava_json_names_each_image_once_in_order(tmp_path: Path) -> None:
    one, two = write_photo(tmp_path / "root" / "x" / "1.jpg", 1), write_photo(tmp_path / "root" / "2.jpg", 2)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    rows = [
        {"id": "0", "image": "x/1.jpg", "conversations": turns},
        {"id": "1", "conversations": turns},
        {"id": "2", "image": "2.jpg", "conversations": turns},
        {"id": "3", "image": "x/1.jpg", "conversations": turns},
    ]
    (tmp_path / "mix.json").write_text(json.dumps(rows))
    (tmp_path / "mix.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    for file in ("mix.json", "mix.jsonl"):
        source = open_source(str(tmp_path / file), tmp_path / "root")
        assert list(contents(source).items()) == [("x/1.jpg", one), ("2.jpg", two)]
        assert source.name == "mix"
        assert "(4 rows): 2 images; left out: 1 text-only rows" in source.describe


def test_llava_json_with_missing_images_counts_them_before_anything_starts(tmp_path: Path) -> None:
    write_photo(tmp_path / "here.jpg", 1)
    rows = [{"id": "h", "image": "here.jpg"}] + [{"id": str(i), "image": f"gone/{i}.jpg"} for i in range(7)]
    (tmp_path / "mix.json").write_text(json.dumps(rows))
    with pytest.raises(DataError) as caught:
        open_source(str(tmp_path / "mix.json"))
    assert "7 of 8 images" in caught.value.what
    assert "gone/0.jpg, gone/1.jpg, gone/2.jpg, gone/3.jpg, gone/4.jpg, ..." in caught.value.why
    assert "--image-root" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", '[{"id": 1, "image": ["x.jpg", "y.jpg"]}, 5]', "2 of 2 rows"),
        ("a.json", '{"id": 1}', "top level is a dict"),
        ("a.json", "[", "cannot read"),
        ("a.json", '[{"id": 1, "conversations": []}]', "names no image"),
        ("a.jsonl", '{"id": 1, "image": "x.jpg"}\n{"id"', "line 2"),
    ],
)
def test_broken_json_is_one_error(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words):
        open_source(str(tmp_path / name))


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_webdataset_tars_by_braces_glob_and_path(tmp_path: Path) -> None:
    photos = [write_photo(tmp_path / f"{i}.png", i) for i in range(4)]
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


def test_tars_that_are_missing_or_damaged(tmp_path: Path) -> None:
    photo = write_photo(tmp_path / "p.png", 1)
    write_tar(tmp_path / "0.tar", {"p.png": photo * 100})
    with pytest.raises(DataError, match=r"2 of 3 tar files are missing"):
        open_source(f"{tmp_path}/{{0..2}}.tar")
    with pytest.raises(DataError, match="no file matches"):
        open_source(f"{tmp_path}/x*.tar")
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[: 512 + len(photo)])
    with pytest.raises(DataError, match="cannot read the tar"):
        open_source(f"{tmp_path}/0.tar")
    (tmp_path / "0.tar").write_bytes(b"<html>" * 200)
    with pytest.raises(DataError, match="cannot read the tar"):
        open_source(f"{tmp_path}/0.tar")


def test_mini_study() -> None:
    source = open_source("mini")
    keys = [record.key for record in source.records()]
    assert source.name == "mini"
    assert keys[0] == "train/000000"
    assert [key.split("/")[0] for key in keys] == sorted((key.split("/")[0] for key in keys), reverse=True)
    first = next(iter(source.records()))
    assert first.load().startswith(b"P6\n64 64\n255\n")


def test_what_cannot_be_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_source(str(tmp_path / "nowhere"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="neither a folder"):
        open_source(str(tmp_path / "notes.txt"))
    write_photo(tmp_path / "p.png", 1)
    with pytest.raises(UsageError, match="--image-root belongs to a JSON"):
        open_source(str(tmp_path), tmp_path)
    with pytest.raises(UsageError, match="cannot name a data set"):
        open_source(str(tmp_path), name="../up")
