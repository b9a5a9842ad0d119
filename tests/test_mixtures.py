"""Are LLaVA-style files of each form read and checked, and the published mixture and its images recognised?"""

import builtins
import gc
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from vlmx.data import mixtures
from vlmx.data.llava665k import PARTS, check_mixture, missing_images
from vlmx.data.mixtures import load_mixture
from vlmx.data.records import Conversation, Turn
from vlmx.errors import BackendError, DataError, UnknownNameError


def message(role, value):
    return {"from": role, "value": value}


ROWS = [
    {
        "id": "000000033471",
        "image": "coco/train2017/000000033471.jpg",
        "conversations": [
            message("human", "<image>\nWhat colour is the bus?\u2028"),
            message("gpt", "White, red. \U0001f68c"),
            message("human", "Its box?"),
            message("gpt", "[0.28, 0.34, 0.4, 0.71]"),
        ],
    },
    {"id": 7, "image": "vg/VG_100K/7.jpg", "conversations": [message("human", "Q\n<image>"), message("gpt", "")]},
    {"id": "wgByO4Y_0", "model": "", "conversations": [message("human", "Hi"), message("gpt", "Ho")]},
    {"id": 7, "image": None, "conversations": [message("human", "a"), message("gpt", "b"), message("human", "c")]},
]
CONVERSATIONS = (
    Conversation(
        id="000000033471",
        image="coco/train2017/000000033471.jpg",
        turns=(
            Turn(question="What colour is the bus?", answer="White, red. \U0001f68c"),
            Turn(question="Its box?", answer="[0.28, 0.34, 0.4, 0.71]"),
        ),
    ),
    Conversation(id="7", image="vg/VG_100K/7.jpg", turns=(Turn(question="Q", answer=""),)),
    Conversation(id="wgByO4Y_0", image=None, turns=(Turn(question="Hi", answer="Ho"),)),
    Conversation(id="7#2", image=None, turns=(Turn(question="a", answer="b"),)),
)


def write(path, rows):
    if path.suffix == ".parquet":
        columns = {
            "id": [str(row["id"]) for row in rows],
            "image": [row.get("image") for row in rows],
            "model": ["m"] * len(rows),
            "conversations": [row["conversations"] for row in rows],
        }
        parquet.write_table(pa.table(columns), path, row_group_size=2)
    elif path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["my.json", "my.jsonl", "my.parquet"])
def test_each_form_gives_the_same_conversations(tmp_path, name):
    mixture = load_mixture(write(tmp_path / name, ROWS))
    assert mixture.name == "my"
    assert mixture.conversations == CONVERSATIONS
    assert mixture.notes == ("1 conversations end with an unanswered message, which is left out",)
    assert gc.isenabled()


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1000])
def test_a_json_is_read_in_parts_of_any_size(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(mixtures, "_CHUNK_CHARS", chunk)
    path = write(tmp_path / "my.json", ROWS)
    assert load_mixture(path).conversations == CONVERSATIONS
    (tmp_path / "compact.json").write_text("\ufeff [" + ",".join(map(json.dumps, ROWS)) + "]\n", encoding="utf-8")
    assert load_mixture(str(tmp_path / "compact.json")).conversations == CONVERSATIONS
    (tmp_path / "numbers.json").write_text("[12345, -1.5e+30, true]")
    with pytest.raises(DataError, match="3 of 3 rows") as caught:
        load_mixture(str(tmp_path / "numbers.json"))
    assert caught.value.why == "; ".join(f"row {n}: not an object" for n in (1, 2, 3))


GOOD = '{"id": 1, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}'


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("a.json", "", "it does not start with [, so it is no list: the file ends there"),
        ("a.json", '{"id": 1}', "it does not start with [, so it is no list: '{\"id\": 1}'"),
        ("a.json", f'[{GOOD}, {{"id": 2', "row 2: Expecting ',' delimiter: '{\"id\": 2'"),
        ("a.json", f"[{GOOD}", "there is no comma after row 1: the file ends there"),
        ("a.json", f"[{GOOD} 2]", "there is no comma after row 1: '2]'"),
        ("a.json", f"[{GOOD},]", "row 2: Expecting value: ']'"),
        ("a.json", f"[{GOOD}] []", "something follows the list: '[]'"),
        ("a.jsonl", f'{GOOD}\n\n{{"id": ', "line 3: Expecting value at character 8"),
        ("a.json", "[\xff]", "'utf-8' codec can't decode byte 0xff"),
        ("a.parquet", "[]", "Parquet"),
    ],
)
def test_damaged_files(tmp_path, name, text, why):
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.\w+ cannot be read") as caught:
        load_mixture(str(tmp_path / name))
    assert why in caught.value.why


def test_the_images_of_a_file_are_in_the_table_that_extract_names_after_it(tmp_path):
    (tmp_path / "my mix.json").write_text(json.dumps(ROWS))
    assert load_mixture(str(tmp_path / "my mix.json")).name == "my-mix"


def test_no_conversations(tmp_path):
    for name, text in (("a.json", " [ ] "), ("a.jsonl", "\n \n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match="has no conversations"):
            load_mixture(str(tmp_path / name))


def test_rows_that_break_the_schema_are_counted_and_the_first_are_shown(tmp_path):
    good = [message("human", "a"), message("gpt", "b")]
    rows = [
        {"id": 1, "conversations": good},
        {"id": 2, "image": ["a.jpg", "b.jpg"], "conversations": good},
        {"id": 3, "image": "", "conversations": good},
        {"id": 4, "images": ["a.jpg"], "conversations": good},
        {"id": 5, "conversations": [message("system", "be good"), *good]},
        {"id": 6, "conversations": [message("human", "a"), {"from": "gpt", "text": "b"}]},
        {"id": 7, "conversations": [message("human", "a")]},
    ]
    with pytest.raises(DataError, match=r"6 of 7 rows of .* are not LLaVA conversations") as caught:
        load_mixture(write(tmp_path / "my.json", rows))
    assert caught.value.why.split("; row ") == [
        "row 2: image is a list of 2; a conversation can have one image, given as a text",
        "3: image is empty; a text-only conversation has none",
        "4: it has images; a conversation can have one image, under image",
        "5: message 1 is from 'system', expected 'human'",
        "6: message 2 has no text in value; ...",
    ]


@pytest.mark.parametrize(
    ("column", "shown"),
    [
        ({"image": [{"bytes": b"x", "path": "a.jpg"}]}, "image (struct<"),
        ({"image": [["a.jpg"]]}, "image (list<"),
        ({"images": [["a.jpg"]]}, "images (list<"),
    ],
)
def test_a_parquet_that_holds_images_or_lists_of_them(tmp_path, column, shown):
    parquet.write_table(pa.table({"conversations": [ROWS[2]["conversations"]], **column}), tmp_path / "my.parquet")
    with pytest.raises(DataError, match="does not name one image a row") as caught:
        load_mixture(str(tmp_path / "my.parquet"))
    assert shown in caught.value.why


def test_without_pyarrow_a_parquet_says_what_is_missing(tmp_path, monkeypatch):
    path = write(tmp_path / "my.parquet", ROWS)
    real_import = builtins.__import__

    def without_pyarrow(name, *args):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real_import(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(BackendError, match="pyarrow, the library for parquet files, is not installed"):
        load_mixture(path)


def test_ids_that_occur_again_are_made_unique(tmp_path):
    rows = [{**ROWS[2], "id": name} for name in ("a", "a", "a#2", "a", None)]
    mixture = load_mixture(write(tmp_path / "my.json", rows))
    assert [c.id for c in mixture.conversations] == ["a", "a#2", "a#2#2", "a#3", "5"]


def test_a_mark_without_an_image_is_counted(tmp_path):
    rows = [{"id": 1, "conversations": [message("human", "<image>\nWhat?"), message("gpt", "That.")]}]
    mixture = load_mixture(write(tmp_path / "my.json", rows))
    assert mixture.notes == ("1 conversations have the mark <image> but name no image: they are text only",)
    assert mixture.conversations[0].turns[0].question == "What?"


def test_a_name_that_is_neither_known_nor_a_file():
    with pytest.raises(UnknownNameError, match="did you mean 'mini'") as caught:
        load_mixture("mimi")
    assert ".json, .jsonl or .parquet file" in caught.value.fix


def published(**changes):
    """Conversations with the folders and counts of the published mixture."""
    turns = (Turn(question="q", answer="a"),)
    counts = {folder: 0 for _, folder, _ in PARTS}
    for _, folder, count in PARTS:
        counts[folder] += count
    for folder, count in {**counts, **changes}.items():
        image = None if folder == "text only" else f"{folder}/1.jpg"
        yield from [Conversation(id="1", image=image, turns=turns)] * count


def test_the_published_mixture_is_recognised():
    report = check_mixture(published())
    assert {source.folder: source.found for source in report.sources} == {
        "coco/train2017": 364_100,
        "gqa/images": 72_140,
        "ocr_vqa/images": 80_000,
        "textvqa/train_images": 21_953,
        "vg": 86_417,
        "text only": 40_688,
    }
    assert sum(source.published for source in report.sources) == 665_298
    assert all(source.found == source.published for source in report.sources)
    assert report.sources[0].data_sets == ("LLaVA-Instruct", "VQA-v2", "A-OKVQA", "RefCOCO", "OKVQA")
    (leak,) = report.notes
    assert "RefCOCO, RefCOCO+ and RefCOCOg val" in leak


def test_a_part_of_the_published_mixture_is_told_from_another_one():
    report = check_mixture(published(**{"ocr_vqa/images": 79_645, "text only": 0}))
    assert report.notes[0] == (
        "this is not the whole published LLaVA-1.5 mixture: ocr_vqa/images 79,645 of 80,000, text only 0 of 40,688"
    )
    few = {folder: 1 for _, folder, _ in PARTS}
    assert [source.found for source in check_mixture(published(**few)).sources] == [1] * 6
    assert check_mixture(published(**{**few, "vg": 0})) is None
    assert check_mixture(published(**few, **{"sam/images": 1})) is None


def test_notes_of_the_published_mixture_come_with_it(tmp_path):
    folders = dict.fromkeys(folder for _, folder, _ in PARTS if folder != "text only")
    rows = [{**ROWS[0], "id": folder, "image": f"{folder}/1.jpg"} for folder in folders]
    notes = load_mixture(write(tmp_path / "llava_v1_5_mix665k.json", rows)).notes
    assert len(notes) == 2
    assert "coco/train2017 1 of 364,100" in notes[0]


def test_missing_images_are_found_and_ocr_vqa_covers_by_their_own_suffix(tmp_path):
    for name in ("ocr_vqa/images/1.jpg", "ocr_vqa/images/2.gif", "ocr_vqa/images/3.png", "gqa/images/2.gif", "0.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "vg/VG_100K/1.jpg").mkdir(parents=True)  # a folder is no image
    keys = [
        "0.jpg",
        "gqa/images/2.jpg",
        "vg/VG_100K/1.jpg",
        *(f"ocr_vqa/images/{n}.jpg" for n in range(1, 5)),
        "x/1.jpg",
    ]
    found = missing_images(keys, tmp_path)
    assert found.missing == ("gqa/images/2.jpg", "vg/VG_100K/1.jpg", "ocr_vqa/images/4.jpg", "x/1.jpg")
    assert found.renamed == {
        "ocr_vqa/images/2.jpg": "ocr_vqa/images/2.gif",
        "ocr_vqa/images/3.jpg": "ocr_vqa/images/3.png",
    }


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"id": "a\ud800"}, "id or image has half a character"),
        ({"image": "\udfff.jpg"}, "id or image has half a character"),
        ({"conversations": [message("human", "q"), message("gpt", "\ud83d")]}, "message 2 has half a character"),
    ],
)
def test_half_a_character_is_named_with_its_row(tmp_path, change, problem):
    """JSON has escapes for halves of characters; no text with one of them alone can be written or tokenised."""
    (tmp_path / "x.json").write_text(json.dumps([ROWS[0], {**ROWS[0], **change}]))
    with pytest.raises(DataError) as caught:
        load_mixture(str(tmp_path / "x.json"))
    assert caught.value.why.startswith(f"row 2: {problem}")
