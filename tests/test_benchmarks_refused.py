"""Which files do the loaders of the benchmarks refuse: missing, of another split, damaged, or with an id twice?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import FILES, changed_root, make_data_root, write_file

from vlmx.data.benchmarks import load_benchmark
from vlmx.data.published_benchmarks import PUBLISHED_BENCHMARKS
from vlmx.errors import DataError

VQAV2_QUESTIONS = "vqav2/v2_OpenEnded_mscoco_val2014_questions.json"
VQAV2_ANSWERS = "vqav2/v2_mscoco_val2014_annotations.json"
OCR = "textvqa/llava_textvqa_val_v051_ocr.jsonl"
TEXTVQA = "textvqa/TextVQA_0.5.1_val.json"
TALLYQA = "tallyqa/test.json"
RANDOM = "pope/coco_pope_random.json"
REFS, INSTANCES = "refcoco/refs(unc).p", "refcoco/instances.json"
OCID = "ocid-ref/val_expressions.json"


@pytest.mark.parametrize("name", PUBLISHED_BENCHMARKS)
def test_files_that_are_missing_are_named_with_their_source(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError) as caught:
        load_benchmark(name, root=tmp_path)
    for each in PUBLISHED_BENCHMARKS[name].files:
        assert f"{tmp_path / each.path}  from {each.url}" in caught.value.why
        assert each.mirror in caught.value.why
    assert "val2014.zip" not in caught.value.why  # photos are not needed to load questions


def unanswered(rows: list[dict[str, Any]], key: str) -> None:
    for row in rows:
        del row[key]


@pytest.mark.parametrize(
    ("name", "path", "change", "words"),
    [
        (
            "vqav2",
            VQAV2_QUESTIONS,
            lambda c: c.update(data_subtype="test-dev2015"),
            "it says that it is 'test-dev2015'",
        ),
        ("vqav2", VQAV2_ANSWERS, lambda c: c.update(data_subtype="train2014"), "it says that it is 'train2014'"),
        ("gqa", "gqa/testdev_balanced_questions.json", lambda c: unanswered(list(c.values()), "answer"), "'answer'"),
        ("vizwiz", "vizwiz/val.json", lambda c: unanswered(c, "answers"), "none of its 3 rows has 'answers'"),
        (
            "vizwiz",
            "vizwiz/val.json",
            lambda c: c[1].update(image="VizWiz_train_00000001.jpg"),
            "VizWiz_train_00000001",
        ),
        ("textvqa", TEXTVQA, lambda c: unanswered(c["data"], "answers"), "none of its 3 rows has 'answers'"),
        ("textvqa_ocr", TEXTVQA, lambda c: c.update(dataset_type="train"), "it says that it is 'train'"),
        ("pope", RANDOM, lambda c: unanswered(c, "label"), "none of its 4 rows has 'label'"),
        ("tallyqa", TALLYQA, lambda c: unanswered(c, "answer"), "none of its 3 rows has 'answer'"),
        (
            "tallyqa",
            TALLYQA,
            lambda c: c[0].update(image="train2014/COCO_train2014_000000000009.jpg"),
            "1 of its images",
        ),
        ("refcoco", REFS, lambda c: c.__setitem__(slice(None), [c[0], c[2]]), "it has only testA, train"),
        ("ocid_ref", OCID, lambda c: unanswered(list(c.values()), "bbox"), "none of its 3 rows has 'bbox'"),
    ],
)
def test_a_file_of_another_split_is_refused(
    tmp_path: Path, name: str, path: str, change: Callable[[Any], object], words: str
) -> None:
    data = changed_root(tmp_path, path, change)
    with pytest.raises(DataError) as caught:
        load_benchmark(name, root=data)
    assert caught.value.what == f"{data / path} is the annotation file of the wrong split"
    assert words in caught.value.why
    assert "vlmx data check" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "path", "change", "words"),
    [
        ("vqav2", VQAV2_QUESTIONS, lambda c: c["questions"][1].pop("question"), "1 of 4 rows .* row 2: no 'question'"),
        ("vqav2", VQAV2_QUESTIONS, lambda c: c["questions"][0].update(question=7), "'question' is int, not a text"),
        ("vqav2", VQAV2_ANSWERS, lambda c: c["annotations"][0].update(answers=[]), "'answers' are not those of"),
        ("vqav2", VQAV2_ANSWERS, lambda c: c["annotations"][0]["answers"][3].update(answer=2), "'answers' are not"),
        ("vqav2", VQAV2_ANSWERS, lambda c: c.update(annotations="x"), "the rows are not where"),
        ("gqa", "gqa/testdev_balanced_questions.json", lambda c: c["201307251"].update(answer=None), "not a text"),
        ("vizwiz", "vizwiz/val.json", lambda c: c[0].pop("answerable"), "row 1: no 'answerable'"),
        ("textvqa", TEXTVQA, lambda c: c["data"][2].update(answers=[1]), "row 3: 'answers' are not"),
        ("textvqa_ocr", OCR, lambda c: c[1].update(image="other.jpg"), "row 2: llava_.* asks about other.jpg"),
        ("textvqa_ocr", OCR, lambda c: c[1].pop("text"), "row 2: no 'text'"),
        ("pope", RANDOM, lambda c: c[3].update(label="maybe"), "row 4: 'label' is 'maybe', neither yes nor no"),
        ("tallyqa", TALLYQA, lambda c: c[0].update(answer=16), "'answer' is 16, not 0 to 15"),
        ("tallyqa", TALLYQA, lambda c: c[0].update(issimple="yes"), "'issimple' is neither true nor false"),
        ("tallyqa", TALLYQA, lambda c: c[0].update(question_id=None), "'question_id' is NoneType, not an id"),
        ("refcoco", INSTANCES, lambda c: c["annotations"].pop(2), "has no box 1719310 in image 581857"),
        ("refcoco", INSTANCES, lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "row 1: not enough values"),
        ("refcoco", INSTANCES, lambda c: c["images"][0].update(width=0), "an image of 0 x 42 pixels"),
        ("refcoco", REFS, lambda c: c[1]["sentences"][0].pop("sent"), "row 2: no 'sent'"),
        ("ocid_ref", OCID, lambda c: c["83"].update(bbox="[1, 2"), "row 2: Expecting"),
        ("ocid_ref", OCID, lambda c: c["83"].update(take_id=21), "'take_id' is 21, not 0 to 20"),
    ],
)
def test_damaged_rows_are_counted_and_named(
    tmp_path: Path, name: str, path: str, change: Callable[[Any], object], words: str
) -> None:
    data = changed_root(tmp_path, path, change)
    with pytest.raises(DataError, match=words):
        load_benchmark(name, root=data)


@pytest.mark.parametrize(
    ("name", "path", "change", "example"),
    [
        ("vqav2", VQAV2_QUESTIONS, lambda c: c["questions"].append(c["questions"][0]), "262148000"),
        ("vizwiz", "vizwiz/val.json", lambda c: c.append(c[2]), "VizWiz_val_00000002.jpg"),
        ("pope", RANDOM, lambda c: c[1].update(question_id=1), "random/1"),
        ("tallyqa", TALLYQA, lambda c: c[1].update(question_id=30095774), "30095774"),
        ("refcoco", REFS, lambda c: c[3]["sentences"][0].update(sent_id=4), "e.g. 4;"),
    ],
)
def test_two_questions_of_one_id_are_refused(
    tmp_path: Path, name: str, path: str, change: Callable[[Any], object], example: str
) -> None:
    data = changed_root(tmp_path, path, change)
    with pytest.raises(DataError, match=r"1 questions in .* are there more than once") as caught:
        load_benchmark(name, root=data)
    assert example in caught.value.why


def test_questions_without_annotation_are_counted(tmp_path: Path) -> None:
    data = changed_root(tmp_path, VQAV2_ANSWERS, lambda c: c["annotations"].pop(1))
    with pytest.raises(DataError, match=r"1 of 4 questions in .* have no answers") as caught:
        load_benchmark("vqav2", root=data)
    assert "does not have 262148000" in caught.value.why


def test_annotations_that_are_there_twice_are_refused(tmp_path: Path) -> None:
    data = changed_root(tmp_path, VQAV2_ANSWERS, lambda c: c["annotations"].append(c["annotations"][0]))
    with pytest.raises(DataError, match=r"1 annotations in .* are there twice"):
        load_benchmark("vqav2", root=data)


def test_the_ocr_list_must_be_as_long_as_the_questions(tmp_path: Path) -> None:
    data = changed_root(tmp_path, OCR, lambda c: c.pop())
    with pytest.raises(DataError, match="it has 2 lines for 3 questions"):
        load_benchmark("textvqa_ocr", root=data)


def places_in(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a file with each of its keys or positions; of long lists the first two."""
    keys = list(content) if isinstance(content, dict) else range(min(2, len(content)))
    for key in keys:
        yield content, key
        if isinstance(content[key], dict | list):
            yield from places_in(content[key])


@pytest.mark.parametrize("path", [path for path in FILES if not path.startswith(("refcoco+", "refcocog"))])
def test_whatever_stands_in_a_file_only_our_errors_come_up(tmp_path: Path, path: str) -> None:
    make_data_root(tmp_path, images=False)
    readers = [each for each in PUBLISHED_BENCHMARKS.values() if path in {file.path for file in each.files}]
    refused = 0
    content = copy.deepcopy(FILES[path])
    for container, key in list(places_in(content)):
        right = container[key]
        for wrong in (None, float("inf"), "x", [], {"a": [None]}, [[1, 2], "x", 3, 4]):
            container[key] = wrong
            write_file(tmp_path, path, content)
            for each in readers:
                try:
                    each.load(tmp_path, "default")
                except DataError:
                    refused += 1
        container[key] = right
    assert refused > 20


def test_pope_on_other_photos_is_refused(tmp_path: Path) -> None:
    root = changed_root(tmp_path, RANDOM, lambda rows: rows[0].update(image="COCO_train2014_000000000009.jpg"))
    with pytest.raises(DataError, match="is not the published file") as caught:
        load_benchmark("pope", root=root)
    assert "is no photo of COCO val2014" in caught.value.why
