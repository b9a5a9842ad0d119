"""Are the baselines the exact expectations that they claim to be?"""

import pytest

from vlmx.data.records import Box, Question
from vlmx.evaluate.baselines import baselines_of, mean_box, random_object, text_prior


def text(question_type: str, *answers: str, benchmark: str = "mini-count") -> Question:
    return Question(
        id="q",
        benchmark=benchmark,
        image="i",
        prompt="?",
        kind="text",
        question_type=question_type,
        answers=answers,
        image_wh=(64, 64),
    )


def region(box: Box, *objects: Box, image_wh: tuple[int, int] = (100, 100)) -> Question:
    return Question(
        id="q",
        benchmark="mini-ref",
        image="i",
        prompt="?",
        kind="box",
        question_type="ref",
        box=box,
        object_boxes=objects,
        image_wh=image_wh,
    )


def test_prior_takes_the_best_answer_of_each_type() -> None:
    questions = [text("how many", "2"), text("how many", "2"), text("how many", "3"), text("color", "red")]
    assert text_prior(questions) == pytest.approx(3 / 4)
    assert baselines_of(questions) == {"prior": pytest.approx(75)}


def test_prior_follows_the_rule_of_the_benchmark() -> None:
    soft = text("color", *["red"] * 2, *["blue"] * 8, benchmark="vqav2")
    assert text_prior([soft, soft]) == pytest.approx(1.0)
    assert text_prior([soft, text("color", *["red"] * 10, benchmark="vqav2")]) == pytest.approx((0.6 + 1) / 2, abs=1e-9)


def test_random_object_is_an_expectation_over_the_objects() -> None:
    target, far, overlapping = (0.0, 0.0, 10.0, 10.0), (50.0, 50.0, 60.0, 60.0), (0.0, 0.0, 10.0, 9.0)
    one_of_two, two_of_three = region(target, target, far), region(target, target, far, overlapping)
    assert random_object([one_of_two]) == pytest.approx(1 / 2)
    assert random_object([one_of_two, two_of_three]) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert random_object([one_of_two, region(target)]) is None


def test_mean_box_is_taken_in_parts_of_each_image() -> None:
    small = region((10, 10, 30, 30), (10, 10, 30, 30))
    double = region((20, 20, 60, 60), (20, 20, 60, 60), image_wh=(200, 200))
    apart = region((70, 70, 90, 90), (70, 70, 90, 90))
    assert mean_box([small, double]) == 1.0
    assert mean_box([small, apart]) == 0.0
    assert baselines_of([small, double]) == {"random_object": 100.0, "mean_box": 100.0}
    assert set(baselines_of([region((0, 0, 1, 1))])) == {"mean_box"}
