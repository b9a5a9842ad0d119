"""Is the matrix Pearson's, are its intervals right, and does the command draw what it prints?"""

import csv
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from vlmx.errors import UnknownNameError, UsageError
from vlmx.evaluate.aggregate import LOC_QUESTIONS
from vlmx.evaluate.correlate import (
    BENCHMARKS,
    COLUMN_GROUPS,
    correlate,
    expand_columns,
    fisher95,
    known_columns,
    published_model,
    scored_model,
)
from vlmx.evaluate.correlate_command import correlate as command
from vlmx.evaluate.paper_rows import paper_row, paper_rows

PUBLISHED = [published_model(row) for row in paper_rows()]


def models(**columns: list[float | None]) -> list[dict[str, float]]:
    count = len(next(iter(columns.values())))
    return [{name: value for name in columns if (value := columns[name][at]) is not None} for at in range(count)]


def test_the_papers_rows_give_what_the_paper_says() -> None:
    # section 4.1: localization is consistent; VQA-v2, GQA, POPE, TallyQA "from 0.65 to 0.80", TextVQA and VizWiz "from
    # 0.23 to 0.50". Its matrix is over all runs it made, of which the 99 rows are what it prints.
    found = correlate(PUBLISHED, BENCHMARKS)

    def with_boxes(*names: str) -> list[float]:
        return [cell.r for a in names for b in LOC_QUESTIONS if (cell := found.cell(a, b)) and cell.r is not None]

    strong = with_boxes("vqav2", "gqa", "pope", "tallyqa")
    weak = with_boxes("textvqa", "textvqa_ocr", "vizwiz")
    assert (len(strong), len(weak)) == (16, 12)
    assert (min(strong), max(strong)) == pytest.approx((0.65, 0.80), abs=0.02)
    assert (min(weak), max(weak)) == pytest.approx((0.23, 0.50), abs=0.08)
    assert min(with_boxes("refcoco", "refcoco+", "refcocog")) > 0.96


def test_every_coefficient_is_numpys() -> None:
    found = correlate(PUBLISHED, BENCHMARKS)
    matrix = np.corrcoef([[model[name] for model in PUBLISHED] for name in BENCHMARKS])
    for at, first in enumerate(BENCHMARKS):
        for beside, second in enumerate(BENCHMARKS):
            cell = found.cell(first, second)
            assert (cell is None) == (first == second)
            if cell is not None:
                assert cell.r == pytest.approx(matrix[at, beside])
                assert cell.n == 99
                assert cell == found.cell(second, first)


def test_fishers_interval() -> None:
    # by hand for r = 0.5, n = 28: atanh(0.5) = 0.5493, 1.96 / 5 = 0.3920, tanh(0.1573) = 0.1560, tanh(0.9413) = 0.7358
    assert fisher95(0.5, 28) == pytest.approx((0.1560, 0.7358), abs=1e-4)
    assert fisher95(1.0, 28) == (1.0, 1.0)
    assert fisher95(-1.0, 4) == (-1.0, -1.0)


def test_both_intervals_agree_where_models_are_independent() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=400)
    y = 0.6 * x + 0.8 * rng.normal(size=400)
    some = models(x=x.tolist(), y=y.tolist())
    fisher, bootstrap = (correlate(some, ["x", "y"], interval=kind).cell("x", "y") for kind in ("fisher", "bootstrap"))
    assert fisher is not None
    assert bootstrap is not None
    assert fisher.interval95 == pytest.approx(bootstrap.interval95, abs=0.03)
    assert fisher.interval95 is not None
    assert fisher.interval95[0] < 0.6 < fisher.interval95[1]


def test_models_without_a_column_are_left_out_of_its_pairs() -> None:
    some = models(a=[1, 2, 3, 4, 5], b=[2, 4, 6, 8, 0], c=[1, 0, 1, 0, None])
    found = correlate(some, ["a", "b", "c"])
    assert [(cell.n, cell.blank) for cell in found.pairs.values()] == [(5, ""), (4, ""), (4, "")]
    cell = correlate(some, ["a", "b", "c"]).cell("c", "a")
    assert cell is not None
    assert cell.r == pytest.approx(-1 / np.sqrt(5))


def test_what_cannot_be_correlated_is_blank() -> None:
    found = correlate(
        models(a=[1, 2, 3, 4], b=[4, 3, 2, 1], same=[7, 7, 7, 7], rare=[1, 2, None, None]), ["a", "b", "same", "rare"]
    )
    blanks = {pair: cell.blank for pair, cell in found.pairs.items() if cell.r is None}
    assert blanks[("a", "same")] == "a column is the same for all models"
    assert blanks[("a", "rare")] == "only 2 models have both columns"
    assert len(blanks) == 5
    cell = found.cell("a", "b")
    assert cell is not None
    assert (cell.r, cell.interval95) == (-1, (-1, -1))


@pytest.mark.parametrize(
    ("some", "columns", "match"),
    [
        (models(a=[1, 2, 3], b=[1, 2, 3]), ["a", "b"], "too few models.*3 given"),
        (models(a=[1, 2, 3, 4]), ["a"], "needs two columns"),
        (models(a=[1, 2, 3, 4], b=[5, 5, 5, 5]), ["a", "b"], "none of the columns.*same for all models"),
    ],
)
def test_too_little_is_an_error(some: list[dict[str, float]], columns: list[str], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        correlate(some, columns)


def test_a_run_has_averages_only_of_whole_groups() -> None:
    row = paper_row("vmamba-t-in1k@224/mlp2")
    whole = scored_model(row.published.scores, row)
    assert whole == published_model(row)
    assert whole["in1k"] == 82.6
    some = scored_model({name: row.published.scores[name] for name in (*LOC_QUESTIONS, "gqa")}, None)
    assert set(some) == {*LOC_QUESTIONS, "gqa", "weighted_loc"}
    assert some["weighted_loc"] == 39.20


def test_columns_and_groups() -> None:
    known = known_columns([*PUBLISHED, {"mini-ref": 1.0}])
    assert known == [*BENCHMARKS, "mini-ref", "weighted_vqa", "weighted_loc", "weighted_overall", "macro", "in1k"]
    assert expand_columns("loc,ocid-ref,mini-ref", known) == [*LOC_QUESTIONS, "mini-ref"]
    assert expand_columns("all", ["gqa", "in1k", "x"]) == ["gqa", "in1k"]
    with pytest.raises(UnknownNameError, match="did you mean 'vqav2'"):
        expand_columns("vqav3", known)


def run(*args: str) -> Result:
    return CliRunner().invoke(command, list(args), catch_exceptions=False, standalone_mode=False)


def test_the_command_prints_the_matrix() -> None:
    result = run("--published", "--columns", "vqav2,gqa,in1k")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["Pearson's", "r", "1", "2", "3"]
    assert lines[1] == ["1", "vqav2", "1", "0.97", "0.06"]
    assert lines[2] == [".96", ".98", "-.47", ".55"]
    assert "99 models" in result.stderr
    assert "only 15 of them have in1k" in result.stderr
    found = json.loads(run("--published", "--json", "--interval", "bootstrap").stdout)
    assert (found["columns"], found["models"], found["interval"]) == (list(BENCHMARKS), 99, "bootstrap")
    assert len(found["pairs"]) == 55


def test_the_command_writes_pictures_and_pairs(tmp_path: Path) -> None:
    columns = ("--published", "--columns", "vqav2,refcoco,in1k")
    run(*columns, "-o", str(tmp_path / "heat.png"))
    png = (tmp_path / "heat.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", png[16:24])) > 300
    run(*columns, "-o", str(tmp_path / "heat.svg"))
    assert "<svg" in (tmp_path / "heat.svg").read_text()
    run(*columns, "-o", str(tmp_path / "pairs.csv"))
    pairs = list(csv.DictReader((tmp_path / "pairs.csv").read_text().splitlines()))
    assert [(pair["first"], pair["second"], pair["n"]) for pair in pairs] == [
        ("vqav2", "refcoco", "99"),
        ("vqav2", "in1k", "15"),
        ("refcoco", "in1k", "15"),
    ]
    assert float(pairs[0]["low95"]) < float(pairs[0]["r"]) < float(pairs[0]["high95"])


@pytest.mark.parametrize(
    ("args", "match"),
    [([], "nothing to correlate"), (["--published", "-o", "heat.txt"], "no known kind")],
)
def test_the_command_refuses(args: list[str], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        run(*args)


def test_every_group_exists() -> None:
    assert all(set(group) <= set(PUBLISHED[0]) for group in COLUMN_GROUPS.values())
