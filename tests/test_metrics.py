"""Do our rules for answers in words agree with the reference scorers on every golden question, and in every branch?"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vlmx.errors import DataError
from vlmx.evaluate.metrics import SCORERS, TEXT_RULES, rule_of
from vlmx.evaluate.metrics.vqa import _WITH_APOSTROPHE, _WITH_BACKTICK


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


@pytest.mark.parametrize(("agreeing", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
@pytest.mark.parametrize("name", ["vqav2", "vizwiz", "textvqa", "textvqa_ocr"])
def test_ten_annotators_vote_with_each_left_out_once(name: str, agreeing: int, expected: float) -> None:
    assert SCORERS[name]("red", ["red"] * agreeing + ["blue"] * (10 - agreeing)) == pytest.approx(expected)


# What the reference scorers give when all ten annotators say `answer`.
_CLEANING = [
    # prediction, answer, vqav2, vizwiz, textvqa
    ("Yes.", "yes", 1, 1, 1),
    ("YES", "Yes", 0, 0, 1),  # only TextVQA lowers what annotators said
    ("two", "2", 1, 1, 1),
    ("two", "two", 0, 0, 1),
    ("none", "0", 1, 1, 1),
    ("eleven", "eleven", 1, 1, 1),
    ("the cat", "cat", 1, 1, 1),
    ("the cat", "the cat", 0, 0, 1),
    ("The A an", "", 1, 1, 1),
    ("", "", 1, 1, 1),
    (" \n\t ", "", 1, 1, 1),
    ("red\nblue", "red blue", 1, 1, 1),
    ("  red \t  blue ", "red blue", 1, 1, 1),
    ("red\u00a0blue", "red blue", 1, 1, 1),  # split() takes every Unicode space
    ("t-shirt", "t shirt", 1, 1, 1),  # a mark between letters becomes a space,
    ("t- shirt", "t shirt", 1, 1, 1),  # but goes if it touches a space anywhere,
    ("t- shirt x-y", "t shirt xy", 1, 1, 1),
    ("1,000 t-shirts", "1000 tshirts", 1, 1, 0),  # and all go where there is a number like 1,000;
    ("1,000 t-shirts", "1000 t shirts", 0, 0, 1),  # TextVQA has taken the commas away before
    ("\u0661,\u0660", "\u0661\u0660", 1, 1, 1),  # any Unicode digit counts
    ("red,blue", "red blue", 1, 1, 0),
    ("red,blue", "redblue", 0, 0, 1),
    ("why?not", "why not", 1, 1, 0),
    ("u.s.", "us", 1, 1, 1),
    ("3.5", "3.5", 1, 1, 1),
    ("a.5", "a.5", 1, 1, 1),
    ("5.", "5", 1, 1, 1),
    ("x:y", "x:y", 1, 1, 1),  # not among the marks
    ("`x`", "x", 1, 1, 1),
    ("dont", "don't", 1, 0, 1),
    ("dont", "don`t", 0, 1, 0),
    ("cant", "can't", 1, 1, 1),  # one of the few that VizWiz writes with an apostrophe
    ("couldn'tve", "couldn't've", 1, 0, 1),
    ("couldn'tve", "couldn`t`ve", 0, 1, 0),
    ("somebody'd", "somebodyd", 1, 0, 1),
    ("Im", "I'm", 0, 0, 0),  # the tables know "Im", but it is "im" by then
    ("man's", "man's", 1, 1, 1),
    ("mans", "man's", 0, 0, 0),
    ("it's", "it 's", 0, 0, 1),
    ("\u0130x", "i\u0307x", 1, 1, 1),  # lower case may be longer
    ("don\u2019t", "don't", 0, 0, 0),
    ("." * 33 + "x", "." * 33 + "x", 1, 0, 1),  # the reference drops 32 periods from a text, not all
    ("." * 33 + "x", ".x", 0, 1, 0),
]


@pytest.mark.parametrize(("prediction", "answer", "vqav2", "vizwiz", "textvqa"), _CLEANING)
def test_cleaning_is_that_of_the_reference(
    prediction: str, answer: str, vqav2: float, vizwiz: float, textvqa: float
) -> None:
    scores = {name: SCORERS[name](prediction, [answer] * 10) for name in ("vqav2", "vizwiz", "textvqa")}
    assert scores == {"vqav2": vqav2, "vizwiz": vizwiz, "textvqa": textvqa}


def test_contractions_are_the_spellings_of_the_reference() -> None:
    assert (len(_WITH_APOSTROPHE), len(_WITH_BACKTICK)) == (114, 75)
    assert _WITH_APOSTROPHE["couldnt've"] == _WITH_APOSTROPHE["couldn'tve"] == "couldn't've"
    assert _WITH_BACKTICK["dont"] == "don`t"
    assert _WITH_BACKTICK["cant"] == "can't"
    assert "somebody'd" not in _WITH_BACKTICK


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("Traffic-light.", "trafficlight", 1),
        ("A", "A", 0),  # GQA's own answers are not normalised
        ("the cat", "cat", 0),  # and articles stay
        ("yes, it is", "yes", 0),
        ("- yes", "yes", 0),  # a space that punctuation leaves behind is not stripped
        ("caf\u00e9\u2026", "caf\u00e9", 0),  # only ASCII punctuation goes
        ("", "", 1),
    ],
)
def test_gqa_normalises_the_prediction_only(prediction: str, answer: str, expected: float) -> None:
    assert SCORERS["gqa"](prediction, answer) == SCORERS["gqa"](prediction, [answer]) == expected


def test_one_text_is_one_answer_and_not_its_letters() -> None:
    assert SCORERS["gqa"]("e", "yes") == 0.0
    assert SCORERS["gqa"]("es", ["yes", "es"]) == 1.0


def test_exact_normalises_both_sides() -> None:
    assert SCORERS["exact"](" a.", ["A"]) == 1.0
    assert SCORERS["exact"]("red", ["blue", "green"]) == 0.0


@pytest.mark.parametrize("name", sorted(TEXT_RULES))
def test_nothing_to_compare_with_is_an_error(name: str) -> None:
    with pytest.raises(DataError, match="those of the annotators"):
        SCORERS[name]("yes", [])


@pytest.mark.parametrize("name", sorted(TEXT_RULES))
@pytest.mark.parametrize("answers", [[{"answer": "yes"}], {"yes": 10}, 2.5, True, None])
def test_answers_that_are_no_texts_are_an_error(name: str, answers: object) -> None:
    with pytest.raises(DataError, match="cannot be scored"):
        SCORERS[name]("yes", answers)


@pytest.mark.parametrize("name", sorted(TEXT_RULES))
@pytest.mark.parametrize("prediction", [None, 3, ["yes"], {"yes": 0.7}])
def test_a_prediction_that_is_no_text_is_an_error(name: str, prediction: object) -> None:
    answers = {"pope": "yes", "tallyqa": "3"}.get(name, ["yes"] * 10)
    with pytest.raises(DataError, match=r"cannot be scored|not the probabilities"):
        SCORERS[name](prediction, answers)


@pytest.mark.parametrize("name", ["vqav2", "vizwiz", "textvqa"])
def test_a_vote_needs_a_list(name: str) -> None:
    with pytest.raises(DataError, match="needs a list of texts"):
        SCORERS[name]("yes", "yes")


def test_which_rule_scores_a_benchmark() -> None:
    assert [rule_of(name) for name in ("vqav2", "mini-count", "gqa")] == [
        TEXT_RULES[name] for name in ("vqav2", "exact", "gqa")
    ]
    paper = ["vqav2", "gqa", "vizwiz", "textvqa_ocr", "textvqa", "pope", "tallyqa"]
    assert set(SCORERS) >= {*paper, "refcoco", "refcoco+", "refcocog", "ocid_ref"}


def test_rules_need_no_torch() -> None:
    code = "import sys, vlmx.evaluate.metrics; print({'torch', 'zarr', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
