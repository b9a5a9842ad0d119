"""Are the mini study's answers right, balanced, and free of chance wording?"""

from collections import Counter

import pytest

from vlmx.data.mini.dice import Dice
from vlmx.data.mini.questions import BOX_REQUEST, SHORT_ANSWER, ask, box_text, names_of
from vlmx.data.mini.scenes import Scene, SceneObject
from vlmx.data.mini.study import (
    BENCHMARKS,
    BOX_BENCHMARKS,
    TEST_SCENES,
    TRAIN_SCENES,
    VQA_BENCHMARKS,
    conversations,
    questions,
    scene_keys,
)
from vlmx.data.records import Conversation, Question
from vlmx.errors import UnknownNameError


def _thing(shape: str, color: str, x1: int, y1: int, side: int = 12, letter: str | None = None) -> SceneObject:
    box = (x1, y1, x1 + side, y1 + side)
    size = "small" if side < 16 else "large"
    return SceneObject(shape=shape, color=color, size=size, drawn_box=box, box=box, letter=letter)  # type: ignore[arg-type]


# A red circle (left) and a red square (right) at the top, a green circle in the middle, a sign at the bottom right.
SCENE = Scene(
    key="test/000000",
    objects=(
        _thing("circle", "red", 2, 2),
        _thing("square", "red", 48, 2, side=14),
        _thing("circle", "green", 22, 26, side=20),
        _thing("sign", "white", 48, 44, side=16, letter="K"),
    ),
    cluttered=False,
)


def _all(group: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for throw in range(400):
        asked = ask(SCENE, group, Dice(f"throw {throw}"))  # type: ignore[arg-type]
        if asked is not None:
            text = asked.prompt.removesuffix(SHORT_ANSWER).removeprefix(f"{BOX_REQUEST} ")
            found.setdefault(text, set()).add(asked.answer)
    return found


def test_attributes() -> None:
    assert _all("mini-attribute") == {
        "What color is the square?": {"red"},
        "What color is the small circle?": {"red"},
        "What color is the large circle?": {"green"},
        "What shape is the green object?": {"circle"},
    }


def test_counts() -> None:
    found = _all("mini-count")
    assert found["How many circles are there?"] == {"2"}
    assert found["How many red objects are there?"] == {"2"}
    assert found["How many squares are there?"] == {"1"}
    assert found["How many crosses are there?"] == {"0"}
    assert all(len(answers) == 1 for answers in found.values())


def test_existence() -> None:
    found = _all("mini-exist")
    assert found["Is there a green circle?"] == {"yes"}
    assert found["Is there a green square?"] == {"no"}
    assert found["Is there a red object?"] == {"yes"}
    assert all(len(answers) == 1 for answers in found.values())


def test_relations() -> None:
    found = _all("mini-relation")
    assert found["What color is the left circle?"] == {"red"}
    assert found["What shape is the red object on the right?"] == {"square"}
    assert found["Where is the square relative to the red circle?"] == {"right"}
    assert found["Is the red circle to the left of the square?"] == {"yes"}
    assert found["Is the green object above the sign?"] == {"yes"}
    assert found["Is the red circle below the sign?"] == {"no"}
    assert all(len(answers) == 1 for answers in found.values())


def test_reading() -> None:
    assert _all("mini-read") == {"What letter is on the sign?": {"K"}, "What letter does the sign show?": {"K"}}


def test_phrases_for_boxes() -> None:
    assert _all("mini-ref-plain") == {
        "red circle.": {"[0.03, 0.03, 0.22, 0.22]"},
        "square.": {"[0.75, 0.03, 0.97, 0.25]"},
        "green object.": {"[0.34, 0.41, 0.66, 0.72]"},
    }
    places = _all("mini-ref")
    assert places["left circle."] == {"[0.03, 0.03, 0.22, 0.22]"}
    assert places["circle at the bottom."] == {"[0.34, 0.41, 0.66, 0.72]"}
    assert places["right red object."] == {"[0.75, 0.03, 0.97, 0.25]"}
    assert "top red object." not in places  # both are equally high
    phrases = _all("mini-ref-phrase")
    assert phrases["the red object that is to the right of the green object."] == {"[0.75, 0.03, 0.97, 0.25]"}
    assert all(len(answers) == 1 for answers in (places | phrases).values())


def test_names_are_the_shortest_that_fit_one() -> None:
    assert [names_of(SCENE, thing) for thing in SCENE.objects] == [
        ["red circle"],
        ["square"],
        ["green object"],
        ["sign"],
    ]


def test_a_box_is_text_in_parts_of_the_side() -> None:
    assert box_text((0, 16, 32, 64)) == "[0.00, 0.25, 0.50, 1.00]"


@pytest.fixture(scope="module")
def train() -> list[Conversation]:
    return conversations()


@pytest.fixture(scope="module")
def held_out() -> dict[str, list[Question]]:
    return {name: questions(name) for name in BENCHMARKS}


def test_train_split(train: list[Conversation]) -> None:
    assert [c.image for c in train] == scene_keys("train")
    assert len(train) == TRAIN_SCENES == len({c.id for c in train})
    assert all(3 <= len(c.turns) <= 8 for c in train)
    assert all(len({t.question for t in c.turns}) == len(c.turns) for c in train)


def test_test_split(held_out: dict[str, list[Question]]) -> None:
    ids = [q.id for group in held_out.values() for q in group]
    assert len(ids) == len(set(ids))
    assert {q.image for group in held_out.values() for q in group} <= set(scene_keys("test"))
    assert len(scene_keys("test")) == TEST_SCENES
    for name, group in held_out.items():
        assert len(group) > 300, name
        assert all(q.benchmark == name and q.kind == ("box" if name in BOX_BENCHMARKS else "text") for q in group)


@pytest.mark.parametrize("name", VQA_BENCHMARKS)
def test_no_answer_is_a_good_guess(name: str, held_out: dict[str, list[Question]]) -> None:
    by_type: dict[str, Counter[str]] = {}
    for q in held_out[name]:
        by_type.setdefault(q.question_type, Counter())[q.answers[0]] += 1
    prior = sum(max(answers.values()) for answers in by_type.values()) / len(held_out[name])
    assert prior < 0.56


@pytest.mark.parametrize("name", BOX_BENCHMARKS)
def test_any_object_is_a_bad_guess(name: str, held_out: dict[str, list[Question]]) -> None:
    group = held_out[name]
    assert all(q.box in q.object_boxes for q in group)
    assert sum(1 / len(q.object_boxes) for q in group) / len(group) < 0.26


def test_an_unknown_benchmark_is_named() -> None:
    with pytest.raises(UnknownNameError, match="mini-ref-planar"):
        questions("mini-ref-planar")
