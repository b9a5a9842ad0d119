"""Which questions does the page show, with which pictures? A fixed choice that includes failures."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vlmx.data.records import Box, Question
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
        truth: the right answer as text.
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

    Among the candidates the one with the smallest SHA-256 of its id is taken, so nobody picked it by looking.
    """
    samples = []
    for benchmark in report.benchmarks:
        by_run = {
            run.name: {g.question.id: g for g in run.grades[benchmark]}
            for run in report.runs
            if benchmark in run.grades
        }
        first = next(iter(by_run.values()))
        shared = [qid for qid in first if all(qid in grades for grades in by_run.values())]
        shared.sort(key=lambda qid: hashlib.sha256(qid.encode()).hexdigest())
        taken: set[str] = set()
        for why, wanted in _WANTED.items():
            fits = (qid for qid in shared if qid not in taken and wanted([grades[qid] for grades in by_run.values()]))
            chosen = next(fits, None)
            if chosen is not None:
                taken.add(chosen)
                said = _ALONE.get(why, why) if len(by_run) == 1 else why
                samples.append(_sample(report, said, {name: grades[chosen] for name, grades in by_run.items()}))
    return samples


def _sample(report: Report, why: str, grades: Mapping[str, Grade]) -> Sample:
    question = next(iter(grades.values())).question
    picture = picture_of(question, report.data_roots[question.benchmark])
    return Sample(
        asked=question,
        benchmark=question.benchmark,
        why=why,
        question=_short(text_of(question)),
        truth=_box_text(question) if question.kind == "box" else _short(_agreed(question.answers)),
        picture=picture,
        image_wh=picture.source_wh if picture else question.image_wh,
        box=question.box,
        grades=grades,
    )


def said(grade: Grade) -> str:
    """An answer as the page shows it: as it was written, unless it is long, and what an option's letter stands for."""
    from vlmx.evaluate.metrics import rule_of
    from vlmx.evaluate.metrics.rule import OptionRule

    rule = rule_of(grade.question.benchmark)
    if not (grade.question.options and isinstance(rule, OptionRule)):
        return _short(grade.text)
    read = rule.clean_prediction(grade.text) if grade.probabilities is None else rule.chosen(grade.probabilities)
    return _short(grade.text if read.casefold() == grade.text.casefold() else f"{grade.text} = {read}")


def _short(text: str) -> str:
    more = len(text) - _MOST_LETTERS
    return text if more <= 0 else f"{text[:_MOST_LETTERS]}… ({more:,} more characters)"


def text_of(question: Question) -> str:
    """What is asked, without the sentences that every question of its kind carries."""
    from vlmx.data.mini.questions import BOX_REQUEST

    return question.prompt.removeprefix(BOX_REQUEST).strip().partition("\n")[0].strip()


def _agreed(answers: Sequence[str]) -> str:
    """Accepted answers, those of most annotators first: "red × 7, maroon × 3"."""
    counts = Counter(answers).most_common()
    return ", ".join(answer if len(answers) == 1 else f"{answer} \N{MULTIPLICATION SIGN} {n}" for answer, n in counts)


def _box_text(question: Question) -> str:
    (x1, y1, x2, y2), (width, height) = question.region
    return f"[{x1 / width:.2f}, {y1 / height:.2f}, {x2 / width:.2f}, {y2 / height:.2f}]"
