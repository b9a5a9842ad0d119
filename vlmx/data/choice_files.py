"""Which questions, right options and images do the files of POPE and TallyQA name?

The probabilities of the options are asked for, not a text: yes or no for POPE, the letters A to P, which stand for the
counts 0 to 15, for TallyQA.

| file | form |
| --- | --- |
| POPE, three of them | lines {"question_id", "image": file name, "text": question, "label": "yes" or "no"} |
| TallyQA | [{"question_id", "image": "VG_100K_2/2410408.jpg", "question", "answer": count, "issimple", ...}] |
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmx.data.annotation_files import (
    id_of,
    parse_rows,
    read_json,
    read_json_lines,
    refuse_unanswered,
    rows_of,
    text_of,
    wrong_split,
)
from vlmx.data.downloads import POPE_SPLITS
from vlmx.data.records import Question
from vlmx.data.wording import COUNTS, LETTERS, Wording, count_as_option, short_answer

YES_OR_NO = ("Yes", "No")
_TALLYQA_WANTED = "TallyQA test, test.json"
_POPE_WANTED = "POPE on COCO val2014"


def pope_images(paths: Sequence[Path]) -> list[str]:
    """An image key for each question."""
    return [key for path in paths for key in parse_rows(path, read_json_lines(path), _pope_key)]


def _pope_key(row: Any) -> str:
    image = text_of(row, "image")
    if not image.startswith("COCO_val2014_"):
        raise ValueError(f"'{image}' is no photo of COCO val2014")
    return f"coco/val2014/{image}"


def pope_questions(name: str, paths: Sequence[Path], wording: Wording) -> list[Question]:
    """The random, the popular and the adversarial split, each in its file's order; ids are "SPLIT/question_id"."""
    questions: list[Question] = []
    for split, path in zip(POPE_SPLITS, paths, strict=True):
        rows = read_json_lines(path)
        refuse_unanswered(path, rows, "label", _POPE_WANTED)

        def question_of(row: Any, split: str = split) -> Question:
            label = text_of(row, "label")
            if label not in ("yes", "no"):
                raise ValueError(f"'label' is '{label}', neither yes nor no")
            return Question(
                id=f"{split}/{id_of(row, 'question_id')}",
                benchmark=name,
                image=_pope_key(row),
                prompt=short_answer(text_of(row, "text")),
                kind="text",
                question_type=split,
                answers=(label,),
                options=YES_OR_NO,
            )

        questions += parse_rows(path, rows, question_of)
    return questions


def tallyqa_images(paths: Sequence[Path]) -> list[str]:
    """An image key for each question."""
    (path,) = paths
    return parse_rows(path, rows_of(read_json(path)), _tallyqa_key)


def _tallyqa_key(row: Any) -> str:
    return f"vg/{row['image']}"


def tallyqa_questions(name: str, paths: Sequence[Path], wording: Wording) -> list[Question]:
    """In the order of the file; `question_type` is "simple" or "complex"."""
    (path,) = paths
    rows = rows_of(read_json(path))
    refuse_unanswered(path, rows, "answer", _TALLYQA_WANTED)
    foreign = [row["image"] for row in rows if isinstance(row, dict) and str(row.get("image", "")).startswith("train")]
    if foreign:
        why = f"{len(foreign):,} of its images are COCO's, e.g. {foreign[0]}, which only the training split has"
        raise wrong_split(path, why, _TALLYQA_WANTED)

    def question_of(row: Any) -> Question:
        count = str(row["answer"])
        if count not in COUNTS:
            raise ValueError(f"'answer' is {count}, not 0 to 15")
        if not isinstance(row["issimple"], bool):
            raise ValueError("'issimple' is neither true nor false")
        return Question(
            id=id_of(row, "question_id"),
            benchmark=name,
            image=_tallyqa_key(row),
            prompt=count_as_option(text_of(row, "question")),
            kind="text",
            question_type="simple" if row["issimple"] else "complex",
            answers=(count,),
            options=LETTERS,
        )

    return parse_rows(path, rows, question_of)
