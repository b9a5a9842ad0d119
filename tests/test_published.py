"""Do published data sets name their images as their published files do, and say what is missing?"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from vlmx.data.published import PUBLISHED
from vlmx.errors import DataError
from vlmx.extract.sources import open_source, open_sources

VAL2014 = "coco/val2014/COCO_val2014_000000262148.jpg"
TRAIN2014 = "coco/train2014/COCO_train2014_000000581857.jpg"


def ref(split: str, image_id: int, sentences: int) -> dict[str, Any]:
    texts = [{"tokens": ["left", "man"], "raw": "left man", "sent_id": i, "sent": "left man"} for i in range(sentences)]
    return {
        "sent_ids": list(range(sentences)),
        "file_name": f"COCO_train2014_{image_id:012d}_16.jpg",
        "ann_id": 1,
        "ref_id": 0,
        "image_id": image_id,
        "split": split,
        "sentences": texts,
        "category_id": 1,
    }


REFS = [ref("train", 1, 2), ref("val", 581857, 3), ref("testA", 2, 1), ref("val", 581857, 1)]

# Name -> its annotation files in the published form, and the image of each example that has one.
SAMPLES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "vqav2": (
        {
            "vqav2/v2_OpenEnded_mscoco_val2014_questions.json": {
                "info": {},
                "task_type": "Open-Ended",
                "data_type": "mscoco",
                "license": {},
                "data_subtype": "val2014",
                "questions": [
                    {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000},
                    {"image_id": 262148, "question": "What are they doing?", "question_id": 262148001},
                ],
            }
        },
        [VAL2014, VAL2014],
    ),
    "gqa": (
        {
            "gqa/testdev_balanced_questions.json": {
                "201307251": {"imageId": "n161313", "question": "Is it overcast?", "answer": "no", "isBalanced": True},
                "201640614": {"imageId": "n235859", "question": "Who is wearing the dress?", "answer": "woman"},
            }
        },
        ["gqa/images/n161313.jpg", "gqa/images/n235859.jpg"],
    ),
    "vizwiz": (
        {
            "vizwiz/val.json": [
                {
                    "image": "VizWiz_val_00000000.jpg",
                    "question": "Ok. There is another picture I hope it is a better one.",
                    "answers": [{"answer_confidence": "yes", "answer": "unanswerable"}],
                    "answer_type": "unanswerable",
                    "answerable": 0,
                }
            ]
        },
        ["vizwiz/val/VizWiz_val_00000000.jpg"],
    ),
    "textvqa": (
        {
            "textvqa/TextVQA_0.5.1_val.json": {
                "dataset_type": "val",
                "dataset_name": "textvqa",
                "dataset_version": "0.5.1",
                "data": [
                    {
                        "question": "what is the brand of this camera?",
                        "image_id": "003a8ae2ef43b901",
                        "image_width": 1024,
                        "image_height": 664,
                        "question_id": 34602,
                        "answers": ["dakota"] * 10,
                        "set_name": "val",
                    }
                ],
            }
        },
        ["textvqa/train_images/003a8ae2ef43b901.jpg"],
    ),
    "pope": (
        {
            f"pope/coco_pope_{split}.json": [
                {
                    "question_id": 1,
                    "image": "COCO_val2014_000000262148.jpg",
                    "text": "Is there a snowboard in the image?",
                    "label": "yes",
                }
            ]
            for split in ("random", "popular", "adversarial")
        },
        [VAL2014] * 3,
    ),
    "tallyqa": (
        {
            "tallyqa/test.json": [
                {
                    "answer": 2,
                    "data_source": "imported_genome",
                    "image": "VG_100K_2/2410408.jpg",
                    "image_id": 2410408,
                    "question": "How many cats are there?",
                    "question_id": 30096832,
                    "issimple": True,
                },
                {"answer": 1, "image": "VG_100K/2.jpg", "image_id": 2, "question": "How many?", "question_id": 3},
            ]
        },
        ["vg/VG_100K_2/2410408.jpg", "vg/VG_100K/2.jpg"],
    ),
    "refcoco": ({"refcoco/refs(unc).p": REFS}, [TRAIN2014] * 4),
    "refcoco+": ({"refcoco+/refs(unc).p": REFS}, [TRAIN2014] * 4),
    "refcocog": ({"refcocog/refs(umd).p": REFS}, [TRAIN2014] * 4),
    "ocid-ref": (
        {
            "ocid-ref/val_expressions.json": {
                "17": {
                    "take_id": 3,
                    "scene_path": "ARID20/floor/left/seq01/rgb/result_2018-08-20-11-45-11.png",
                    "sub_dataset": "ARID20",
                    "sentence": "The apple on the left.",
                    "bbox": "[12, 30, 60, 80]",
                }
            }
        },
        ["ocid-ref/OCID-dataset/ARID20/floor/left/seq01/rgb/result_2018-08-20-11-45-11.png"],
    ),
    "llava-665k": (
        {
            "llava-665k/llava_v1_5_mix665k.json": [
                {"id": "000000033471", "image": "coco/train2017/000000033471.jpg", "conversations": []},
                {"id": "wgByO4Y_0", "model": "gpt4", "conversations": []},
                {"id": "1", "image": "ocr_vqa/images/140031996.jpg", "conversations": []},
                {"id": "2", "image": "coco/train2017/000000033471.jpg", "conversations": []},
            ]
        },
        ["coco/train2017/000000033471.jpg", "ocr_vqa/images/140031996.jpg", "coco/train2017/000000033471.jpg"],
    ),
}


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".p":
        path.write_bytes(pickle.dumps(content, protocol=0))
    elif path.parent.name == "pope":
        path.write_text("".join(json.dumps(line) + "\n" for line in content))
    else:
        path.write_text(json.dumps(content))


def lay_out(name: str, root: Path) -> None:
    """The files of a small data set, where they belong; the photos are their own names."""
    files, keys = SAMPLES[name]
    for path, content in files.items():
        write(root / path, content)
    for folder in PUBLISHED[name].images:
        (root / folder.path).mkdir(parents=True, exist_ok=True)
    for key in keys:
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_text(key)


def test_every_published_data_set_has_a_sample_here() -> None:
    assert list(SAMPLES) == list(PUBLISHED)


@pytest.mark.parametrize("name", SAMPLES)
def test_images_are_the_ones_that_the_published_files_name(tmp_path: Path, name: str) -> None:
    lay_out(name, tmp_path)
    _, keys = SAMPLES[name]
    assert PUBLISHED[name].keys(tmp_path) == keys
    (source,) = open_sources([name], data_root=tmp_path)
    assert [record.key for record in source.images] == list(dict.fromkeys(keys))
    assert all(record.load() == record.key.encode() for record in source.images)
    assert source.name == ("llava_v1_5_mix665k" if name == "llava-665k" else name)
    assert f"{len(keys):,} examples (published: {PUBLISHED[name].examples:,})" in source.describe


@pytest.mark.parametrize("name", SAMPLES)
def test_everything_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    published = PUBLISHED[name]
    with pytest.raises(DataError) as caught:
        open_sources([name], data_root=tmp_path)
    for each in (*published.annotations, *published.images):
        assert f"{tmp_path / each.path}  from {each.url}" in caught.value.why
    assert "--data-root" in caught.value.fix


def test_what_several_data_sets_lack_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_sources(["vqav2,pope", "refcoco"], data_root=tmp_path)
    assert "7 files or folders" in caught.value.what
    assert caught.value.why.count("val2014.zip") == 1


def test_photos_that_are_missing_are_counted(tmp_path: Path) -> None:
    lay_out("tallyqa", tmp_path)
    (tmp_path / "vg/VG_100K_2/2410408.jpg").unlink()
    with pytest.raises(DataError) as caught:
        open_sources(["tallyqa"], data_root=tmp_path)
    assert "1 of 2 images of TallyQA test are missing" in caught.value.what
    assert "vg/VG_100K_2/2410408.jpg" in caught.value.why
    assert "images2.zip" in caught.value.fix
    assert "images.zip" not in caught.value.fix


def test_data_sets_share_their_photos(tmp_path: Path) -> None:
    for name in ("vqav2", "pope"):
        lay_out(name, tmp_path)
    sources = open_sources(["vqav2,pope"], data_root=tmp_path)
    assert [record.key for source in sources for record in source.images] == [VAL2014, VAL2014]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "vqav2",
            {"questions": [{"image_id": 1}, {"question": "?"}]},
            "1 of 2 rows have another form: row 2: no 'image_id'",
        ),
        ("vqav2", [{"image_id": 1}], "the rows are not where they are in the published one"),
        ("gqa", {"1": {"imageId": "n1"}, "2": "x"}, "1 of 2 rows"),
        ("vizwiz", {"image": "x"}, "the rows are not where"),
        ("refcoco", [{"image_id": 1, "split": "val"}], "no 'sentences'"),
        ("refcoco", [ref("train", 1, 1)], "names no image"),
        ("ocid-ref", {}, "the rows are not where"),
        ("llava-665k", ["x"], "1 of 1 rows"),
    ],
)
def test_another_file_under_the_published_name_is_refused(tmp_path: Path, name: str, content: Any, words: str) -> None:
    lay_out(name, tmp_path)
    write(tmp_path / PUBLISHED[name].annotations[0].path, content)
    with pytest.raises(DataError, match=words):
        open_sources([name], data_root=tmp_path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    for name, path in (
        ("vqav2", "vqav2/v2_OpenEnded_mscoco_val2014_questions.json"),
        ("refcoco", "refcoco/refs(unc).p"),
    ):
        lay_out(name, tmp_path)
        whole = (tmp_path / path).read_bytes()
        (tmp_path / path).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match="cannot read"):
            open_sources([name], data_root=tmp_path)


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def test_a_pickle_executes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lay_out("refcoco", tmp_path)
    write(tmp_path / "refcoco/refs(unc).p", [*REFS, Attack()])
    with pytest.raises(DataError, match=r"it refers to .*getattr"):
        open_sources(["refcoco"], data_root=tmp_path)
    assert not Path("executed").exists()


def test_python_2_pickles_are_read(tmp_path: Path) -> None:
    """As the published files are: texts are byte strings of Python 2."""
    lay_out("refcoco", tmp_path)
    (tmp_path / "refcoco/refs(unc).p").write_bytes(
        b"(lp0\n(dp1\nS'image_id'\np2\nI581857\nsS'split'\np3\nS'val'\np4\nsS'sentences'\np5\n(lp6\n(dp7\nS'raw'\np8\n"
        b"S'caf\\xc3\\xa9'\np9\nsasa."
    )
    assert PUBLISHED["refcoco"].keys(tmp_path) == [TRAIN2014]


def test_a_folder_of_the_name_is_given_as_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gqa").mkdir()
    (tmp_path / "gqa" / "a.png").write_bytes(b"x")
    assert "folder gqa: 1 images" in open_source("./gqa").describe
    with pytest.raises(DataError, match="files or folders of published data are missing below data"):
        open_source("gqa")


def test_the_real_pope_files_name_500_photos() -> None:
    folder = Path(__file__).parents[2] / "shared" / "data" / "pope"
    if not folder.is_dir():
        pytest.skip("the POPE files are not beside this checkout")
    paths = [folder / Path(each.path).name for each in PUBLISHED["pope"].annotations]
    keys = PUBLISHED["pope"].image_keys(paths)
    assert len(keys) == 9000
    assert len(set(keys)) == 500
    assert all(key.startswith("coco/val2014/COCO_val2014_") for key in keys)
