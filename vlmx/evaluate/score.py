"""What are the answers of a run worth? A pure function of answers and annotations; it can be run alone and again.

Scores are in percent. A box that cannot be read is wrong, another answer that cannot be read is worth what the
official rule gives it, and both are counted. A score over fewer questions than the benchmark has is marked as partial.

`Question.question_type` names the part of a benchmark that scores are broken down by: POPE's random, popular and
adversarial split, TallyQA's simple and complex questions, VizWiz's answerable and unanswerable ones, OCID-Ref's
clutter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Literal

from vlmx.cache_specs.catalog import backbone_of
from vlmx.cache_specs.geometry import Geometry, convert_box
from vlmx.data.benchmarks import load_benchmark
from vlmx.data.published import DATA_ROOT
from vlmx.data.records import Box, Question
from vlmx.data.wording import Wording
from vlmx.errors import DataError, RunError
from vlmx.evaluate.answers import Answer, Control, Dtype, Header, answers_path, read_answers
from vlmx.evaluate.answers_check import check_answers, delete_lines, listed
from vlmx.evaluate.baselines import baselines_of
from vlmx.evaluate.intervals import estimate
from vlmx.evaluate.metrics import MEAN_OF_TYPES, breakdown, rule_of
from vlmx.evaluate.metrics.boxes import Comparison, hit_of, overlaps, parse_box
from vlmx.evaluate.metrics.rule import OptionRule
from vlmx.runs import RunFolder

BoxRule = Literal["exact", "paper"]
COMPARISON_OF: Mapping[BoxRule, Comparison] = {"exact": "corrected", "paper": "raw"}
_COMPARISON_TEXT: Mapping[Comparison, str] = {
    "corrected": "after the answer was converted from the encoder's input to the source image",
    "raw": "as the paper's evaluation takes it: letterbox ignored, true box rounded to two decimals",
}
_BOXES_TEXT: Mapping[BoxRule, str] = {
    "exact": "boxes converted from the encoder's input to the source image",
    "paper": "boxes compared raw, as in the paper's evaluation",
}


@dataclass(frozen=True, kw_only=True)
class Grade:
    """What one answer is worth.

    Attributes:
        question: the question.
        text: the answer as the model wrote it.
        value: 0..1.
        valid: False for an empty answer, a box that is none, and a text that names none of the options.
        overlap: IoU with the true box that decides about `value`; None for text questions.
        overlaps: IoU by both comparisons, "corrected" and "raw"; empty for text questions.
        box: the answered box in pixels of the source image; None for text questions and invalid answers.
        probabilities: of the options, where these were asked for instead of a text.
    """

    question: Question
    text: str
    value: float
    valid: bool
    overlap: float | None = None
    overlaps: Mapping[Comparison, float] = field(default_factory=dict)
    box: Box | None = None
    probabilities: Sequence[float] | None = None


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score of a run on one benchmark; the content of scores.json.

    Attributes:
        benchmark, kind, control: what was asked, and under which control.
        metric: the rule in words.
        score: percent.
        interval95: bootstrap over images, percent.
        n: number of answers scored.
        expected: number of questions of the benchmark as published; files of another version may have more.
        partial: whether n is smaller than that, or there are `missing` ones.
        missing: how many of the questions that were to be asked have no answer yet.
        invalid: number of answers that could not be read.
        baselines: percent by name (see baselines.py), over the same questions.
        details: percent by question type, and what else the official scripts report (see metrics/breakdown.py).
        model, cache, fingerprint, encoder_weights, prompt_format: what the answers were made with.
        wording: how the questions were worded.
        boxes: how boxes were compared: "exact" converts answers from the encoder's input to the source image, "paper"
            does not; None for text questions.
        subset: which part of the benchmark was asked, e.g. "slim"; empty for all of it.
        exact: whether each question was answered alone.
        dtype: what the model computed in.
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
    missing: int
    invalid: int
    baselines: Mapping[str, float]
    details: Mapping[str, float] = field(default_factory=dict)
    model: str
    cache: str
    fingerprint: str
    encoder_weights: str
    prompt_format: str
    wording: Wording = "default"
    boxes: BoxRule | None = None
    subset: str = ""
    exact: bool = False
    dtype: Dtype = "fp32"

    @property
    def size(self) -> str:
        """How many questions were answered, and of how many, and why not of all: "1,024 of 8,910 (slim)".

        A subset that was asked for is always named, and so is a file with more questions than were published.
        """
        why = ", ".join(filter(None, [self.subset, f"{self.missing:,} not answered yet" if self.missing else ""]))
        known = f" ({why})" if why else ""
        if self.n > self.expected:
            return f"{self.n:,} of {self.expected:,} published{known}: another version"
        if not self.partial:
            return f"{self.n:,}{known}"
        return f"{self.n:,} of {self.expected:,}{known or ' (partial)'}"

    @property
    def made_with(self) -> str:
        """Wording and box frame in words: "prompts as in training; boxes converted to the source image"."""
        prompts = {"default": "prompts as in training", "paper": "prompts as in the paper's evaluation"}[self.wording]
        return prompts if self.boxes is None else f"{prompts}; {_BOXES_TEXT[self.boxes]}"

    @property
    def encoder(self) -> str:
        """Name of the encoder, or of joined ones with + between them, marked when the weights of any are random."""
        name = backbone_of(self.cache)
        return f"{name} (untrained)" if "random:" in self.encoder_weights else name


def grade(
    question: Question,
    text: str,
    geometry: Geometry,
    *,
    box_rule: BoxRule = "exact",
    probabilities: Sequence[float] | None = None,
) -> Grade:
    """Compare one answer with the annotation.

    Args:
        question: its benchmark's name chooses the rule (see metrics).
        text: the answer as the model wrote it.
        geometry: how the images were brought to the encoder's size; answered boxes are in parts of that input.
        box_rule: "paper" takes answered boxes as parts of the source image and rounds the true box to two decimals.
        probabilities: of the options, in their order; they count instead of the text.

    Raises:
        DataError: probabilities do not fit the question.
    """
    if question.kind == "text":
        return _grade_text(question, text, probabilities)
    truth, image_wh = question.region
    comparison = COMPARISON_OF[box_rule]
    answered = parse_box(text)
    if answered is None:
        none: dict[Comparison, float] = {"corrected": 0.0, "raw": 0.0}
        return Grade(question=question, text=text, value=0.0, valid=False, overlap=0.0, overlaps=none)
    found = overlaps(answered, truth, geometry, image_wh)
    return Grade(
        question=question,
        text=text,
        value=float(found[comparison] >= hit_of(question.benchmark).least_iou),
        valid=True,
        overlap=found[comparison],
        overlaps=found,
        box=convert_box(
            answered, geometry, image_wh, "source_unit" if comparison == "raw" else "padded_unit", "source"
        ),
    )


def _grade_text(question: Question, text: str, probabilities: Sequence[float] | None) -> Grade:
    rule = rule_of(question.benchmark)
    if probabilities is None:
        return Grade(question=question, text=text, value=rule(text, question.answers), valid=rule.is_readable(text))
    if not isinstance(rule, OptionRule):
        raise DataError(
            f"an answer to '{question.benchmark}' has probabilities of options",
            why=f"its questions have no options: {question.id}",
        )
    value = rule(probabilities, question.answers)
    return Grade(question=question, text=text, value=value, valid=True, probabilities=probabilities)


def grade_answers(
    header: Header,
    answers: Sequence[Answer],
    questions: Sequence[Question],
    *,
    box_rule: BoxRule = "exact",
) -> list[Grade]:
    """Grades in the order of the benchmark, for the questions that were asked.

    Args:
        header, answers: as read from an answers.jsonl.
        questions: all questions of the benchmark.
        box_rule: see `grade`.

    Raises:
        RunError: see `check_answers`.
        DataError: answers have probabilities that do not fit the options of their questions.
    """
    check_answers(header, answers, questions)
    by_id = {answer.id: answer for answer in answers}
    geometry = Geometry(**header.geometry)
    asked = {question.id: question for question in questions}
    grades: list[Grade] = []
    refused: list[tuple[Answer, DataError]] = []
    for answer in (by_id[question.id] for question in questions if question.id in by_id):
        try:
            grades.append(
                grade(asked[answer.id], answer.text, geometry, box_rule=box_rule, probabilities=answer.probabilities)
            )
        except DataError as error:
            refused.append((answer, error))
    if refused:
        raise DataError(
            f"{len(refused):,} answers to '{header.benchmark}' cannot be scored",
            why=f"{listed([answer for answer, _ in refused])}; the first: {refused[0][1].what}: {refused[0][1].why}",
            fix=delete_lines(header),
        )
    return grades


def score_grades(header: Header, grades: Sequence[Grade], *, box_rule: BoxRule = "exact") -> Score:
    """Sum up the grades of one benchmark.

    The score is the mean over questions; POPE's, as in the paper's evaluation, the mean of its splits.
    """
    asked = [g.question for g in grades]
    kind = asked[0].kind
    types = [question.question_type for question in asked]
    overall = estimate(
        [100 * g.value for g in grades],
        [question.image for question in asked],
        strata=types if header.benchmark in MEAN_OF_TYPES else None,
    )
    return Score(
        benchmark=header.benchmark,
        kind=kind,
        control=header.control,
        metric=_metric(header.benchmark, kind, box_rule),
        score=overall.value,
        interval95=overall.interval95,
        n=len(grades),
        expected=header.questions,
        partial=len(grades) < max(header.questions, header.to_ask),
        missing=header.to_ask - len(grades),
        invalid=sum(not g.valid for g in grades),
        baselines={str(name): value for name, value in baselines_of(asked).items()},
        details=_details(header.benchmark, grades, types),
        model=header.model,
        cache=header.cache,
        fingerprint=header.fingerprint,
        encoder_weights=header.encoder_weights,
        prompt_format=header.prompt_format,
        wording=header.wording,
        boxes=box_rule if kind == "box" else None,
        subset=header.subset,
        exact=header.exact,
        dtype=header.dtype,
    )


def _metric(benchmark: str, kind: Literal["text", "box"], box_rule: BoxRule) -> str:
    if kind == "text":
        return rule_of(benchmark).text
    return f"{hit_of(benchmark).text} {_COMPARISON_TEXT[COMPARISON_OF[box_rule]]}"


def _details(benchmark: str, grades: Sequence[Grade], types: Sequence[str]) -> dict[str, float]:
    found = breakdown.parts(types, [g.value for g in grades])
    if grades[0].question.kind == "box":
        return {**(found if len(found) > 1 else {}), **breakdown.boxes([g.overlaps for g in grades])}
    if benchmark == "vizwiz":
        return {**found, **breakdown.vizwiz(types, [g.text for g in grades])}
    rule = rule_of(benchmark)
    if not isinstance(rule, OptionRule):
        return found
    known = [g.probabilities for g in grades if g.probabilities is not None]
    probabilities = known if len(known) == len(grades) else None
    truths = [rule.clean_answer(g.question.answers[0]) for g in grades]
    if benchmark == "pope":
        said = [
            rule.clean_prediction(g.text) if g.probabilities is None else rule.chosen(g.probabilities) for g in grades
        ]
        return breakdown.pope(types, said, truths, probabilities)
    return breakdown.tallyqa(types, [g.value == 1 for g in grades], truths, probabilities)


def grades_of_run(
    run: RunFolder,
    benchmark: str,
    control: Control,
    *,
    box_rule: BoxRule = "exact",
    data_root: str | Path | None = None,
) -> tuple[Header, list[Grade]]:
    """Read a run's answers to a benchmark, finished or not, and grade them.

    Args:
        data_root: where the benchmark's published files are; None: where they were when it was answered.

    Returns:
        The header, in which `limit` and `slim` are left out if they took all questions, and the wording if it changes
        none; and the grades, at least one.

    Raises:
        RunError: there are no answers, or they are to another benchmark or under another control; see `grade_answers`,
            too.
        DataError: the benchmark's files are missing or damaged.
    """
    path = answers_path(run, benchmark, control)
    header, answers = read_answers(path)
    if (header.benchmark, header.control) != (benchmark, control):
        raise RunError(
            f"{path} holds answers to another benchmark",
            why=f"they were made for '{header.benchmark}' (control: {header.control}), the folder is for '{benchmark}' "
            f"(control: {control})",
            fix="move the file back to where it came from",
        )
    if not answers:
        raise RunError(f"{path} has no answers yet", fix=f"give `vlmx eval --run {run.path}` again")
    root = header.data_root if data_root is None else str(data_root)
    questions = questions_of(benchmark, root, header.wording)
    grades = grade_answers(header, answers, questions, box_rule=box_rule)
    if header.to_ask >= len(questions):  # as older versions recorded it
        header = replace(header, limit=None, slim=False)
    if header.wording != "default" and questions_of(benchmark, root) == questions:
        header = replace(header, wording="default")
    return header, grades


@cache
def questions_of(benchmark: str, data_root: str | None = None, wording: Wording = "default") -> tuple[Question, ...]:
    """The questions of a benchmark, loaded once a process: a report grades the same ones for every run."""
    return tuple(load_benchmark(benchmark, root=data_root or DATA_ROOT, wording=wording))
