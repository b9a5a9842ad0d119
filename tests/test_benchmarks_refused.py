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
GQA = "gqa/testdev_balanced_questions.json"
TALLYQA = "tallyqa/test.json"
RANDOM, ADVERSARIAL = "pope/coco_pope_random.json", "pope/coco_pope_adversarial.json"
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
        ("vqav2", VQAV2_QUESTIONS, lambda c: c["info"].update(version="1.0"), "it says that it is version 1.0 of VQA"),
        ("vqav2", VQAV2_ANSWERS, lambda c: c.update(data_type="abstract_v002"), "'abstract_v002', not photos"),
        ("gqa", GQA, lambda c: unanswered(list(c.values()), "answer"), "'answer'"),
        ("gqa", GQA, lambda c: [row.update(imageId="2370799") for row in c.values()], "e.g. gqa/images/2370799.jpg"),
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
        ("textvqa", TEXTVQA, lambda c: c["data"][2]["answers"].pop(), "row 3: 'answers' are those of 9 annotators"),
        ("vqav2", VQAV2_ANSWERS, lambda c: c["annotations"][0]["answers"].pop(), "row 1: .* of 9 annotators, not 10"),
        ("vqav2", VQAV2_ANSWERS, lambda c: c["annotations"][0].update(image_id=1), "row 4: .* has it about 1"),
        ("vqav2", VQAV2_QUESTIONS, lambda c: c["questions"][0].update(image_id=262148.7), "row 1: 'image_id' is 2621"),
        ("vqav2", VQAV2_QUESTIONS, lambda c: c["questions"][0].update(image_id=-5), "row 1: 'image_id' is -5, not the"),
        ("vizwiz", "vizwiz/val.json", lambda c: c[1]["answers"].pop(), "row 2: 'answers' are those of 9 annotators"),
        ("textvqa_ocr", OCR, lambda c: c[1].update(image="other.jpg"), "row 2: it is about other, and TextVQA"),
        ("textvqa_ocr", OCR, lambda c: c[1].pop("text"), "ocr.jsonl is not the published file; .* row 2: no 'text'"),
        ("pope", RANDOM, lambda c: c[3].update(label="maybe"), "row 4: 'label' is 'maybe', neither yes nor no"),
        ("tallyqa", TALLYQA, lambda c: c[0].update(answer=16), "'answer' is 16, not 0 to 15"),
        ("tallyqa", TALLYQA, lambda c: c[0].update(issimple="yes"), "'issimple' is neither true nor false"),
        ("tallyqa", TALLYQA, lambda c: c[0].update(question_id=None), "'question_id' is NoneType, not an id"),
        ("refcoco", INSTANCES, lambda c: c["annotations"].pop(2), "has no box 1719310 in image 581857"),
        (
            "refcoco",
            INSTANCES,
            lambda c: c["annotations"][2].update(image_id=98304),
            "has no box 1719310 in image 5818",
        ),
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


def without_image(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        del line["image"]


@pytest.mark.parametrize("name", ["textvqa_ocr", "textvqa"])
def test_an_ocr_list_in_another_order_is_refused(tmp_path: Path, name: str) -> None:
    def swapped(lines: list[dict[str, Any]]) -> None:  # two questions about one image
        lines[0], lines[1] = lines[1], lines[0]

    with pytest.raises(DataError, match=r"row 1: it asks what .* in another place: Is this camera digital\?"):
        load_benchmark(name, root=changed_root(tmp_path / "swapped", OCR, swapped))

    def turned(lines: list[dict[str, Any]]) -> None:
        without_image(lines)
        lines.reverse()

    with pytest.raises(DataError, match="row 1: it is about 00a9f1b8b4e4b4e7, and TextVQA"):
        load_benchmark(name, root=changed_root(tmp_path / "turned", OCR, turned))


@pytest.mark.parametrize("change", [lambda line: line.update(question_id=34603), lambda line: line.pop("question_id")])
def test_an_ocr_list_may_name_no_image(tmp_path: Path, change: Callable[[Any], object]) -> None:
    def nameless(lines: list[dict[str, Any]]) -> None:
        without_image(lines)
        change(lines[1])

    assert len(load_benchmark("textvqa_ocr", root=changed_root(tmp_path, OCR, nameless))) == 3


def test_an_ocr_list_without_any_mark_is_refused(tmp_path: Path) -> None:
    def plain(lines: list[dict[str, Any]]) -> None:
        for line in lines:
            line["text"] = line["text"].replace("\nReference OCR token:", " OCR:")

    with pytest.raises(DataError, match="none of its 3 lines has a 'Reference OCR token:'"):
        load_benchmark("textvqa", root=changed_root(tmp_path, OCR, plain))


@pytest.mark.parametrize(("others", "read"), [(2, True), (3, False)])
def test_an_ocr_list_may_word_one_question_in_a_hundred_in_another_way(tmp_path: Path, others: int, read: bool) -> None:
    rows, lines = FILES[TEXTVQA]["data"], FILES[OCR]
    write_file(
        tmp_path, TEXTVQA, {"data": [{**rows[1], "question_id": n, "question": f"what is {n} ?"} for n in range(200)]}
    )
    marked = "\nReference OCR token: A"
    texts = [f"Which is {n}?" + marked if n < others else f"What  is {n}" + marked * (n != 9) for n in range(200)]
    write_file(tmp_path, OCR, [{**lines[1], "text": text} for text in texts])
    if read:
        assert [q.prompt[:12] for q in load_benchmark("textvqa", root=tmp_path)][1:3] == [
            "Which is 1?\n",
            "What  is 2\nA",
        ]
    else:
        with pytest.raises(DataError, match=r"3 of its 200 questions are not in that file, .* line 1: Which is 0\?"):
            load_benchmark("textvqa", root=tmp_path)


@pytest.mark.parametrize("copied", [RANDOM, ADVERSARIAL])
def test_a_split_of_pope_copied_over_another_is_refused(tmp_path: Path, copied: str) -> None:
    for split in ("random", "popular", "adversarial"):
        write_file(tmp_path, f"pope/coco_pope_{split}.json", pope_rows(split))
    assert len(load_benchmark("pope", root=tmp_path)) == 60
    write_file(tmp_path, copied, pope_rows("popular"))
    with pytest.raises(DataError, match="are the same split; they ask the same 20 questions") as caught:
        load_benchmark("pope", root=tmp_path)
    assert str(tmp_path / copied) in caught.value.what
    assert str(tmp_path / "pope/coco_pope_popular.json") in caught.value.what


def pope_rows(absent: str) -> list[dict[str, Any]]:
    """20 lines: is a cat in the image, and is `absent`?"""
    return [
        {
            "question_id": n,
            "image": f"COCO_val2014_{n // 2:012d}.jpg",
            "text": f"Is there a {absent if n % 2 else 'cat'} in the image?",
            "label": "no" if n % 2 else "yes",
        }
        for n in range(20)
    ]


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
