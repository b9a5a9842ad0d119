"""Which benchmarks go together? Pearson's correlation between benchmarks, over models, with intervals.

As in the paper (section 4.1): each model is a point, and every two columns of its scores are correlated. The paper's
figure covers "all the checkpoint runs"; over its 99 published rows, text benchmarks and boxes correlate within 0.02 of
the range that it names for VQA-v2, GQA, POPE and TallyQA, and within 0.08 of the one for TextVQA and VizWiz.

The 95 % intervals take the models for independent draws. Published rows are not (one encoder at several sizes, with two
connectors), so their intervals are rather too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import numpy.typing as npt

from vlmx.errors import UsageError
from vlmx.evaluate.aggregate import LOC_QUESTIONS, VQA_QUESTIONS, average, weighted_averages
from vlmx.evaluate.paper_rows import PaperRow
from vlmx.registry import unknown_name

Interval = Literal["fisher", "bootstrap"]
INTERVAL_TEXT: Mapping[Interval, str] = {
    "fisher": "Fisher's z",
    "bootstrap": "bootstrap over models",
}
LEAST_MODELS = 4
RESAMPLES = 2000
BENCHMARKS = (*VQA_QUESTIONS, *LOC_QUESTIONS)
AVERAGES = ("weighted_vqa", "weighted_loc", "weighted_overall", "macro")
IN1K = "in1k"
COLUMN_GROUPS: Mapping[str, tuple[str, ...]] = {
    "vqa": tuple(VQA_QUESTIONS),
    "loc": tuple(LOC_QUESTIONS),
    "averages": AVERAGES,
    "all": (*BENCHMARKS, *AVERAGES, IN1K),
}
_Z_975 = 1.959963984540054

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The correlation of two columns.

    Attributes:
        r: Pearson's coefficient; None if there is none.
        interval95: of r; None without r.
        n: how many models have both columns.
        blank: why there is no r; "" if there is one.
    """

    r: float | None
    interval95: tuple[float, float] | None
    n: int
    blank: str = ""


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """A matrix of correlations.

    Attributes:
        columns: in order.
        pairs: (earlier column, later column) -> their correlation.
        models: how many there are.
        interval: how the intervals were made.
    """

    columns: tuple[str, ...]
    pairs: Mapping[tuple[str, str], Cell]
    models: int
    interval: Interval

    def cell(self, first: str, second: str) -> Cell | None:
        """The correlation of two columns in either order; None of a column with itself."""
        if first == second:
            return None
        return self.pairs[(first, second) if (first, second) in self.pairs else (second, first)]


def correlate(
    models: Sequence[Mapping[str, float]], columns: Sequence[str], *, interval: Interval = "fisher", seed: int = 0
) -> Correlation:
    """Pearson's coefficient of every two columns, over the models that have both.

    Args:
        models: the numbers of each by column; a column that a model lacks is left out for it.
        columns: two or more.
        interval: "fisher" transforms r to a normal variable (Fisher's z), "bootstrap" draws models again and again.
        seed: of the bootstrap.

    Returns:
        A pair with fewer than four models, or with a column that is the same for all of them, is blank.

    Raises:
        UsageError: there are fewer than four models or two columns, or all pairs are blank.
    """
    if len(models) < LEAST_MODELS:
        raise UsageError(
            "there are too few models to correlate anything",
            why=f"{len(models)} given, at least {LEAST_MODELS} are needed",
            fix="name more runs, or add the paper's rows with --published",
        )
    names = tuple(dict.fromkeys(columns))
    if len(names) < 2:
        raise UsageError("a correlation needs two columns", why=f"given: {', '.join(names) or 'none'}")
    table = {name: np.asarray([model.get(name, math.nan) for model in models], dtype=np.float64) for name in names}
    pairs = {(a, b): _cell(table[a], table[b], interval, seed) for a, b in combinations(names, 2)}
    if all(cell.r is None for cell in pairs.values()):
        reasons = sorted({cell.blank for cell in pairs.values()})
        raise UsageError("none of the columns can be correlated", why="; ".join(reasons))
    return Correlation(columns=names, pairs=pairs, models=len(models), interval=interval)


def _cell(first_M: Floats, second_M: Floats, interval: Interval, seed: int) -> Cell:
    both = ~(np.isnan(first_M) | np.isnan(second_M))
    x_M, y_M = first_M[both], second_M[both]
    n = len(x_M)
    if n < LEAST_MODELS:
        return Cell(r=None, interval95=None, n=n, blank=f"only {n} models have both columns")
    if np.ptp(x_M) == 0 or np.ptp(y_M) == 0:
        return Cell(r=None, interval95=None, n=n, blank="a column is the same for all models")
    r = float(_pearson(x_M[None], y_M[None])[0])
    return Cell(r=r, interval95=fisher95(r, n) if interval == "fisher" else _bootstrap95(x_M, y_M, seed), n=n)


def _pearson(x_RM: Floats, y_RM: Floats) -> Floats:
    """Pearson's r of each row, NaN where a row is constant."""
    x_RM, y_RM = x_RM - x_RM.mean(axis=1, keepdims=True), y_RM - y_RM.mean(axis=1, keepdims=True)
    scale_R = np.sqrt((x_RM**2).sum(axis=1) * (y_RM**2).sum(axis=1))
    r_R: Floats = np.full(len(scale_R), np.nan)
    np.divide((x_RM * y_RM).sum(axis=1), scale_R, out=r_R, where=scale_R > 0)
    return r_R.clip(-1, 1)


def fisher95(r: float, n: int) -> tuple[float, float]:
    """95 % interval of Pearson's r over n models: atanh(r) is taken as normal with variance 1 / (n - 3)."""
    if abs(r) >= 1:
        return r, r
    half = _Z_975 / math.sqrt(n - 3)
    return math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)


def _bootstrap95(x_M: Floats, y_M: Floats, seed: int) -> tuple[float, float]:
    drawn_RM = np.random.default_rng(seed).integers(len(x_M), size=(RESAMPLES, len(x_M)))
    low, high = np.nanquantile(_pearson(x_M[drawn_RM], y_M[drawn_RM]), (0.025, 0.975))
    return float(low), float(high)


def published_model(row: PaperRow) -> dict[str, float]:
    """The numbers of a published row by column: benchmarks, averages and ImageNet accuracy as printed, and macro."""
    published = row.published
    return {
        **published.scores,
        "weighted_vqa": published.weighted_vqa,
        "weighted_loc": published.weighted_loc,
        "weighted_overall": published.weighted_overall,
        "macro": weighted_averages(published.scores).macro,
        **_imagenet(row),
    }


def scored_model(scores: Mapping[str, float], row: PaperRow | None) -> dict[str, float]:
    """The numbers of a run by column.

    Args:
        scores: percent by benchmark. An average is there if it has all its benchmarks, rounded like the paper's.
        row: the published row that the run corresponds to, for the ImageNet accuracy of its encoder; None without one.
    """
    parts = {
        "weighted_vqa": VQA_QUESTIONS,
        "weighted_loc": LOC_QUESTIONS,
        "weighted_overall": {**VQA_QUESTIONS, **LOC_QUESTIONS},
    }
    averages = {name: average(scores, parts[name])[0] for name in parts if set(parts[name]) <= set(scores)}
    macro = {"macro": average(scores, dict.fromkeys(BENCHMARKS, 1))[1]} if set(BENCHMARKS) <= set(scores) else {}
    return {**scores, **averages, **macro, **(_imagenet(row) if row else {})}


def _imagenet(row: PaperRow) -> dict[str, float]:
    """ImageNet-1K accuracy of the row's encoder in percent, under its column; empty where the paper prints none."""
    printed = row.published.model.get(IN1K, "")
    return {IN1K: float(printed)} if printed else {}


def known_columns(models: Sequence[Mapping[str, float]]) -> list[str]:
    """What there is to correlate: the paper's benchmarks in its order, others, averages, ImageNet accuracy."""
    there = {name: None for model in models for name in model}
    last = (*AVERAGES, IN1K)
    others = [name for name in there if name not in BENCHMARKS and name not in last]
    return [name for name in (*BENCHMARKS, *others, *last) if name in there]


def expand_columns(text: str, known: Sequence[str]) -> list[str]:
    """Columns from a comma-separated list of columns and groups ("vqa", "loc", "averages", "all").

    Args:
        text: as the user wrote it; "-" is taken for "_".
        known: columns that some model has; a group stands for those of its columns that are known.

    Raises:
        UnknownNameError: no model has such a column.
    """
    found: list[str] = []
    for word in (part.strip() for part in text.split(",")):
        name = word if word in known else word.replace("-", "_")
        if name in COLUMN_GROUPS:
            found += [column for column in COLUMN_GROUPS[name] if column in known]
        elif name in known:
            found.append(name)
        else:
            raise unknown_name("column", word, [*known, *COLUMN_GROUPS], listing="vlmx correlate --help")
    return list(dict.fromkeys(found))
