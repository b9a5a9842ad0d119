"""What does the paper's "weighted average" weigh? Averages by number of questions, exact to the last digit.

The paper weighs each benchmark by its number of questions, takes each score as printed (two decimals) and rounds half
up. VQA-v2 alone is 64 % of "overall", so an average in which every benchmark counts the same, `macro`, stands beside
it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation
from fractions import Fraction
from importlib.resources import files

from vlmx.errors import DataError

# Questions per benchmark. POPE has 2910 + 3000 + 3000; TextVQA counts twice, with and without OCR tokens in the prompt.
VQA_QUESTIONS: Mapping[str, int] = {
    "vqav2": 214_354,
    "gqa": 12_578,
    "vizwiz": 4_319,
    "textvqa_ocr": 5_000,
    "textvqa": 5_000,
    "pope": 8_910,
    "tallyqa": 38_589,
}
LOC_QUESTIONS: Mapping[str, int] = {"refcoco": 10_834, "refcoco+": 10_758, "refcocog": 4_896, "ocid_ref": 18_342}
_PRINTED = Decimal("0.01")


@dataclass(frozen=True, kw_only=True)
class Averages(Mapping[str, float]):
    """Averages in percent; readable as attributes and by name.

    Attributes:
        vqa, loc, overall: as the paper prints them: scores and averages rounded half up to two decimals.
        vqa_exact, loc_exact, overall_exact: the same weights on the scores as given, not rounded.
        macro: every benchmark counts the same, not rounded.
    """

    vqa: float
    loc: float
    overall: float
    vqa_exact: float
    loc_exact: float
    overall_exact: float
    macro: float

    def __getitem__(self, name: str) -> float:
        if name not in set(self):
            raise KeyError(name)
        return float(getattr(self, name))

    def __iter__(self) -> Iterator[str]:
        return (field.name for field in fields(self))

    def __len__(self) -> int:
        return len(fields(self))


def weighted_averages(scores: Mapping[str, float | str]) -> Averages:
    """The paper's averages of one model.

    Args:
        scores: percent by the column names of the paper's table: vqav2, gqa, vizwiz, textvqa_ocr, textvqa, pope,
            tallyqa, refcoco, refcoco+, refcocog, ocid_ref; "-" is taken for "_". Numbers or their text; other keys (a
            row's model, size, ...) are left alone.

    Raises:
        DataError: columns are missing or there twice, or values are not percentages; all are named.
    """
    return averages_by_questions(scores, vqa_questions=VQA_QUESTIONS, loc_questions=LOC_QUESTIONS)


def averages_by_questions(
    scores: Mapping[str, float | str], *, vqa_questions: Mapping[str, int], loc_questions: Mapping[str, int]
) -> Averages:
    """The same averages over any set of benchmarks.

    Args:
        scores: percent by benchmark.
        vqa_questions, loc_questions: number of questions by benchmark, for the two groups; both have at least one.

    Raises:
        DataError: as `weighted_averages`.
    """
    questions = {**vqa_questions, **loc_questions}
    exact = _percentages(scores, questions)
    printed = {name: value.quantize(_PRINTED, ROUND_HALF_UP) for name, value in exact.items()}
    groups = {"vqa": vqa_questions, "loc": loc_questions, "overall": questions}
    values = {name: _half_up(_mean(printed, counts)) for name, counts in groups.items()}
    values |= {f"{name}_exact": float(_mean(exact, counts)) for name, counts in groups.items()}
    return Averages(**values, macro=float(_mean(exact, dict.fromkeys(questions, 1))))


def average(scores: Mapping[str, float | str], questions: Mapping[str, int]) -> tuple[float, float]:
    """One average over any set of benchmarks: as the paper rounds, and not rounded.

    Args:
        scores: percent by benchmark.
        questions: what each benchmark weighs; at least one.

    Raises:
        DataError: as `weighted_averages`.
    """
    exact = _percentages(scores, questions)
    printed = {name: value.quantize(_PRINTED, ROUND_HALF_UP) for name, value in exact.items()}
    return _half_up(_mean(printed, questions)), float(_mean(exact, questions))


def _percentages(scores: Mapping[str, float | str], columns: Mapping[str, int]) -> dict[str, Decimal]:
    scores = _spelled(scores, columns)
    missing = [name for name in columns if name not in scores]
    if missing:
        raise DataError(
            f"no average without {', '.join(missing)}", why=f"{len(missing)} of {len(columns)} benchmarks have no score"
        )
    values, wrong = {}, []
    for name in columns:
        try:
            values[name] = Decimal(str(scores[name]))
        except InvalidOperation:
            wrong.append(f"{name}={scores[name]!r}")
            continue
        if not (values[name].is_finite() and 0 <= values[name] <= 100):
            wrong.append(f"{name}={scores[name]!r}")
    if wrong:
        raise DataError("scores have to be percentages, 0 to 100", why=", ".join(wrong))
    return values


def _spelled(scores: Mapping[str, float | str], columns: Mapping[str, int]) -> dict[str, float | str]:
    """The scores of `columns`, by the columns' own names."""
    found: dict[str, float | str] = {}
    twice = []
    for key, value in scores.items():
        name = key if key in columns else key.replace("-", "_")
        if name in found:
            twice.append(name)
        if name in columns:
            found[name] = value
    if twice:
        raise DataError("a benchmark has two scores", why=", ".join(twice), fix="leave one of the spellings out")
    return found


def _mean(values: Mapping[str, Decimal], counts: Mapping[str, int]) -> Fraction:
    return sum((Fraction(values[name]) * count for name, count in counts.items()), Fraction(0)) / sum(counts.values())


def _half_up(value: Fraction) -> float:
    hundredths = (value * 200 + 1) // 2  # floor(100 value + 1/2)
    return float(Decimal(int(hundredths)) / 100)


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """One model of the paper's result tables.

    Attributes:
        model: the row's description as printed: pretrained, encoder, connector, params, in1k, image_size, tokens.
        scores: percent by benchmark column.
        weighted_vqa, weighted_loc, weighted_overall: the averages as printed.
    """

    model: Mapping[str, str]
    scores: Mapping[str, float]
    weighted_vqa: float
    weighted_loc: float
    weighted_overall: float


def published_rows() -> list[PublishedRow]:
    """The 99 models of the paper's result tables, numbers as printed there; they ship as `paper/results.csv`.

    The paper: "Do VLMs Need Vision Transformers? Evaluating State Space Models as Vision Encoders".
    """
    text = files("vlmx.evaluate").joinpath("paper/results.csv").read_text()
    columns = [*VQA_QUESTIONS, *LOC_QUESTIONS]
    weighted = ("weighted_vqa", "weighted_loc", "weighted_overall")
    return [
        PublishedRow(
            model={key: value for key, value in row.items() if key not in columns and key not in weighted},
            scores={name: float(row[name]) for name in columns},
            **{name: float(row[name]) for name in weighted},
        )
        for row in csv.DictReader(text.splitlines())
    ]
