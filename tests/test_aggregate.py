"""Are the paper's averages reproduced on every row of its tables, to the last digit?"""

import csv
from importlib.resources import files
from pathlib import Path

import pytest

from vlmx.errors import DataError
from vlmx.evaluate.aggregate import (
    LOC_QUESTIONS,
    VQA_QUESTIONS,
    average,
    averages_by_questions,
    published_rows,
    weighted_averages,
)

COLUMNS = (*VQA_QUESTIONS, *LOC_QUESTIONS)


def row(*scores: float) -> dict[str, float]:
    return dict(zip(COLUMNS, scores, strict=True))


VMAMBA_T = row(64.99, 54.02, 44.96, 44.62, 12.22, 81.70, 54.58, 58.25, 46.64, 51.74, 20.24)
VIT_S = row(59.86, 50.48, 46.69, 44.02, 12.30, 77.76, 48.96, 32.32, 21.77, 24.80, 5.08)
DINO_SIGLIP = row(78.59, 61.66, 59.36, 59.93, 52.58, 88.31, 68.52, 78.83, 70.25, 75.29, 49.50)


@pytest.mark.parametrize(
    ("scores", "printed"),
    [
        (VMAMBA_T, (62.07, 39.20, 59.00)),
        (VIT_S, (57.25, 17.82, 51.95)),
        (DINO_SIGLIP, (75.75, 64.38, 74.22)),
    ],
)
def test_three_rows_by_hand(scores: dict[str, float], printed: tuple[float, float, float]) -> None:
    averages = weighted_averages(scores)
    assert (averages.vqa, averages.loc, averages.overall) == printed
    assert average(scores, {**VQA_QUESTIONS, **LOC_QUESTIONS}) == (averages.overall, averages.overall_exact)
    assert average(scores, LOC_QUESTIONS) == (averages.loc, averages.loc_exact)


def test_all_99_published_rows() -> None:
    rows = published_rows()
    assert len(rows) == 99
    for published in rows:
        averages = weighted_averages(published.scores)
        printed = (published.weighted_vqa, published.weighted_loc, published.weighted_overall)
        assert (averages.vqa, averages.loc, averages.overall) == printed, published.model


def test_rows_are_those_of_the_reference_file(shared: Path) -> None:
    reference = list(csv.DictReader((shared / "paper/results.csv").read_text().splitlines()))
    assert len(reference) == 99
    for printed, ours in zip(reference, published_rows(), strict=True):
        assert {name: float(printed[name]) for name in ours.scores} == ours.scores
        # text values and extra columns as they come
        assert weighted_averages(printed)["vqa"] == float(printed["weighted_vqa"])


def test_the_table_ships_as_it_is_in_the_reference(shared: Path) -> None:
    ours = files("vlmx.evaluate").joinpath("paper/results.csv").read_bytes()
    assert ours == (shared / "paper/results.csv").read_bytes()


def test_one_row_as_attributes_and_by_name() -> None:
    averages = weighted_averages(VMAMBA_T)
    assert (averages.vqa, averages.loc, averages.overall) == (62.07, 39.20, 59.00)
    assert averages["overall"] == averages.overall
    assert set(averages) == {"vqa", "loc", "overall", "vqa_exact", "loc_exact", "overall_exact", "macro"}
    assert averages.macro == pytest.approx(sum(VMAMBA_T.values()) / 11)
    assert averages.vqa_exact == pytest.approx(62.07, abs=0.005)
    with pytest.raises(KeyError):
        averages["median"]


def test_scores_are_rounded_before_and_half_up_after() -> None:
    # in the mean of 10.005 and 10.00 the first counts as 10.01, and 10.005 is then rounded up, not to even
    averages = averages_by_questions(
        {"a": 10.005, "b": "10.00", "c": 0}, vqa_questions={"a": 7, "b": 7}, loc_questions={"c": 1}
    )
    assert averages.vqa == 10.01
    assert averages.vqa_exact == 10.0025


def test_every_missing_or_impossible_column_is_named() -> None:
    incomplete = {name: value for name, value in VMAMBA_T.items() if name not in ("pope", "refcoco+")}
    with pytest.raises(DataError, match=r"pope, refcoco\+"):
        weighted_averages(incomplete)
    with pytest.raises(DataError, match=r"gqa='x'.*pope=101.*refcoco=nan"):
        weighted_averages({**VMAMBA_T, "gqa": "x", "pope": 101, "refcoco": float("nan")})


def test_a_hyphen_is_taken_for_an_underscore() -> None:
    hyphens = {name.replace("_", "-"): value for name, value in VMAMBA_T.items()}
    assert {"ocid-ref", "textvqa-ocr"} < set(hyphens)
    assert weighted_averages(hyphens) == weighted_averages(VMAMBA_T)
    with pytest.raises(DataError, match=r"two scores.*ocid_ref"):
        weighted_averages({**VMAMBA_T, "ocid-ref": 20.24})
