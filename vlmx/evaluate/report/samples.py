"""Which questions does the page show, with which pictures? A fixed choice that includes failures."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmx.data.records import Box, Question
from vlmx.evaluate.compare import common
from vlmx.evaluate.metrics.boxes import parse_box
from vlmx.evaluate.report.collect import Report
from vlmx.evaluate.report.pictures import Picture, picture_of
from vlmx.evaluate.score import Grade

_MOST_LETTERS = 600  # of an answer, a question or a truth


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question with every run's answer.

    Attributes:
        asked: the question itself.
        benchmark: its name.
        why: what the runs did with it, e.g. "no run is right".
        question: the user's message without the sentences that every question of its kind carries.
        truth: the right answer as text; a box in parts of the photo.
        picture: the image; None if it is not at hand.
        image_wh: size of the image in pixels, where it is known.
        box: the true box in pixels of the source image; None for text questions.
        grades: by run name.
    """

    asked: Question
    benchmark: str
    why: str
    question: str
    truth: str
    picture: Picture | None
    image_wh: tuple[int, int] | None
    box: Box | None
    grades: Mapping[str, Grade]


Answers = Sequence[Grade]


def _right(grades: Answers) -> list[bool]:
    return [grade.value >= 0.5 for grade in grades]


_WANTED: dict[str, Callable[[Answers], bool]] = {
    "every run is right": lambda grades: all(_right(grades)),
    "only some runs are right": lambda grades: any(_right(grades)) and not all(_right(grades)),
    "no run is right": lambda grades: not any(_right(grades)) and all(grade.valid for grade in grades),
    "an answer that cannot be read": lambda grades: not all(grade.valid for grade in grades),
}
_ALONE = {"every run is right": "right", "no run is right": "wrong"}


def choose_samples(report: Report) -> list[Sample]:
    """For each benchmark a question that all runs answer right, one that some do, one that none does, and one with an
    answer that cannot be read, where they exist.

    Among the candidates the one with the smallest SHA-256 of its id is taken, so nobody picked it by looking. Questions
    that were not the same for all runs are no candidates.
    """
    samples = []
    pictures: dict[tuple[Path, str], Picture | None] = {}  # a photo is read, and what is wrong with it noted, once
    for benchmark in report.benchmarks:
        names = [run.name for run in report.runs if benchmark in run.grades]
        rows, _ = common([run.grades[benchmark] for run in report.runs if benchmark in run.grades])
        shared = sorted(zip(*rows, strict=True), key=lambda grades: _digest(grades[0].question.id))
        for why, wanted in _WANTED.items():
            chosen = next(filter(wanted, shared), None)
            if chosen is not None:
                shared.remove(chosen)
                question, root = chosen[0].question, report.data_roots[benchmark]
                if (root, question.image) not in pictures:
                    pictures[root, question.image] = picture_of(question, root)
                picture = pictures[root, question.image]
                said = _ALONE.get(why, why) if len(names) == 1 else why
                samples.append(_sample(question, picture, said, dict(zip(names, chosen, strict=True))))
    return samples


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sample(question: Question, picture: Picture | None, why: str, grades: Mapping[str, Grade]) -> Sample:
    return Sample(
        asked=question,
        benchmark=question.benchmark,
        why=why,
        question=_short(text_of(question)),
        truth=_box_text(*question.region) if question.kind == "box" else _short(_agreed(question.answers)),
        picture=picture,
        image_wh=picture.source_wh if picture else question.image_wh,
        box=question.box,
        grades=grades,
    )


def said(grade: Grade) -> str:
    """An answer as the page shows it: as it was written, unless it is long, and what an option's letter stands for.

    A box is in parts of the photo as the true one is. Models write theirs in parts of the encoder's input; where that
    is something else, it stands behind.
    """
    from vlmx.evaluate.metrics import rule_of
    from vlmx.evaluate.metrics.rule import OptionRule

    if grade.box is not None:
        in_photo = _box_text(grade.box, grade.question.region[1])
        return in_photo if parse_box(grade.text) == parse_box(in_photo) else f"{in_photo}, written {_short(grade.text)}"
    rule = rule_of(grade.question.benchmark)
    if not (grade.question.options and isinstance(rule, OptionRule)):
        return _short(grade.text)
    read = rule.clean_prediction(grade.text) if grade.probabilities is None else rule.chosen(grade.probabilities)
    return _short(grade.text if read.casefold() == grade.text.casefold() else f"{grade.text} = {read}")


def _short(text: str) -> str:
    more = len(text) - _MOST_LETTERS
    return _visible(text) if more <= 0 else f"{_visible(text[:_MOST_LETTERS])}… ({more:,} more characters)"


def _visible(text: str) -> str:
    r"""The text with control characters and halves of characters, which no page may hold, as \x00 or \ud800."""
    return "".join(_escaped(c) if unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n\r" else c for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def text_of(question: Question) -> str:
    """What is asked, without the sentences that every question of its kind carries."""
    from vlmx.data.mini.questions import BOX_REQUEST

    return question.prompt.removeprefix(BOX_REQUEST).strip().partition("\n")[0].strip()


def _agreed(answers: Sequence[str]) -> str:
    """Accepted answers, those of most annotators first: "red × 7, maroon × 3"."""
    counts = Counter(answers).most_common()
    return ", ".join(answer if len(answers) == 1 else f"{answer} \N{MULTIPLICATION SIGN} {n}" for answer, n in counts)


def _box_text(box: Box, image_wh: tuple[int, int]) -> str:
    (x1, y1, x2, y2), (width, height) = box, image_wh
    parts = (x1 / width, y1 / height, x2 / width, y2 / height)
    return "[" + ", ".join(f"{round(part, 2) + 0:.2f}" for part in parts) + "]"  # + 0: no minus before a zero
