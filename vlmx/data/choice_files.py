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
from itertools import combinations
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
from vlmx.errors import DataError

YES_OR_NO = ("Yes", "No")
_TALLYQA_WANTED = "TallyQA test, test.json"
_POPE_WANTED = "POPE on COCO val2014"
_BY_CHANCE = 20  # the first lines of two splits may be the same: popular and adversarial share half of their objects


def pope_images(paths: Sequence[Path]) -> list[str]:
    """An image key for each question."""
    return [key for path in paths for key in parse_rows(path, read_json_lines(path), _pope_key)]


def _pope_key(row: Any) -> str:
    image = text_of(row, "image")
    if not image.startswith("COCO_val2014_"):
        raise ValueError(f"'{image}' is no photo of COCO val2014")
    return f"coco/val2014/{image}"


def pope_questions(name: str, paths: Sequence[Path], wording: Wording) -> list[Question]:
    """The random, the popular and the adversarial split, each in its file's order; ids are "SPLIT/question_id".

    Raises:
        DataError: a file is damaged or of another split, or two of 20 questions or more are the same split.
    """
    splits: list[list[Question]] = []
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

        splits.append(parse_rows(path, rows, question_of))
    _refuse_copied(paths, splits)
    return [question for questions in splits for question in questions]


def _refuse_copied(paths: Sequence[Path], splits: Sequence[Sequence[Question]]) -> None:
    """Make sure that no split is there under the names of two."""
    asked = [{(question.image, question.prompt, question.answers) for question in split} for split in splits]
    for (path, some), (other, others) in combinations(zip(paths, asked, strict=True), 2):
        if some == others and len(some) >= _BY_CHANCE:
            raise DataError(
                f"{path} and {other} are the same split",
                why=f"they ask the same {len(some):,} questions; the published ones name other absent objects",
                fix="fetch both again; `vlmx data check pope` says where they come from",
            )


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
