"""Which questions, answers and images do the files of VQA-v2, GQA, VizWiz and TextVQA name?

For each data set there are two functions: NAME_images gives an image key for each example, NAME_questions the
questions. The key of an image is its path below the data root.

| file | form |
| --- | --- |
| VQA-v2 questions | {"data_subtype": "val2014", "questions": [{"question_id", "image_id", "question"}]} |
| VQA-v2 annotations | {"annotations": [{"question_id", "question_type", "answers": [10 x {"answer", ...}], ...}]} |
| GQA | {question id: {"imageId", "question", "answer", "types": {"structural", ...}, ...}} |
| VizWiz | [{"image", "question", "answers": [10 x {"answer", ...}], "answerable": 0 or 1, ...}] |
| TextVQA | {"data": [{"question_id", "image_id", "question", "answers": [10 texts], ...}]} |
| TextVQA with OCR | lines {"question_id": image id, "image", "text": question with OCR tokens}, in the same order |
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmx.data.annotation_files import (
    SHOWN,
    id_of,
    items_of,
    parse_rows,
    read_json,
    read_json_lines,
    refuse_unanswered,
    rows_of,
    text_of,
    wrong_split,
)
from vlmx.data.records import Question
from vlmx.data.wording import SHORT_ANSWER, Wording, short_answer, short_or_unanswerable, without_ocr
from vlmx.errors import DataError

ONE_TYPE = "all"  # of benchmarks whose questions are of one kind
_ANNOTATORS = 10  # who answered each question of VQA-v2, VizWiz and TextVQA
_REWORDED = 0.01  # the share of LLaVA's TextVQA questions that may be worded in another way than TextVQA's own
_VQAV2_WANTED = "VQA-v2 val2014"
_GQA_WANTED = "GQA testdev balanced, testdev_balanced_questions.json"
_VIZWIZ_WANTED = "VizWiz val, val.json"
_TEXTVQA_WANTED = "TextVQA val, TextVQA_0.5.1_val.json"


def coco_key(split: str, image_id: Any) -> str:
    """Key of a COCO photo of 2014, e.g. "coco/val2014/COCO_val2014_000000262148.jpg".

    Raises:
        ValueError: the id is no whole number, or a negative one.
    """
    digits = "" if isinstance(image_id, bool) or not isinstance(image_id, int | str) else str(image_id)
    if not (digits.isascii() and digits.isdecimal()):
        raise ValueError(f"'image_id' is {image_id!r}, not the number of a COCO photo")
    return f"coco/{split}/COCO_{split}_{int(digits):012d}.jpg"


def vqav2_images(paths: Sequence[Path]) -> list[str]:
    """An image key for each question."""
    (path,) = paths
    return parse_rows(path, rows_of(read_json(path), "questions"), lambda row: coco_key("val2014", row["image_id"]))


def vqav2_questions(name: str, paths: Sequence[Path], wording: Wording) -> list[Question]:
    """In the order of the questions' file; `question_type` is VQA-v2's own, e.g. "what color is the"."""
    path, annotated = paths
    content = _vqav2_content(path)
    by_id = _vqav2_annotations(annotated)
    rows = rows_of(content, "questions")
    asked = [str(row["question_id"]) for row in rows if isinstance(row, dict) and "question_id" in row]
    lacking = [question_id for question_id in asked if question_id not in by_id]
    if lacking:
        raise DataError(
            f"{len(lacking):,} of {len(rows):,} questions in {path} have no answers",
            why=f"{annotated} does not have {', '.join(lacking[:SHOWN])}: the two belong to different splits"
            " or versions",
            fix="fetch both files of val2014 again; `vlmx data check vqav2` says where they come from",
        )

    def question_of(row: Any) -> Question:
        question_id, key = id_of(row, "question_id"), coco_key("val2014", row["image_id"])
        image, kind, answers = by_id[question_id]
        if image is not None and str(image) != str(row["image_id"]):
            raise ValueError(f"{question_id} is about image {row['image_id']}; {annotated.name} has it about {image}")
        return Question(
            id=question_id,
            benchmark=name,
            image=key,
            prompt=short_answer(text_of(row, "question")),
            kind="text",
            question_type=kind,
            answers=answers,
        )

    return parse_rows(path, rows, question_of)


def _vqav2_content(path: Path) -> Any:
    content = read_json(path, object_hook=_only_answer)
    split = content.get("data_subtype", "val2014") if isinstance(content, dict) else "val2014"
    if split != "val2014":
        raise wrong_split(path, f"it says that it is '{split}'", _VQAV2_WANTED)
    info = content.get("info") if isinstance(content, dict) else None
    version = str(info.get("version", "")) if isinstance(info, dict) else ""
    if version == "1" or version.startswith("1."):
        raise wrong_split(path, f"it says that it is version {version} of VQA", _VQAV2_WANTED)
    if isinstance(content, dict) and str(content.get("data_type", "")).startswith("abstract"):
        raise wrong_split(path, f"it says that it is about '{content['data_type']}', not photos", _VQAV2_WANTED)
    return content


def _only_answer(item: dict[str, Any]) -> Any:
    """Of what one annotator said only the answer, equal ones once in memory: there are two million of these."""
    if "answer_id" not in item:
        return item
    answer = item.get("answer")
    return sys.intern(answer) if isinstance(answer, str) else item


def _vqav2_annotations(path: Path) -> dict[str, tuple[Any, str, tuple[str, ...]]]:
    """Question id -> its image's id (None if not said), its type and its answers; equal answers share memory."""
    same: dict[tuple[str, ...], tuple[str, ...]] = {}

    def entry(row: Any) -> tuple[str, tuple[Any, str, tuple[str, ...]]]:
        answers = _answers(row["answers"])  # texts only: see _only_answer
        kind = text_of(row, "question_type")
        return id_of(row, "question_id"), (row.get("image_id"), kind, same.setdefault(answers, answers))

    rows = rows_of(_vqav2_content(path), "annotations")
    refuse_unanswered(path, rows, "answers", _VQAV2_WANTED)
    entries = parse_rows(path, rows, entry)
    by_id = dict(entries)
    if len(by_id) < len(entries):
        raise DataError(
            f"{len(entries) - len(by_id):,} annotations in {path} are there twice",
            why="which answers are meant cannot be known",
            fix="fetch it again",
        )
    return by_id


def _answers(said: Any) -> tuple[str, ...]:
    """Answers of the ten annotators, from a list of texts.

    Raises:
        ValueError: there are more or fewer, or it is something else.
    """
    if not isinstance(said, list) or not said or not all(isinstance(answer, str) for answer in said):
        raise ValueError("'answers' are not those of annotators")
    if len(said) != _ANNOTATORS:
        raise ValueError(f"'answers' are those of {len(said)} annotators, not {_ANNOTATORS}")
    return tuple(said)


def gqa_images(paths: Sequence[Path]) -> list[str]:
    """An image key for each question."""
    (path,) = paths
    return parse_rows(path, items_of(read_json(path)), lambda item: _gqa_key(item[1]))


def _gqa_key(row: Any) -> str:
    return f"gqa/images/{row['imageId']}.jpg"


def gqa_questions(name: str, paths: Sequence[Path], wording: Wording) -> list[Question]:
    """In the order of the file; `question_type` is GQA's structural type: verify, query, choose, logical, compare."""
    (path,) = paths
    items = items_of(read_json(path))
    refuse_unanswered(path, [row for _, row in items], "answer", _GQA_WANTED)

    def question_of(item: tuple[str, Any]) -> Question:
        key, row = item
        return Question(
            id=key,
            benchmark=name,
            image=_gqa_key(row),
            prompt=short_answer(text_of(row, "question")),
            kind="text",
            question_type=str(row.get("types", {}).get("structural", ONE_TYPE)),
            answers=(text_of(row, "answer"),),
        )

    questions = parse_rows(path, items, question_of)
    if not any(question.image.startswith("gqa/images/n") for question in questions):
        why = f"the names of testdev's images begin with 'n'; none here does, e.g. {questions[0].image}"
        raise wrong_split(path, why, _GQA_WANTED)
    return questions


def vizwiz_images(paths: Sequence[Path]) -> list[str]:
    """An image key for each question."""
    (path,) = paths
    return parse_rows(path, rows_of(read_json(path)), _vizwiz_key)


def _vizwiz_key(row: Any) -> str:
    return f"vizwiz/val/{text_of(row, 'image')}"


def vizwiz_questions(name: str, paths: Sequence[Path], wording: Wording) -> list[Question]:
    """In the order of the file. A question has no id there: it gets its image's name, which no other question has."""
    (path,) = paths
    rows = rows_of(read_json(path))
    refuse_unanswered(path, rows, "answers", _VIZWIZ_WANTED)

    def question_of(row: Any) -> Question:
        return Question(
            id=text_of(row, "image"),
            benchmark=name,
            image=_vizwiz_key(row),
            prompt=short_or_unanswerable(text_of(row, "question")),
            kind="text",
            question_type="answerable" if int(row["answerable"]) else "unanswerable",
            answers=_answers([text_of(said, "answer") for said in row["answers"]]),
        )

    questions = parse_rows(path, rows, question_of)
    foreign = [q.id for q in questions if q.id.startswith(("VizWiz_train_", "VizWiz_test_"))]
    if foreign:
        raise wrong_split(
            path, f"{len(foreign):,} of its images are of another split, e.g. {foreign[0]}", _VIZWIZ_WANTED
        )
    return questions


def textvqa_images(paths: Sequence[Path]) -> list[str]:
    """An image key for each question."""
    (path,) = paths
    return parse_rows(path, rows_of(read_json(path), "data"), _textvqa_key)


def _textvqa_key(row: Any) -> str:
    return f"textvqa/train_images/{row['image_id']}.jpg"


def textvqa_questions(name: str, paths: Sequence[Path], wording: Wording) -> list[Question]:
    """In the order of the files, without the OCR tokens unless `name` is "textvqa_ocr".

    The wording of both is that of LLaVA's list, whose questions start with a capital letter. Where its text asks for a
    short answer at the end, as it mostly does, that is asked for twice, as in the paper's evaluation.
    """
    path, listed = paths
    content = read_json(path)
    rows, lines = rows_of(content, "data"), read_json_lines(listed)
    split = content.get("dataset_type", "val") if isinstance(content, dict) else "val"
    if split != "val":
        raise wrong_split(path, f"it says that it is '{split}'", _TEXTVQA_WANTED)
    refuse_unanswered(path, rows, "answers", _TEXTVQA_WANTED)
    if rows and len(rows) != len(lines):
        raise DataError(
            f"{listed} does not belong to {path}",
            why=f"it has {len(lines):,} lines for {len(rows):,} questions, and must have them in the same order",
            fix="fetch both again; `vlmx data check textvqa_ocr` says where they come from",
        )
    texts = parse_rows(listed, lines, lambda line: text_of(line, "text")) if rows else []

    def question_of(pair: tuple[Any, str]) -> Question:
        row, text = pair
        return Question(
            id=id_of(row, "question_id"),
            benchmark=name,
            image=_textvqa_key(row),
            prompt=short_answer(text if name == "textvqa_ocr" else without_ocr(text)),
            kind="text",
            question_type=ONE_TYPE,
            answers=_answers(row["answers"]),
        )

    questions = parse_rows(path, zip(rows, texts, strict=True), question_of)
    _refuse_another_list(path, listed, rows, lines)
    return questions


def _refuse_another_list(path: Path, listed: Path, rows: Sequence[Any], lines: Sequence[Any]) -> None:
    """Make sure that LLaVA's list asks in each line what TextVQA's file asks in its place.

    Compared are the image (`image`, or where a line has none its `question_id`, which is the image's or the question's)
    and the question, with which the line's text must begin: only its letters and digits, in whatever case. A question
    that TextVQA's file has in another place is out of order. One that it has nowhere is worded in another way; one in a
    hundred may be.

    Raises:
        DataError: an image or a question is out of order, too many are worded otherwise, or no line has OCR tokens.
    """
    asked = parse_rows(path, rows, lambda row: _letters(text_of(row, "question")))
    known = set(asked)
    if not any(without_ocr(line["text"]) != line["text"] for line in lines):
        raise DataError(
            f"{listed} is not LLaVA's list",
            why=f"none of its {len(lines):,} lines has a 'Reference OCR token:', the text that was read in the image",
            fix="fetch it again; `vlmx data check textvqa_ocr` says where it comes from",
        )

    def as_asked(of_line: tuple[str, Any, Any]) -> bool:
        question, row, line = of_line
        said = _letters(_question_of(line))
        image = str(row["image_id"])
        if "image" in line:
            about, right = Path(text_of(line, "image")).stem, {image}
        else:
            about, right = str(line.get("question_id", image)), {image, str(row["question_id"])}
        if about not in right:
            raise ValueError(f"it is about {about}, and {path.name} there about {image}")
        if not said.startswith(question) and said in known:
            raise ValueError(f"it asks what {path.name} asks in another place: {_question_of(line)}")
        return said.startswith(question)

    same = parse_rows(listed, zip(asked, rows, lines, strict=True), as_asked)
    if same.count(False) > _REWORDED * len(same):
        first = same.index(False)
        raise DataError(
            f"{listed} does not belong to {path}",
            why=f"{same.count(False):,} of its {len(same):,} questions are not in that file, the first in line"
            f" {first + 1}: {_question_of(lines[first])}",
            fix="fetch both again; `vlmx data check textvqa_ocr` says where they come from",
        )


def _question_of(line: Any) -> str:
    return without_ocr(line["text"]).removesuffix(SHORT_ANSWER)


def _letters(text: str) -> str:
    """What of a question is compared: neither case, nor spaces, nor a question mark."""
    return "".join(filter(str.isalnum, text.casefold()))
