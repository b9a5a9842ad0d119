"""Are runs compared question by question, with POPE as the mean of its splits, and in one order?"""

from dataclasses import replace

import pytest

from vlmx.data.records import Box, Question
from vlmx.data.wording import Wording, region
from vlmx.errors import UsageError
from vlmx.evaluate.compare import compare, is_same, mean, order, percent
from vlmx.evaluate.score import Grade


def graded(benchmark: str, values: list[float], kinds: list[str] | None = None, start: int = 0) -> list[Grade]:
    """One question and image for each value."""
    result = []
    for number, value in enumerate(values, start=start):
        question = Question(
            id=f"{number}",
            benchmark=benchmark,
            image=f"{benchmark}{number}",
            prompt="?",
            kind="text",
            question_type=kinds[number] if kinds else "",
            answers=("yes",),
        )
        result.append(Grade(question=question, text="", value=value, valid=True))
    return result


# six questions of one split, all right; two of another, all wrong
SPLITS = ["random"] * 6 + ["popular"] * 2
POPE = graded("pope", [1.0] * 6 + [0.0] * 2, SPLITS)
NOTHING = graded("pope", [0.0] * 8, SPLITS)


def test_popes_mean_is_that_of_its_splits() -> None:
    assert percent(POPE) == 50
    assert mean(POPE).value == 50
    found = compare("a", POPE, "b", NOTHING)
    assert (found.points, found.first_percent, found.second_percent, found.n) == (50, 50, 0, 8)


def test_in_an_average_pope_counts_for_all_its_questions() -> None:
    others = graded("gqa", [1.0] * 24)
    assert percent([*POPE, *others]) == pytest.approx((50 * 8 + 100 * 24) / 32)
    assert mean([*POPE, *others]).value == pytest.approx(percent([*POPE, *others]))
    counts = {"pope": 1, "gqa": 3}
    assert percent([*POPE, *others], counts=counts) == pytest.approx((50 + 3 * 100) / 4)
    assert compare("a", [*POPE, *others], "b", [*NOTHING, *others], counts=counts).points == pytest.approx(50 / 4)


def test_given_weights_do_not_depend_on_how_many_were_asked() -> None:
    few, many = graded("gqa", [1.0, 0.0]), graded("vqav2", [1.0] * 98)
    assert percent([*few, *many]) == pytest.approx(99)
    assert percent([*few, *many], counts={"gqa": 1, "vqav2": 1}) == pytest.approx(75)


def test_two_benchmarks_may_use_the_same_ids() -> None:
    first = [*graded("textvqa", [1.0, 1.0]), *graded("textvqa_ocr", [0.0, 0.0])]
    second = [*graded("textvqa", [0.0, 0.0]), *graded("textvqa_ocr", [0.0, 0.0])]
    found = compare("a", first, "b", second)
    assert (found.n, found.points) == (4, 50)


@pytest.mark.parametrize("value", [0.0, 0.3])  # thirds of sums are not the same in every order
def test_where_all_differences_are_alike_nothing_is_known_about_chance(value: float) -> None:
    found = compare("a", graded("gqa", [1.0] * 30), "b", graded("gqa", [value] * 30))
    assert found.points == pytest.approx(100 - 100 * value)
    assert found.separable is None
    assert found.sentence("VQA").startswith("a and b are not separable on VQA: +")


def test_the_order_and_its_steps_are_over_the_same_questions() -> None:
    # by its own mean b (100 on two easy questions) would be first, but on what all three answered it is last
    a = graded("gqa", [1.0, 1.0, 0.0, 0.0])
    b = [*graded("gqa", [0.0, 0.0]), *graded("gqa", [1.0] * 8, start=4)]
    c = graded("gqa", [1.0, 0.0, 1.0, 1.0])
    steps = order({"b": b, "c": c, "a": a})
    assert [(step.first, step.second, step.points, step.n) for step in steps] == [("a", "c", 50, 2), ("c", "b", 50, 2)]
    assert all(step.points >= 0 for step in steps)


def test_equal_runs_are_ordered_by_name() -> None:
    same = graded("gqa", [1.0, 0.0])
    assert [(step.first, step.second) for step in order({"b": same, "a": same})] == [("a", "b")]


def asked_otherwise(grade: Grade, **other: object) -> Grade:
    return replace(grade, question=replace(grade.question, **other))  # type: ignore[arg-type]  # of any field


@pytest.mark.parametrize("other", [{"image": "x"}, {"prompt": "!"}, {"answers": ("no",)}, {"question_type": "x"}])
def test_an_id_of_another_question_is_left_out_and_counted(other: dict[str, object]) -> None:
    a, b = graded("gqa", [1.0, 1.0, 0.0]), graded("gqa", [0.0, 0.0, 0.0])
    b[1] = asked_otherwise(b[1], **other)
    found = compare("a", a, "b", b)
    assert (found.n, found.unlike, found.points) == (2, 1, 50)
    assert found.sentence("VQA").endswith(", 2 questions of gqa; 1 left out: same id, another question")
    (first, second) = order({"a": a, "b": b, "c": a})
    assert (first.n, first.unlike, second.n, second.unlike) == (2, 1, 2, 1)
    alike = compare("a", a, "b", graded("gqa", [0.0] * 3))
    assert (alike.n, alike.unlike, alike.basis) == (3, 0, "3 questions of gqa")
    with pytest.raises(UsageError, match=r"no question in common.*1 question with the same id.*same annotation files"):
        compare("a", a[1:2], "b", b)
    with pytest.raises(UsageError, match=r"no question in common.*a, b; 1 question with the same id"):
        order({"a": a[1:2], "b": b})


def test_a_phrase_in_another_wording_is_the_same_question() -> None:
    def located(wording: Wording, phrase: str, box: Box = (0, 0, 5, 5)) -> Question:
        prompt = region(phrase, wording)
        return Question(id="1", benchmark="refcoco", image="i", prompt=prompt, kind="box", question_type="ref", box=box)

    assert is_same(located("default", "the red mug."), located("paper", "the red mug."))
    assert not is_same(located("default", "the red mug"), located("paper", "the blue mug"))
    assert not is_same(located("default", "the red mug"), located("default", "the red mug", (0, 0, 5, 6)))


def test_nothing_in_common_is_an_error() -> None:
    with pytest.raises(UsageError, match="no question in common"):
        compare("a", graded("gqa", [1.0]), "b", graded("vqav2", [1.0]))
    with pytest.raises(UsageError, match="no question in common"):
        order({"a": graded("gqa", [1.0]), "b": graded("vqav2", [1.0])})
