"""What would an answer be worth that did not look at the image? Exact expectations, nothing is drawn at random.

    prior           text: the most frequent right answer of each question type, in the scored questions themselves
    random_object   boxes: one of the image's true objects, but nobody knows which one is asked for
    mean_box        boxes: the average true box of the scored questions

The prior is an upper bound for everything that gives one answer per question type without seeing the image, whatever
it was learned from: no such answerer can do better on these questions.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

from vlmx.data.records import Box, Question
from vlmx.evaluate.metrics import MEAN_OF_TYPES, rule_of
from vlmx.evaluate.metrics.boxes import hit_of, iou
from vlmx.evaluate.metrics.rule import TextRule

Baseline = Literal["prior", "random_object", "mean_box"]
BASELINE_TEXT: Mapping[Baseline, str] = {
    "prior": "answer prior (most frequent answer of each question type)",
    "random_object": "a random true object of the image",
    "mean_box": "the mean box",
}
# VizWiz's "unanswerable" is seen in the image, not in the question: nobody who is blind can go by it.
_ONE_TYPE = frozenset({"vizwiz"})


def text_prior(questions: Sequence[Question]) -> float:
    """Score, 0..1, of always giving the answer that scores best within each question type.

    Args:
        questions: text questions of one benchmark; at least one.
    """
    benchmark = questions[0].benchmark
    by_type: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        by_type["" if benchmark in _ONE_TYPE else question.question_type].append(question)
    best = [(_best_single_answer(rule_of(benchmark), members), len(members)) for members in by_type.values()]
    if benchmark in MEAN_OF_TYPES:
        return sum(total / count for total, count in best) / len(best)
    return sum(total for total, _ in best) / len(questions)


def _best_single_answer(rule: TextRule, questions: Sequence[Question]) -> float:
    """Sum of the scores of the one answer, among those that annotators gave, with the largest sum.

    All candidates are scored together: an answer is worth something only where annotators gave it.
    """
    worth: dict[str, float] = defaultdict(float)
    candidates: set[str] = set()
    for question in questions:
        candidates.update(question.answers)
        cleaned = Counter(rule.clean_answer(answer) for answer in question.answers)
        for answer, agreeing in cleaned.items():
            worth[answer] += rule.worth(agreeing, len(question.answers))
    return max(worth.get(rule.clean_prediction(candidate), 0.0) for candidate in candidates)


def random_object(questions: Sequence[Question]) -> float | None:
    """Expected rate of hits, 0..1, when the answer is one of the image's true objects, each equally likely.

    Args:
        questions: box questions of one benchmark; None is returned if any of them does not list the image's objects.
    """
    if not all(question.object_boxes for question in questions):
        return None
    least_iou = hit_of(questions[0].benchmark).least_iou
    return sum(_share_of_hits(question, least_iou) for question in questions) / len(questions)


def _share_of_hits(question: Question, least_iou: float) -> float:
    assert question.box is not None
    hits = sum(iou(box, question.box) >= least_iou for box in question.object_boxes)
    return hits / len(question.object_boxes)


def mean_box(questions: Sequence[Question]) -> float:
    """Rate of hits, 0..1, of one fixed answer: the mean true box, in parts of each image's sides.

    Args:
        questions: box questions of one benchmark; at least one.
    """
    least_iou = hit_of(questions[0].benchmark).least_iou
    units = [_source_unit(question) for question in questions]
    answer = tuple(sum(edges) / len(units) for edges in zip(*units, strict=True))
    return sum(iou(answer, unit) >= least_iou for unit in units) / len(units)  # type: ignore[arg-type]  # four edges


def _source_unit(question: Question) -> Box:
    (x1, y1, x2, y2), (width, height) = question.region
    return (x1 / width, y1 / height, x2 / width, y2 / height)


def baselines_of(questions: Sequence[Question]) -> dict[Baseline, float]:
    """All baselines that fit the questions of one benchmark, in percent."""
    if questions[0].kind == "text":
        return {"prior": 100 * text_prior(questions)}
    objects = random_object(questions)
    found: dict[Baseline, float] = {} if objects is None else {"random_object": 100 * objects}
    return {**found, "mean_box": 100 * mean_box(questions)}
