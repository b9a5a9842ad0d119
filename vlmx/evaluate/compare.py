"""Is one run better than another, or is it chance? Means and paired differences, with intervals by image.

POPE's score is the mean of its splits, and it stays so when its questions stand in an average with others.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

from vlmx.data.records import Question
from vlmx.errors import UsageError
from vlmx.evaluate.intervals import Estimate, estimate, paired_difference
from vlmx.evaluate.metrics import MEAN_OF_TYPES
from vlmx.evaluate.score import Grade

Key = tuple[str, str]  # benchmark and id: two benchmarks may ask the same questions, as TextVQA with and without OCR


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far the first run is ahead of the second.

    Attributes:
        first, second: names of the runs.
        points: mean paired difference in percentage points, first minus second.
        interval95: its bootstrap interval over images.
        n: number of questions that both answered.
        first_percent, second_percent: what each scores on these.
    """

    first: str
    second: str
    points: float
    interval95: tuple[float, float]
    n: int
    first_percent: float
    second_percent: float

    @property
    def separable(self) -> bool:
        """Whether the interval leaves out zero."""
        low, high = self.interval95
        return low > 0 or high < 0

    def sentence(self, subject: str) -> str:
        """E.g. "a > b on boxes: +5.1 [3.0, 7.2]" or "a and b are not separable on boxes: +0.4 [-1.0, 1.9]"."""
        low, high = self.interval95
        numbers = f"{self.points:+.1f} [{low:.1f}, {high:.1f}]"
        if not self.separable:
            return f"{self.first} and {self.second} are not separable on {subject}: {numbers}"
        return f"{self.first} {'>' if self.points > 0 else '<'} {self.second} on {subject}: {numbers}"


def mean(grades: Sequence[Grade], *, counts: Mapping[str, float] | None = None) -> Estimate:
    """The mean of grades of one or several benchmarks, in percent, with its interval.

    Args:
        grades: of at least one question.
        counts: weight of each benchmark; without it a benchmark weighs as many questions as it has here.
    """
    parts, weights = _parts([g.question for g in grades], counts)
    return estimate([100 * g.value for g in grades], [g.question.image for g in grades], strata=parts, weights=weights)


def percent(grades: Sequence[Grade], *, counts: Mapping[str, float] | None = None) -> float:
    """The value of `mean` alone, which takes no time."""
    parts, weights = _parts([g.question for g in grades], counts)
    by_part: dict[Hashable, list[float]] = defaultdict(list)
    for part, grade in zip(parts, grades, strict=True):
        by_part[part].append(100 * grade.value)
    return sum(weights[part] * sum(of) / len(of) for part, of in by_part.items()) / sum(weights.values())


def compare(
    first: str,
    first_grades: Sequence[Grade],
    second: str,
    second_grades: Sequence[Grade],
    *,
    counts: Mapping[str, float] | None = None,
) -> Difference:
    """Paired difference over the questions that both runs answered.

    The interval holds for these two trained models and new images of the same kind; it knows nothing about other
    training seeds.

    Args:
        first, second: names of the runs.
        first_grades, second_grades: their grades, of one or several benchmarks.
        counts: as of `mean`.

    Raises:
        UsageError: the runs have no question in common.
    """
    others = {key_of(g.question): g for g in second_grades}
    shared = [g for g in first_grades if key_of(g.question) in others]
    if not shared:
        raise UsageError(f"'{first}' and '{second}' have answered no question in common")
    theirs = [others[key_of(g.question)] for g in shared]
    parts, weights = _parts([g.question for g in shared], counts)
    found = paired_difference(
        [100 * g.value for g in shared],
        [100 * g.value for g in theirs],
        [g.question.image for g in shared],
        strata=parts,
        weights=weights,
    )
    return Difference(
        first=first,
        second=second,
        points=found.value,
        interval95=found.interval95,
        n=len(shared),
        first_percent=percent(shared, counts=counts),
        second_percent=percent(theirs, counts=counts),
    )


def order(
    grades_by_run: Mapping[str, Sequence[Grade]], *, counts: Mapping[str, float] | None = None
) -> list[Difference]:
    """Runs from best to worst, as the differences between neighbours in that order.

    Only questions that all runs answered count, for the order and for the differences: so both say the same.

    Args:
        grades_by_run: by name, of one or several benchmarks.
        counts: as of `mean`.

    Raises:
        UsageError: there is no question that all runs answered.
    """
    answered = [{key_of(g.question) for g in grades} for grades in grades_by_run.values()]
    common = reduce(set.intersection, answered) if answered else set()
    if not common:
        raise UsageError(
            "the runs have answered no question in common",
            why=", ".join(grades_by_run),
            fix="compare runs that were asked the same benchmarks",
        )
    kept = {name: [g for g in grades if key_of(g.question) in common] for name, grades in grades_by_run.items()}
    means = {name: percent(grades, counts=counts) for name, grades in kept.items()}
    ranked = sorted(kept, key=lambda name: (-means[name], name))
    return [compare(a, kept[a], b, kept[b], counts=counts) for a, b in pairwise(ranked)]


def key_of(question: Question) -> Key:
    """What a question is known by among those of all benchmarks."""
    return question.benchmark, question.id


def _parts(
    questions: Sequence[Question], counts: Mapping[str, float] | None
) -> tuple[list[Hashable], dict[Hashable, float]]:
    """The part of each question, within which questions count the same, and what each part weighs."""
    asked = Counter(question.benchmark for question in questions)
    weight_of = asked if counts is None else counts
    # without weights of their own, all benchmarks that are plain means over questions are one part
    parts: list[Hashable] = [
        (q.benchmark, q.question_type) if q.benchmark in MEAN_OF_TYPES else ("" if counts is None else q.benchmark, "")
        for q in questions
    ]
    benchmarks_of: dict[Hashable, set[str]] = defaultdict(set)
    splits: dict[str, set[Hashable]] = defaultdict(set)
    for part, question in zip(parts, questions, strict=True):
        benchmarks_of[part].add(question.benchmark)
        splits[question.benchmark].add(part)
    return parts, {
        part: sum(weight_of[name] / len(splits[name]) for name in benchmarks)
        for part, benchmarks in benchmarks_of.items()
    }
