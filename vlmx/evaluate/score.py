"""What are the answers of a run worth? A pure function of answers and annotations; it can be run alone and again.

Scores are in percent. An answer that cannot be read counts as wrong and is counted; a score over fewer questions than
the benchmark has is marked as partial.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Literal

from vlmx.cache_specs.catalog import backbone_of
from vlmx.cache_specs.geometry import Geometry, convert_box
from vlmx.data.records import Box, Question
from vlmx.errors import RunError
from vlmx.evaluate.answers import Answer, Control, Header, answered_benchmarks, answers_path, read_answers
from vlmx.evaluate.baselines import HIT_IOU, baselines_of
from vlmx.evaluate.intervals import interval95
from vlmx.evaluate.metrics import RULE_TEXT, SCORERS, rule_of
from vlmx.evaluate.metrics.boxes import iou, parse_box
from vlmx.runs import RunFolder, write_json

BoxRule = Literal["exact", "paper"]
_BOX_RULE_TEXT: Mapping[BoxRule, str] = {
    "exact": "IoU >= 0.5 after the answer was converted from the encoder's input to the source image",
    "paper": "IoU >= 0.5 as the paper's evaluation takes it: letterbox ignored, true box rounded to two decimals",
}


@dataclass(frozen=True, kw_only=True)
class Grade:
    """What one answer is worth.

    Attributes:
        question: the question.
        text: the answer as the model wrote it.
        value: 0..1.
        valid: False for an empty answer and for a box that is none.
        overlap: IoU with the true box; None for text questions.
        box: the answered box in pixels of the source image; None for text questions and invalid answers.
    """

    question: Question
    text: str
    value: float
    valid: bool
    overlap: float | None = None
    box: Box | None = None


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score of a run on one benchmark; the content of scores.json.

    Attributes:
        benchmark, kind, control: what was asked, and under which control.
        metric: the rule in words.
        score: percent.
        interval95: bootstrap over images, percent.
        n: number of answers scored.
        expected: number of questions of the benchmark; `partial` if n is smaller.
        invalid: number of answers that could not be read; they count as wrong.
        baselines: percent by name (see baselines.py), over the same questions.
        details: boxes: "iou25" (percent at IoU 0.25) and "mean_iou" (percent); text: percent by question type.
        model, cache, fingerprint, encoder_weights, prompt_format: what the answers were made with.
    """

    benchmark: str
    kind: Literal["text", "box"]
    control: Control
    metric: str
    score: float
    interval95: tuple[float, float]
    n: int
    expected: int
    partial: bool
    invalid: int
    baselines: Mapping[str, float]
    details: Mapping[str, float] = field(default_factory=dict)
    model: str
    cache: str
    fingerprint: str
    encoder_weights: str
    prompt_format: str

    @property
    def encoder(self) -> str:
        """Name of the encoder, or of joined ones with + between them, marked when the weights of any are random."""
        name = backbone_of(self.cache)
        return f"{name} (untrained)" if "random:" in self.encoder_weights else name


def grade(question: Question, text: str, geometry: Geometry, *, box_rule: BoxRule = "exact") -> Grade:
    """Compare one answer with the annotation.

    Args:
        question: its benchmark's name chooses the text rule (see metrics).
        text: the answer as the model wrote it.
        geometry: how the images were brought to the encoder's size; answered boxes are in parts of that input.
        box_rule: "paper" takes answered boxes as parts of the source image and rounds the true box to two decimals.
    """
    if question.kind == "text":
        value = SCORERS[rule_of(question.benchmark)](text, question.answers)
        return Grade(question=question, text=text, value=value, valid=bool(text.strip()))
    assert question.box is not None
    answered = parse_box(text)
    if answered is None:
        return Grade(question=question, text=text, value=0.0, valid=False, overlap=0.0)
    truth = question.box
    from_frame: Literal["source_unit", "padded_unit"] = "padded_unit"
    if box_rule == "paper":
        from_frame = "source_unit"
        width, height = question.image_wh
        x1, y1, x2, y2 = truth
        rounded = (round(x1 / width, 2), round(y1 / height, 2), round(x2 / width, 2), round(y2 / height, 2))
        truth = convert_box(rounded, geometry, question.image_wh, "source_unit", "source")
    box = convert_box(answered, geometry, question.image_wh, from_frame, "source")
    overlap = iou(box, truth)
    return Grade(question=question, text=text, value=float(overlap >= HIT_IOU), valid=True, overlap=overlap, box=box)


def grade_answers(
    header: Header, answers: Sequence[Answer], questions: Sequence[Question], *, box_rule: BoxRule = "exact"
) -> list[Grade]:
    """Grades in the order of the benchmark, for the questions that were asked.

    Raises:
        RunError: an answer's question is not in the benchmark, or there are no answers.
    """
    by_id = {answer.id: answer for answer in answers}
    strangers = set(by_id) - {question.id for question in questions}
    if strangers:
        raise RunError(
            f"{len(strangers)} answers belong to no question of '{header.benchmark}'",
            why=f"e.g. {min(strangers)}; the benchmark has changed since they were made",
            fix="delete the answers and give `vlmx eval` again",
        )
    if not by_id:
        raise RunError(f"there are no answers to '{header.benchmark}' yet", fix="give `vlmx eval --run RUN` again")
    geometry = Geometry(**header.geometry)
    return [grade(q, by_id[q.id].text, geometry, box_rule=box_rule) for q in questions if q.id in by_id]


def score_grades(header: Header, grades: Sequence[Grade], *, box_rule: BoxRule = "exact") -> Score:
    """Sum up the grades of one benchmark."""
    asked = [g.question for g in grades]
    kind = asked[0].kind
    values = [100 * g.value for g in grades]
    return Score(
        benchmark=header.benchmark,
        kind=kind,
        control=header.control,
        metric=_BOX_RULE_TEXT[box_rule] if kind == "box" else RULE_TEXT[rule_of(header.benchmark)],
        score=_mean(values),
        interval95=interval95(values, [question.image for question in asked]),
        n=len(grades),
        expected=header.questions,
        partial=len(grades) < header.questions,
        invalid=sum(not g.valid for g in grades),
        baselines={str(name): value for name, value in baselines_of(asked).items()},
        details=_box_details(grades) if kind == "box" else _by_question_type(grades),
        model=header.model,
        cache=header.cache,
        fingerprint=header.fingerprint,
        encoder_weights=header.encoder_weights,
        prompt_format=header.prompt_format,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _box_details(grades: Sequence[Grade]) -> dict[str, float]:
    overlaps = [g.overlap or 0.0 for g in grades]
    return {"iou25": 100 * _mean([overlap >= 0.25 for overlap in overlaps]), "mean_iou": 100 * _mean(overlaps)}


def _by_question_type(grades: Sequence[Grade]) -> dict[str, float]:
    by_type: dict[str, list[float]] = defaultdict(list)
    for g in grades:
        by_type[g.question.question_type].append(100 * g.value)
    return {name: _mean(values) for name, values in sorted(by_type.items())}


def grades_of_run(
    run: RunFolder, benchmark: str, control: Control, *, box_rule: BoxRule = "exact"
) -> tuple[Header, list[Grade]]:
    """Read a run's answers to a benchmark and grade them."""
    header, answers = read_answers(answers_path(run, benchmark, control))
    return header, grade_answers(header, answers, questions_of(benchmark), box_rule=box_rule)


@cache
def questions_of(benchmark: str) -> tuple[Question, ...]:
    """The questions of a benchmark, loaded once a process: a report grades the same ones for every run."""
    from vlmx.data.benchmarks import load_benchmark

    return tuple(load_benchmark(benchmark))


def score_run(run: RunFolder, *, box_rule: BoxRule = "exact") -> list[Score]:
    """Score all answers of a run and write a scores.json beside each answers.jsonl.

    Raises:
        RunError: the run has no answers at all, or some are damaged.
    """
    scores = []
    controls: tuple[Control, ...] = ("none", "shuffled")
    for control in controls:
        for benchmark in answered_benchmarks(run, control):
            header, grades = grades_of_run(run, benchmark, control, box_rule=box_rule)
            score = score_grades(header, grades, box_rule=box_rule)
            write_json(answers_path(run, benchmark, control).with_name("scores.json"), asdict(score))
            scores.append(score)
    if not scores:
        raise RunError(f"run '{run.name}' has no answers to score", fix=f"give `vlmx eval --run {run.path}` first")
    return scores
