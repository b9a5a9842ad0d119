"""Do our text rules agree with the reference scorers on every golden question, and do boxes parse and overlap?"""

import json
from pathlib import Path

import pytest

from vlmx.evaluate.metrics import RULE_TEXT, SCORERS, rule_of
from vlmx.evaluate.metrics.boxes import iou, parse_box


@pytest.mark.parametrize(("name", "tolerance"), [("vqav2", 1e-6), ("vizwiz", 1e-5), ("textvqa", 1e-6)])
def test_agrees_with_the_reference_on_1200_questions(shared: Path, name: str, tolerance: float) -> None:
    lines = [json.loads(line) for line in (shared / "golden/metrics" / f"{name}.jsonl").read_text().splitlines()]
    assert len(lines) == 1200
    scores = [SCORERS[name](line["prediction"], line["answers"]) for line in lines]
    wrong = [line["id"] for line, score in zip(lines, scores, strict=True) if abs(score - line["score"]) > tolerance]
    assert wrong == []
    overall = json.loads((shared / "golden/metrics" / f"{name}.overall.json").read_text())["overall"]
    unit = 1 if name == "textvqa" else 100
    assert unit * sum(scores) / len(scores) == pytest.approx(overall, abs=0.00501 if unit == 100 else 1e-9)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Yes.", ["yes"] * 10, 1.0),
        ("two", ["2"] * 3 + ["3"] * 7, 0.9),  # three agree: leaving one of them out leaves two
        ("2", ["2"] + ["3"] * 9, 0.3),
        ("dont", ["don't"] * 10, 1.0),
        ("somebody'd", ["somebodyd"] * 10, 1.0),
        ("the cat", ["dog"] * 10, 0.0),
        ("1,000", ["1000"] * 10, 1.0),
        ("." * 33 + "x", [".x"] * 10, 0.0),  # the annotators' last period is dropped as well
    ],
)
def test_vqav2(prediction: str, answers: list[str], expected: float) -> None:
    assert SCORERS["vqav2"](prediction, answers) == pytest.approx(expected)


def test_contractions_are_the_spellings_of_the_reference() -> None:
    from vlmx.evaluate.metrics.vqa import _WITH_APOSTROPHE, _WITH_BACKTICK

    assert (len(_WITH_APOSTROPHE), len(_WITH_BACKTICK)) == (114, 75)
    assert _WITH_APOSTROPHE["couldnt've"] == _WITH_APOSTROPHE["couldn'tve"] == "couldn't've"
    assert _WITH_BACKTICK["dont"] == "don`t"
    assert _WITH_BACKTICK["cant"] == "can't"
    assert "somebody'd" not in _WITH_BACKTICK


def test_gqa_normalises_the_prediction_only_and_exact_both() -> None:
    assert SCORERS["gqa"]("Traffic-light.", ["trafficlight"]) == 1.0
    assert SCORERS["gqa"]("A", ["A"]) == 0.0
    assert SCORERS["exact"]("a.", ["A"]) == 1.0
    assert SCORERS["exact"]("red", ["blue", "green"]) == 0.0


def test_which_rule_scores_a_benchmark() -> None:
    assert [rule_of(name) for name in ("vqav2", "mini-count", "gqa")] == ["vqav2", "exact", "gqa"]
    assert set(RULE_TEXT) == set(SCORERS)


@pytest.mark.parametrize(
    "text",
    [
        "0.1, 0.2, 0.3, 0.4",
        "(0.1, 0.2, 0.3, 0.4)",
        "[0.1, 0.2, 0.3]",
        "[0.1, 0.2, 0.3, 0.4, 0.5]",
        "[0.3, 0.2, 0.1, 0.4]",
        "[0.1, 0.2, 0.1, 0.4]",
        "[0.1, 0.2, 0.3, 1.4]",
        "[-0.1, 0.2, 0.3, 0.4]",
        "[0.1, 0.2, 0.3, 0.4",
        "[0.1, 0.2, True, 0.4]",
        "[0.1, 0.2, '0.3', 0.4]",
        "the box is [0.1, 0.2, 0.3, 0.4]",
        "",
        "[" * 5000,
        "[nan, 0.2, 0.3, 0.4]",
    ],
)
def test_what_is_not_a_box(text: str) -> None:
    assert parse_box(text) is None


def test_what_is_a_box() -> None:
    assert parse_box(" [0.1, 0.2, 0.30, 1]\n") == (0.1, 0.2, 0.3, 1.0)


@pytest.mark.parametrize(
    ("box", "other", "expected"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
        ((0, 0, 2, 2), (0, 0, 1, 2), 0.5),
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7),
        ((0, 0, 2, 2), (2, 0, 4, 2), 0.0),
    ],
)
def test_iou(box: tuple[float, ...], other: tuple[float, ...], expected: float) -> None:
    assert iou(box, other) == pytest.approx(expected)  # type: ignore[arg-type]
    assert iou(other, box) == pytest.approx(expected)  # type: ignore[arg-type]
