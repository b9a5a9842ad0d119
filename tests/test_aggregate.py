"""Are the paper's averages reproduced on every row of its tables, to the last digit?"""

import csv
from pathlib import Path

import pytest

from vlmx.errors import DataError
from vlmx.evaluate.aggregate import averages_by_questions, published_rows, weighted_averages

VMAMBA_T = dict(
    zip(
        [
            "vqav2",
            "gqa",
            "vizwiz",
            "textvqa_ocr",
            "textvqa",
            "pope",
            "tallyqa",
            "refcoco",
            "refcoco+",
            "refcocog",
            "ocid_ref",
        ],
        [64.99, 54.02, 44.96, 44.62, 12.22, 81.70, 54.58, 58.25, 46.64, 51.74, 20.24],
        strict=True,
    )
)


def test_all_99_published_rows() -> None:
    rows = published_rows()
    assert len(rows) == 99
    for row in rows:
        averages = weighted_averages(row.scores)
        printed = (row.weighted_vqa, row.weighted_loc, row.weighted_overall)
        assert (averages.vqa, averages.loc, averages.overall) == printed, row.model


def test_rows_are_those_of_the_reference_file(shared: Path) -> None:
    reference = list(csv.DictReader((shared / "paper/results.csv").read_text().splitlines()))
    assert len(reference) == 99
    for row, ours in zip(reference, published_rows(), strict=True):
        assert {name: float(row[name]) for name in ours.scores} == ours.scores
        assert weighted_averages(row)["vqa"] == float(row["weighted_vqa"])  # text values and extra columns as they come


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
