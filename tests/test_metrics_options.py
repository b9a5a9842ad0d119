"""Are POPE and TallyQA read as intended, and are areas under curves and F1 what their definitions say?"""

import numpy as np
import pytest

from vlmx.errors import DataError
from vlmx.evaluate.metrics import SCORERS, TEXT_RULES, breakdown
from vlmx.evaluate.metrics.options import read_count, read_yes_no
from vlmx.evaluate.metrics.ranking import (
    area_under_roc,
    average_precision,
    one_vs_one_roc,
    one_vs_rest_average_precision,
    precision_recall_f1,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("no", "no"),
        ("No, there is none.", "no"),
        ("There is not a dog", "no"),
        ("Yes. There is no cat, though.", "yes"),  # the first sentence counts
        ("yes, no", "no"),
        ("NO", "yes"),  # POPE's script knows "No" and "no" only,
        ("no!", "yes"),  # splits at spaces,
        ("Nothing", "yes"),
        ("a dog", "yes"),  # and takes everything else for a yes
        ("", "yes"),
    ],
)
def test_yes_or_no_is_read_as_popes_script_does(text: str, expected: str) -> None:
    assert read_yes_no(text) == expected
    assert SCORERS["pope"](text, expected) == SCORERS["pope"](text, [expected]) == 1.0
    assert SCORERS["pope"](text, "no" if expected == "yes" else "yes") == 0.0


@pytest.mark.parametrize(
    ("text", "readable"), [("Yes.", True), ("NO", True), ("it is not", True), ("nothing", False), ("", False)]
)
def test_what_says_neither_yes_nor_no_is_invalid(text: str, readable: bool) -> None:
    assert TEXT_RULES["pope"].is_readable(text) is readable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", "0"),
        ("P", "15"),
        ("c", "2"),
        ("C.", "2"),
        ("(C)", "2"),
        ("C. 2", "2"),
        ("C: two\ndogs", "2"),
        (" 2 ", "2"),
        ("15", "15"),
        ("two.", "2"),
        ("None", "0"),
        ("Q", ""),
        ("16", ""),
        ("-1", ""),
        ("A dog", ""),
        ("two dogs", ""),
        ("", ""),
    ],
)
def test_counts_are_read_from_letters_digits_and_words(text: str, expected: str) -> None:
    assert read_count(text) == expected
    assert TEXT_RULES["tallyqa"].is_readable(text) is (expected != "")
    assert SCORERS["tallyqa"](text, expected or "0") == float(expected != "")


def test_probabilities_choose_the_largest_and_of_equal_ones_the_first() -> None:
    assert SCORERS["pope"]([0.7, 0.3], "yes") == SCORERS["pope"](np.array([0.2, 0.8]), ["no"]) == 1.0
    assert SCORERS["pope"]([0.5, 0.5], "yes") == 1.0
    three = [0.0] * 16
    three[3] = 0.4
    for truth in (3, "3", [3], ["3"], np.int64(3)):
        assert SCORERS["tallyqa"](three, truth) == 1.0
    assert SCORERS["tallyqa"](three, 4) == 0.0


@pytest.mark.parametrize(("name", "right"), [("pope", "maybe"), ("tallyqa", 2.0), ("tallyqa", 16)])
def test_a_right_answer_that_is_no_option_is_an_error(name: str, right: object) -> None:
    with pytest.raises(DataError, match="no option"):
        SCORERS[name]("yes", right)


@pytest.mark.parametrize("probabilities", [[1.0], [0.5, 0.3, 0.2], [float("nan"), 0.5], []])
def test_wrong_probabilities_are_an_error(probabilities: list[float]) -> None:
    with pytest.raises(DataError, match="not the probabilities"):
        SCORERS["pope"](probabilities, "yes")


def test_areas_of_a_known_example() -> None:
    # the example of scikit-learn's documentation: roc_auc_score 0.75, average_precision_score 0.8333
    scores, positive = np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])
    assert area_under_roc(scores, positive) == pytest.approx(0.75)
    assert average_precision(scores, positive) == pytest.approx(5 / 6)


def test_areas_follow_their_definitions_with_ties() -> None:
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 6, 60) / 5, rng.random(60) < 0.3
    pairs = [(a > b) + (a == b) / 2 for a in scores[positive] for b in scores[~positive]]
    assert area_under_roc(scores, positive) == pytest.approx(np.mean(pairs))
    area, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        taken = scores >= threshold
        recall = (taken & positive).sum() / positive.sum()
        area += (recall - recall_before) * (taken & positive).sum() / taken.sum()
        recall_before = recall
    assert average_precision(scores, positive) == pytest.approx(area)


def test_areas_of_one_class_do_not_exist() -> None:
    assert area_under_roc(np.array([0.1, 0.2]), np.array([True, True])) is None
    assert average_precision(np.array([0.1, 0.2]), np.array([False, False])) is None
    assert average_precision(np.array([0.1, 0.2]), np.array([True, True])) == 1.0
    assert one_vs_one_roc(np.eye(3), np.array([1, 1, 1])) is None


def test_several_classes_are_averaged_over_pairs_and_over_classes() -> None:
    scores = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.5, 0.2, 0.3], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    truth = np.array([0, 0, 1, 1, 2])
    # 0 from 1: P(0) of .6 .2 against .5 .1, 3 of 4; P(1) of .2 .8 against .3 .5, 2 of 4
    # 0 from 2: P(0) of .6 .2 against .3, 1 of 2;     P(2) of .4 against .1 .3, 2 of 2
    # 1 from 2: P(1) of .2 .8 against .3, 1 of 2;     P(2) of .4 against .3 .1, 2 of 2
    assert one_vs_one_roc(scores, truth) == pytest.approx((3 / 4 + 2 / 4 + 1 / 2 + 1 + 1 / 2 + 1) / 6)
    # P(0): .6+ .5 .3 .2+ .1;  P(1): .8+ .5 (.3 .3) .2+;  P(2): .4+
    expected = ((1 + 2 / 4) / 2, (1 + 2 / 5) / 2, 1)
    assert one_vs_rest_average_precision(scores, truth) == pytest.approx(sum(expected) / 3)


def test_precision_recall_and_f1() -> None:
    said, truth = np.array([True, True, True, False, False]), np.array([True, True, False, True, False])
    assert precision_recall_f1(said, truth) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert precision_recall_f1(~truth & False, truth) == (0.0, 0.0, 0.0)
    assert precision_recall_f1(said, said & False) == (0.0, 0.0, 0.0)


def test_pope_by_split_and_over_all_questions() -> None:
    types, truths = ["random"] * 4 + ["popular"] * 2, ["yes", "yes", "no", "no", "yes", "no"]
    probabilities = [(0.9, 0.1), (0.4, 0.6), (0.6, 0.4), (0.1, 0.9), (0.8, 0.2), (0.3, 0.7)]
    said = ["yes" if yes >= no else "no" for yes, no in probabilities]
    found = breakdown.pope(types, said, truths, probabilities)
    assert found["random_accuracy"] == found["random_precision"] == found["random_recall"] == found["random_f1"] == 50
    assert found["random_auc_roc"] == 75  # .9 over .6 and .1, .4 over .1 only
    assert found["popular_accuracy"] == found["popular_auc_roc"] == found["popular_auc_pr"] == 100
    assert found["all_accuracy"] == pytest.approx(100 * 4 / 6)
    assert found["all_yes_ratio"] == 50
    assert found["all_auc_roc"] == pytest.approx(100 * 8 / 9)
    without = breakdown.pope(types, said, truths, None)
    assert without == {name: value for name, value in found.items() if "auc" not in name}


def test_tallyqa_leaves_out_areas_that_do_not_exist() -> None:
    probabilities = np.zeros((3, 16))
    probabilities[[0, 1, 2], [1, 2, 5]] = 1
    found = breakdown.tallyqa(["simple", "simple", "complex"], [True, True, False], ["1", "2", "4"], probabilities)
    assert found["simple_accuracy"] == found["simple_auc_roc"] == found["simple_auc_pr"] == 100
    assert found["complex_accuracy"] == 0
    assert "complex_auc_roc" not in found
    assert found["all_accuracy"] == pytest.approx(100 * 2 / 3)


def test_vizwiz_tells_what_cannot_be_answered() -> None:
    types = ["unanswerable", "unanswerable", "answerable", "answerable"]
    found = breakdown.vizwiz(types, ["Unanswerable.", "a dog", "unanswerable", "a cat"])
    # half of those that say so are right, and half of the unanswerable ones are found
    assert found["unanswerable_f1"] == 50
    assert found["unanswerable_average_precision"] == pytest.approx(100 * (0.5 * 0.5 + 0.5 * 0.5))
    assert breakdown.vizwiz(["answerable"], ["a dog"]) == {"unanswerable_f1": 0}
