"""Are images of parquet files found by column, named by path or row, and read again without reading whole files?"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vlmx.errors import DataError
from vlmx.extract.ahead import work_ahead
from vlmx.extract.sources import ImageSource, open_source, open_sources
from vlmx.extract.sources import parquet as under_test

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def picture(number: int, size: int = 50) -> bytes:
    return random.Random(number).randbytes(size)


def write(path: Path, columns: dict[str, Any], *, rows_a_group: int = 1000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=rows_a_group)


def structs(first: int, count: int, paths: list[str | None] | None = None, size: int = 50) -> Any:
    rows = [
        {"bytes": picture(first + index, size), "path": paths[index] if paths else f"{first + index:04}.jpg"}
        for index in range(count)
    ]
    return pa.array(rows, IMAGE)


def contents(source: ImageSource) -> dict[str, bytes]:
    return {record.key: record.load() for record in source.records()}


def test_hugging_face_files_by_folder_glob_braces_and_path(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    write(folder / "train-0.parquet", {"image": structs(0, 5), "label": list(range(5))}, rows_a_group=2)
    write(folder / "train-1.parquet", {"image": structs(5, 3), "label": list(range(3))})
    (folder / "README.md").write_text("x")
    expected = {f"{number:04}.jpg": picture(number) for number in range(8)}
    for data in (f"{folder}", f"{folder}/*.parquet", f"{folder}/train-{{0..1}}.parquet"):
        source = open_source(data)
        assert list(contents(source).items()) == list(expected.items())
        assert source.name == "photos"
        assert "8 images, named by their paths" in source.describe
    assert open_source(f"{folder}/train-1.parquet").name == "train-1"


@pytest.mark.parametrize("paths", [["a.jpg", None, "b.jpg"], ["a.jpg", "a.jpg", "b.jpg"], ["a.jpg", "", "b.jpg"]])
def test_rows_are_named_by_file_and_row_when_paths_do_not_name_them(tmp_path: Path, paths: list[str | None]) -> None:
    write(tmp_path / "x" / "0.parquet", {"image": structs(0, 3, paths)})
    write(tmp_path / "y" / "0.parquet", {"image": structs(3, 1)})
    source = open_source(f"{tmp_path}/{{x,y}}/0.parquet", name="both")
    keys = ["x/0.parquet#0", "x/0.parquet#1", "x/0.parquet#2", "y/0.parquet#0"]
    assert contents(source) == {key: picture(number) for number, key in enumerate(keys)}
    assert "named by file and row" in source.describe


def test_plain_bytes_and_rows_without_an_image(tmp_path: Path) -> None:
    write(
        tmp_path / "0.parquet",
        {"jpg": pa.array([picture(0), None, picture(2)], pa.large_binary()), "text": list("abc")},
    )
    source = open_source(f"{tmp_path}/0.parquet")
    assert contents(source) == {"0.parquet#0": picture(0), "0.parquet#1": b"", "0.parquet#2": picture(2)}
    write(tmp_path / "1.parquet", {"image": pa.array([None, {"bytes": None, "path": "a"}], IMAGE)})
    assert list(contents(open_source(f"{tmp_path}/1.parquet")).values()) == [b"", b""]


def test_which_column_holds_the_images(tmp_path: Path) -> None:
    blobs = pa.array([b"1"], pa.binary())
    file = tmp_path / "0.parquet"
    write(file, {"left": blobs, "right": blobs, "text": ["x"]})
    with pytest.raises(DataError, match=r"2 columns that may hold images.*text \(string\).*column: left, right"):
        open_source(str(file))
    (chosen,) = open_sources([str(file)], image_column="right")
    assert "column 'right'" in chosen.describe
    with pytest.raises(DataError, match=r"no column of images 'text'.*--image-column: left, right"):
        open_sources([str(file)], image_column="text")
    write(file, {"thumbnail": blobs, "image": blobs})
    assert "column 'image'" in open_source(str(file)).describe
    write(file, {"embedding": blobs, "img": blobs})
    assert "column 'img'" in open_source(str(file)).describe
    write(file, {"text": ["x"], "image": ["photos/1.jpg"]})
    with pytest.raises(DataError, match=r"no column of images.*image \(string\)"):
        open_source(str(file))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_conversations_that_name_their_images(tmp_path: Path, kind: Any) -> None:
    for name in ("vg/1.jpg", "2.jpg"):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_bytes(name.encode())
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    images = pa.array(["vg/1.jpg", None, "2.jpg", "vg/1.jpg"], pa.string()).cast(kind)
    write(tmp_path / "mix.parquet", {"id": list("abcd"), "image": images, "conversations": [turns] * 4})
    source = open_source(f"{tmp_path}/mix.parquet", tmp_path / "root")
    assert contents(source) == {"vg/1.jpg": b"vg/1.jpg", "2.jpg": b"2.jpg"}
    assert source.name == "mix"
    assert "mix.parquet (4 rows): 2 images; left out: 1 text-only rows" in source.describe
    with pytest.raises(DataError, match=r"2 of 2 images that .*mix.parquet names are missing"):
        open_source(f"{tmp_path}/mix.parquet")
    with pytest.raises(DataError, match="no column of images 'image'"):
        open_sources([f"{tmp_path}/mix.parquet"], image_column="image")


def test_missing_empty_and_damaged_files(tmp_path: Path) -> None:
    file = tmp_path / "0.parquet"
    with pytest.raises(DataError, match="1 of 1 parquet files are missing"):
        open_source(str(file))
    write(file, {"image": structs(0, 0)})
    with pytest.raises(DataError, match="1 parquet files, no row"):
        open_source(str(file))
    write(file, {"image": structs(0, 100)})
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(DataError, match="cannot read the parquet file"):
        open_source(str(file))
    file.write_bytes(b"PAR1" + bytes(1000) + whole[1004:])  # its pages are gone, its footer is whole
    source = open_source(str(file))
    with pytest.raises(DataError, match="cannot read the parquet file"):
        source.images[99].load()


def test_rows_in_any_order_from_several_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(under_test, "KEPT_BYTES", 8000)
    monkeypatch.setattr(under_test, "OPEN_FILES", 2)
    for number in range(4):
        write(tmp_path / f"{number}.parquet", {"image": structs(100 * number, 100, size=200)}, rows_a_group=30)
    records = list(open_source(str(tmp_path)).images)
    order = list(range(400))
    random.Random(0).shuffle(order)
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda index: records[index].load(), order))
    assert all(data == picture(index, 200) for index, data in zip(order, got, strict=True))


def test_reading_in_order_decodes_each_block_once_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row group of 40 MB: it is neither decoded as a whole nor again from its start."""
    count, size = 400, 100_000
    write(tmp_path / "0.parquet", {"image": structs(0, count, size=size)})
    monkeypatch.setattr(under_test, "KEPT_BYTES", 10_000_000)
    decoded: list[int] = []
    bytes_of = under_test._File.bytes_of

    def counted(file: Any, batch: Any) -> list[bytes]:
        decoded.append(batch.num_rows)
        return bytes_of(file, batch)

    monkeypatch.setattr(under_test._File, "bytes_of", counted)
    records = open_source(str(tmp_path)).images
    pa.default_memory_pool().release_unused()
    before = pa.default_memory_pool().max_memory()
    with ThreadPoolExecutor(4) as pool:
        for index, data in enumerate(work_ahead(pool, lambda record: record.load(), records, ahead=16)):
            assert data == picture(index, size)
    assert sum(decoded) == count
    assert pa.default_memory_pool().max_memory() - before < 32_000_000
    decoded.clear()
    assert records[-1].load() == picture(count - 1, size)  # kept
    assert not decoded
