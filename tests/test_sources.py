"""Does every kind of --data give its images, in one order, and say what it left out or cannot do?"""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from vlmx import cli
from vlmx.errors import DataError, UsageError
from vlmx.extract.sources import ImageSource, open_source, open_sources
from vlmx.extract.sources.patterns import split_data


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


def test_llava_json_with_missing_images_counts_them_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    write_photo(tmp_path / "here.jpg", 1)
    gone = [f"gone/by/{i}/x.jpg" for i in range(4)] + [f"vg/{i}.jpg" for i in range(2)] + ["top.jpg"]
    rows = [{"id": name, "image": name} for name in ("here.jpg", *gone)]
    (tmp_path / "mix.json").write_text(json.dumps(rows))
    with pytest.raises(DataError) as caught:
        open_source(str(tmp_path / "mix.json"))
    assert "7 of 8 images" in caught.value.what
    (listed,) = tmp_path.glob("vlmx-missing-images-*.txt")
    assert caught.value.why == (
        f"not below {tmp_path}: 4 in gone/by, 2 in vg, 1 in no folder; the first are gone/by/0/x.jpg, gone/by/1/x.jpg,"
        f" gone/by/2/x.jpg, gone/by/3/x.jpg, vg/0.jpg; all 7 are in {listed}"
    )
    assert listed.read_text().splitlines() == gone
    assert "--image-root" in caught.value.fix
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "no such folder"))
    with pytest.raises(DataError) as caught:
        open_source(str(tmp_path / "mix.json"))
    assert caught.value.why.endswith("vg/0.jpg")


def test_the_list_of_missing_images_counts_the_rest_of_many_folders(tmp_path: Path) -> None:
    (tmp_path / "few.json").write_text(json.dumps([{"id": str(i), "image": f"{i % 3}/{i}.jpg"} for i in range(3)]))
    with pytest.raises(DataError) as caught:
        open_source(str(tmp_path / "few.json"))
    assert caught.value.why == f"not below {tmp_path}: 1 in 0, 1 in 1, 1 in 2; 0/0.jpg, 1/1.jpg, 2/2.jpg"
    many = [{"id": str(i), "image": f"{i % 10}/{i}.jpg"} for i in range(25)]
    (tmp_path / "many.json").write_text(json.dumps(many))
    with pytest.raises(DataError) as caught:
        open_source(str(tmp_path / "many.json"))
    assert (
        "3 in 0, 3 in 1, 3 in 2, 3 in 3, 3 in 4, 2 in 5, 2 in 6, 2 in 7, 4 in 2 others; the first" in caught.value.why
    )


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
    with pytest.raises(DataError, match=r"did you mean.*refcoco"):
        open_source("refcocco")
    with pytest.raises(DataError, match=r"only \.tar files"):
        open_source("https://example.org/photos.zip")
    write_photo(tmp_path / "p.png", 1)
    with pytest.raises(UsageError, match="--image-root belongs to a JSON"):
        open_source(str(tmp_path), tmp_path)
    with pytest.raises(UsageError, match="cannot name a data set"):
        open_source(str(tmp_path), name="../up")
    with pytest.raises(UsageError, match="cannot name a data set"):
        open_source(str(tmp_path), name="photos.stamps")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("mini", ["mini"]),
        ("vqav2, refcoco+", ["vqav2", "refcoco+"]),
        ("s/{00,01}.tar,mini", ["s/{00,01}.tar", "mini"]),
        ("a,,b", ["a", "", "b"]),
    ],
)
def test_commas_part_sources_but_not_braces(text: str, parts: list[str]) -> None:
    assert split_data(text) == parts


def test_a_path_with_a_comma_is_one_source(tmp_path: Path) -> None:
    write_photo(tmp_path / "cats, dogs" / "p.png", 1)
    (source,) = open_sources([str(tmp_path / "cats, dogs")])
    assert (source.name, len(source.images)) == ("cats-dogs", 1)


def test_several_sources_each_with_its_own_table_and_limit(tmp_path: Path) -> None:
    for name, count in (("a", 3), ("b", 1), ("c", 4)):
        for index in range(count):
            write_photo(tmp_path / name / f"{index}.png", index)
    sources = open_sources([f"{tmp_path}/a,{tmp_path}/b", f"{tmp_path}/c"], limit=2)
    assert [(source.name, len(source.images)) for source in sources] == [("a", 2), ("b", 1), ("c", 2)]
    assert "4 images; only the first 2" in sources[2].describe
    with pytest.raises(UsageError, match="--name cannot be the name of 2 data sets"):
        open_sources([f"{tmp_path}/a,{tmp_path}/b"], name="x")
    with pytest.raises(UsageError, match="would be called 'a'"):
        open_sources([f"{tmp_path}/a", f"{tmp_path}/a/"])
    with pytest.raises(UsageError, match="empty part"):
        open_sources([f"{tmp_path}/a,"])


def test_options_that_fit_none_of_the_data_are_refused(tmp_path: Path) -> None:
    write_photo(tmp_path / "a" / "0.png", 1)
    (tmp_path / "mix.json").write_text('[{"id": 1, "image": "a/0.png"}]')
    both = open_sources([f"{tmp_path}/a,{tmp_path}/mix.json"], tmp_path)
    assert [source.name for source in both] == ["a", "mix"]
    with pytest.raises(UsageError, match="--data-root belongs to published data sets"):
        open_sources([f"{tmp_path}/a"], data_root=tmp_path)
    with pytest.raises(UsageError, match="--image-column belongs to parquet files"):
        open_sources([f"{tmp_path}/a"], image_column="x")


def test_a_stamp_changes_with_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photo(tmp_path / "a" / "0.png", 1)
    (record,) = open_source(str(tmp_path / "a")).images
    assert record.stamp() is None  # made within the last two seconds: it may change within one tick of the clock
    monkeypatch.setattr("vlmx.extract.sources.source.SETTLED_NS", 0)
    first = record.stamp()
    assert first is not None
    assert record.stamp() == first
    state = (tmp_path / "a" / "0.png").stat()
    data = record.load()
    (tmp_path / "a" / "0.png").write_bytes(data[:-1] + b"x")
    os.utime(tmp_path / "a" / "0.png", ns=(state.st_atime_ns, state.st_mtime_ns))  # same size, same time: by its ctime
    assert record.stamp() not in (None, first)


def test_the_command_says_what_each_source_adds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, levels in (("a", (1, 2)), ("b", (2, 3, 3))):
        for number, level in enumerate(levels):
            write_photo(tmp_path / name / f"{number}.png", level)
    command = ["extract", "--backbone", "vit-mini-scenes", "--threads", "1", "--out", str(tmp_path / "caches")]
    cli.main([*command, "--data", f"{tmp_path}/a,{tmp_path}/b"])
    said = capsys.readouterr().err
    assert "a: 2 images, 0 already there, 2 new\n" in said
    assert "b: 3 images (2 different), 0 already there, 1 in a data set before it, 1 new\n" in said
    cli.main([*command, "--data", f"{tmp_path}/b", "--data", f"{tmp_path}/a"])
    said = capsys.readouterr().err
    assert "b: 3 images (2 different), 2 already there, 0 new\na: 2 images, 2 already there, 0 new\n" in said


def test_what_is_no_file_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(OSError, match="is not a regular file"):
        open_source(str(tmp_path)).images[0].load()
