"""Which questions does the page show, with which pictures? A fixed choice that includes failures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vlmx.data.records import Box, Question
from vlmx.evaluate.report.collect import Report
from vlmx.evaluate.report.pictures import data_uri, png_of_ppm
from vlmx.evaluate.score import Grade


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question with every run's answer.

    Attributes:
        benchmark: its name.
        question: the user's message without the sentences that every question of its kind carries.
        truth: the right answer as text.
        picture: data URI of the image; empty if the image is not at hand.
        image_wh: size of the image in pixels, where it is known.
        box: the true box in pixels of the source image; None for text questions.
        grades: by run name.
    """

    benchmark: str
    question: str
    truth: str
    picture: str
    image_wh: tuple[int, int] | None
    box: Box | None
    grades: Mapping[str, Grade]


Hits = Sequence[bool]
_WANTED: dict[str, Callable[[Hits], bool]] = {
    "all right": all,
    "some right": lambda hits: any(hits) and not all(hits),
    "all wrong": lambda hits: not any(hits),
}


def choose_samples(report: Report) -> list[Sample]:
    """For each benchmark a question that all runs answer right, one that some do, one that none does, where they exist.

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
        for wanted in _WANTED.values():
            fits = (qid for qid in shared if wanted([grades[qid].value >= 0.5 for grades in by_run.values()]))
            chosen = next(fits, None)
            if chosen is not None:
                samples.append(
                    _sample(first[chosen].question, {name: grades[chosen] for name, grades in by_run.items()})
                )
    return samples


def _sample(question: Question, grades: Mapping[str, Grade]) -> Sample:
    from vlmx.data.mini.questions import BOX_REQUEST
    from vlmx.data.mini.study import BENCHMARKS, image_bytes_of

    at_hand = question.benchmark in BENCHMARKS
    return Sample(
        benchmark=question.benchmark,
        question=question.prompt.removeprefix(BOX_REQUEST).partition("\n")[0].strip(),
        truth=_box_text(question) if question.kind == "box" else ", ".join(dict.fromkeys(question.answers)),
        picture=data_uri(png_of_ppm(image_bytes_of(question.image))) if at_hand else "",
        image_wh=question.image_wh,
        box=question.box,
        grades=grades,
    )


def _box_text(question: Question) -> str:
    (x1, y1, x2, y2), (width, height) = question.region
    return f"[{x1 / width:.2f}, {y1 / height:.2f}, {x2 / width:.2f}, {y2 / height:.2f}]"
