"""Is one run better than another, or is it chance? Means and paired differences, with intervals by image.

POPE's score is the mean of its splits, and it stays so when its questions stand in an average with others.

Two runs are held against each other only on questions that are the same: files of another version may give an id to
another question.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from vlmx.data.records import Question
from vlmx.errors import UsageError
from vlmx.evaluate.intervals import Estimate, estimate, paired_difference
from vlmx.evaluate.metrics import MEAN_OF_TYPES
from vlmx.evaluate.score import Grade

SAME_FILES = "answer both with the same annotation files (vlmx eval --data-root)"
_ROUNDING = 1e-9  # percentage points that sums in another order may differ by
Key = tuple[str, str]  # benchmark and id: two benchmarks may ask the same questions, as TextVQA with and without OCR


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far the first run is ahead of the second.

    Attributes:
        first, second: names of the runs.
        points: mean paired difference in percentage points, first minus second.
        interval95: its bootstrap interval over images.
        n: number of questions that both answered.
        benchmarks: those that the questions are of.
        unlike: how many more have the same id in both runs, and are not the same question (`is_same`).
        first_percent, second_percent: what each scores on these.
    """

    first: str
    second: str
    points: float
    interval95: tuple[float, float]
    n: int
    benchmarks: tuple[str, ...]
    unlike: int
    first_percent: float
    second_percent: float

    @property
    def separable(self) -> bool | None:
        """Whether the interval leaves out zero; None if it says nothing about chance (`has_width`)."""
        low, high = self.interval95
        return (low > 0 or high < 0) if has_width(self.interval95) else None

    @property
    def basis(self) -> str:
        """What the numbers stand on: "80 questions of vqav2, pope; 12 left out: same id, another question"."""
        more = f"; {self.unlike:,} left out: same id, another question" if self.unlike else ""
        return f"{_questions(self.n)} of {', '.join(self.benchmarks)}{more}"

    def sentence(self, subject: str) -> str:
        """E.g. "a > b on boxes: +5.1 [3.0, 7.2], 80 questions of refcoco", or that they are not separable."""
        low, high = self.interval95
        numbers = f"{self.points:+.1f} [{low:.1f}, {high:.1f}], {self.basis}"
        if not self.separable:
            return f"{self.first} and {self.second} are not separable on {subject}: {numbers}"
        return f"{self.first} {'>' if self.points > 0 else '<'} {self.second} on {subject}: {numbers}"


def has_width(interval95: tuple[float, float]) -> bool:
    """Whether an interval says anything about chance.

    It does not where all answers are worth the same, as those of one image are: resampling then always gives the same.
    """
    low, high = interval95
    return high - low > _ROUNDING


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
    (shared, theirs), unlike = common([first_grades, second_grades])
    if not shared:
        raise UsageError(
            f"'{first}' and '{second}' have answered no question in common",
            why=unlike_text(unlike),
            fix=SAME_FILES if unlike else "",
        )
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
        benchmarks=tuple(dict.fromkeys(g.question.benchmark for g in shared)),
        unlike=unlike,
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
    rows, unlike = common(list(grades_by_run.values()))
    if not (rows and rows[0]):
        raise UsageError(
            "the runs have answered no question in common",
            why="; ".join(filter(None, [", ".join(grades_by_run), unlike_text(unlike)])),
            fix=SAME_FILES if unlike else "compare runs that were asked the same benchmarks",
        )
    kept = dict(zip(grades_by_run, rows, strict=True))
    means = {name: percent(grades, counts=counts) for name, grades in kept.items()}
    ranked = sorted(kept, key=lambda name: (-means[name], name))
    steps = [compare(a, kept[a], b, kept[b], counts=counts) for a, b in pairwise(ranked)]
    return [replace(step, unlike=unlike) for step in steps]


def common(rows: Sequence[Sequence[Grade]]) -> tuple[list[list[Grade]], int]:
    """What all runs answered.

    Args:
        rows: the grades of each run.

    Returns:
        For each row its grades of the questions that are in all of them, in the order of the first; and how many more
        are in all of them by benchmark and id, but are not the same question.
    """
    by_key = [{key_of(g.question): g for g in row} for row in rows]
    if not by_key:
        return [], 0
    first, *others = by_key
    known = [key for key in first if all(key in other for other in others)]
    same = [key for key in known if all(is_same(first[key].question, other[key].question) for other in others)]
    return [[row[key] for key in same] for row in by_key], len(known) - len(same)


def key_of(question: Question) -> Key:
    """What a question is known by among those of all benchmarks."""
    return question.benchmark, question.id


def is_same(question: Question, other: Question) -> bool:
    """Whether two questions with the same key ask the same of the same image, and have the same right answer.

    Annotation files of two versions may number their questions differently. The wordings of a phrase to locate (see
    vlmx.data.wording) do not make it another question.
    """
    return question is other or _content(question) == _content(other)


def _content(question: Question) -> tuple[object, ...]:
    phrase = question.prompt.replace('"', "").rstrip(".") if question.kind == "box" else question.prompt
    return question.image, question.kind, question.question_type, question.answers, question.box, phrase


def unlike_text(count: int) -> str:
    """What to say of questions that have the same id and are not the same; "" if there are none."""
    if not count:
        return ""
    return f"{_questions(count)} with the same id, but not the same image, wording or annotation"


def _questions(count: int) -> str:
    return f"{count:,} question{'' if count == 1 else 's'}"


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
