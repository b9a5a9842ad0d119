"""Is a score a pure function of answers and annotations, with honest counts, frames and intervals?"""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from vlmx.cache_specs.geometry import Geometry
from vlmx.data.mini import study
from vlmx.data.records import Question
from vlmx.errors import RunError, UsageError
from vlmx.evaluate.answers import Answer, AnswerFile, Header, answers_path
from vlmx.evaluate.compare import compare, order
from vlmx.evaluate.intervals import interval95
from vlmx.evaluate.score import Grade, grade, grade_answers, score_grades, score_run
from vlmx.runs import RunFolder

SQUARE = Geometry(mode="letterbox", height=64, width=64, fill=(0, 0, 0))


def header(benchmark: str, questions: int, limit: int | None = None) -> Header:
    return Header(
        benchmark=benchmark,
        control="none",
        questions=questions,
        limit=limit,
        model="m",
        cache="c",
        fingerprint="f",
        encoder_weights="random:3",
        geometry=SQUARE.to_dict(),
        prompt_format="plain",
    )


def region(image_wh: tuple[int, int], box: tuple[float, float, float, float]) -> Question:
    return Question(
        id="r",
        benchmark="mini-ref",
        image="i",
        prompt="?",
        kind="box",
        question_type="ref",
        box=box,
        object_boxes=(box,),
        image_wh=image_wh,
    )


def test_answered_boxes_are_in_the_encoders_input() -> None:
    wide = region((200, 100), (0, 0, 100, 100))  # letterboxed: the photo spans y from 0.25 to 0.75
    right = grade(wide, "[0.0, 0.25, 0.5, 0.75]", SQUARE)
    assert (right.value, right.overlap, right.box) == (1.0, 1.0, (0, 0, 100, 100))
    assert grade(wide, "[0.0, 0.0, 0.5, 1.0]", SQUARE).overlap == pytest.approx(0.5)


def test_the_papers_box_rule_ignores_the_letterbox_and_rounds_the_truth() -> None:
    wide = region((200, 100), (0, 0, 100.9, 100))
    assert grade(wide, "[0.0, 0.0, 0.5, 1.0]", SQUARE, box_rule="paper").overlap == 1.0
    assert grade(wide, "[0.0, 0.25, 0.5, 0.75]", SQUARE, box_rule="paper").value == 1.0
    assert grade(wide, "[0.0, 0.25, 0.4, 0.75]", SQUARE, box_rule="paper").value == 0.0


def test_invalid_answers_are_wrong_and_counted() -> None:
    questions = study.questions("mini-ref")[:4]
    boxes = [q.box for q in questions]
    texts = ["somewhere left", "", *(str([round(edge / 64, 2) for edge in box or ()]) for box in boxes[2:])]
    answers = [Answer(id=q.id, image=q.image, prompt=q.prompt, text=t) for q, t in zip(questions, texts, strict=True)]
    score = score_grades(header("mini-ref", 4), grade_answers(header("mini-ref", 4), answers, questions))
    assert (score.score, score.invalid, score.n, score.partial) == (50.0, 2, 4, False)
    assert 0 <= score.interval95[0] <= 50 <= score.interval95[1] <= 100
    assert score.details["iou25"] == 50.0


def test_partial_scores_are_marked_and_unknown_questions_refused() -> None:
    questions = study.questions("mini-count")
    answers = [Answer(id=q.id, image=q.image, prompt=q.prompt, text=q.answers[0] + ".") for q in questions[:5]]
    grades = grade_answers(header("mini-count", len(questions), 5), answers, questions)
    score = score_grades(header("mini-count", len(questions), 5), grades)
    assert (score.score, score.n, score.expected, score.partial) == (100.0, 5, len(questions), True)
    stranger = Answer(id="mini-count/elsewhere", image="x", prompt="?", text="2")
    with pytest.raises(RunError, match="belong to no question"):
        grade_answers(header("mini-count", 9), [*answers, stranger], questions)
    with pytest.raises(RunError, match="no answers"):
        grade_answers(header("mini-count", 9), [], questions)


def test_score_run_writes_what_it_returns_and_can_be_given_again(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", kind="train", config={})
    with pytest.raises(RunError, match="vlmx eval"):
        score_run(run)
    questions = study.questions("mini-read")
    file = AnswerFile(answers_path(run, "mini-read", "none"), header("mini-read", len(questions)))
    file.append(Answer(id=q.id, image=q.image, prompt=q.prompt, text="A") for q in questions)
    (score,) = score_run(run)
    path = tmp_path / "run/eval/mini-read/scores.json"
    first = path.read_bytes()
    assert json.loads(first) == json.loads(json.dumps(asdict(score)))
    assert score.score <= score.baselines["prior"] < 30
    assert score.encoder == "c (untrained)"
    score_run(run)
    assert path.read_bytes() == first


def test_intervals_are_wider_when_questions_share_images() -> None:
    values = [0.0, 100.0] * 200
    alone = interval95(values, [str(n) for n in range(400)])
    shared = interval95(sorted(values), [str(n // 20) for n in range(400)])
    assert alone[0] < 50 < alone[1]
    assert alone[1] - alone[0] == pytest.approx(2 * 1.96 * 50 / np.sqrt(400), rel=0.1)
    assert shared[1] - shared[0] > 3 * (alone[1] - alone[0])
    assert interval95([100.0, 100.0], ["a", "b"]) == (100.0, 100.0)


def grades(hits: list[int], name: str = "q") -> list[Grade]:
    box = (0.0, 0.0, 1.0, 1.0)
    return [
        Grade(
            question=Question(
                id=f"{name}{n}",
                benchmark="b",
                image=f"i{n}",
                prompt="?",
                kind="box",
                question_type="t",
                box=box,
                image_wh=(1, 1),
            ),
            text="",
            value=float(hit),
            valid=True,
        )
        for n, hit in enumerate(hits)
    ]


def test_differences_are_paired() -> None:
    better = compare("a", grades([1] * 60 + [0] * 40), "b", grades([1] * 50 + [0] * 50))
    assert better.points == pytest.approx(10)
    assert better.separable
    assert better.sentence("boxes").startswith("a > b on boxes: +10.0 [")
    chance = compare("a", grades([1, 0, 1, 0] * 25), "b", grades([0, 1, 0, 1] * 25))
    assert not chance.separable
    assert "not separable on boxes: +0.0 [" in chance.sentence("boxes")
    with pytest.raises(UsageError, match="no question in common"):
        compare("a", grades([1]), "b", grades([1], name="other"))


def test_order_goes_from_best_to_worst() -> None:
    ranked = order({"low": grades([0] * 90 + [1] * 10), "high": grades([1] * 100), "mid": grades([1] * 50 + [0] * 50)})
    assert [(d.first, d.second, d.separable) for d in ranked] == [("high", "mid", True), ("mid", "low", True)]
