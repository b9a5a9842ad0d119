"""Is one run better than another, or is it chance? Paired differences, with intervals by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from vlmx.errors import UsageError
from vlmx.evaluate.intervals import interval95
from vlmx.evaluate.score import Grade


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far the first run is ahead of the second.

    Attributes:
        first, second: names of the runs.
        points: mean paired difference in percentage points, first minus second.
        interval95: its bootstrap interval over images.
        n: number of questions that both answered.
    """

    first: str
    second: str
    points: float
    interval95: tuple[float, float]
    n: int

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


def compare(first: str, first_grades: Sequence[Grade], second: str, second_grades: Sequence[Grade]) -> Difference:
    """Paired difference over the questions that both runs answered.

    The interval holds for these two trained models and new images of the same kind; it knows nothing about other
    training seeds.

    Args:
        first, second: names of the runs.
        first_grades, second_grades: their grades, of one or several benchmarks.

    Raises:
        UsageError: the runs have no question in common.
    """
    others = {g.question.id: g.value for g in second_grades}
    pairs = [
        (g.question.image, 100 * (g.value - others[g.question.id])) for g in first_grades if g.question.id in others
    ]
    if not pairs:
        raise UsageError(f"'{first}' and '{second}' have answered no question in common")
    points = [value for _, value in pairs]
    return Difference(
        first=first,
        second=second,
        points=sum(points) / len(points),
        interval95=interval95(points, [image for image, _ in pairs]),
        n=len(points),
    )


def order(grades_by_run: Mapping[str, Sequence[Grade]]) -> list[Difference]:
    """Runs from best to worst by mean score, as the differences between neighbours in that order."""

    def mean(name: str) -> float:
        values = [g.value for g in grades_by_run[name]]
        return sum(values) / len(values)

    ranked = sorted(grades_by_run, key=lambda name: (-mean(name), name))
    return [compare(a, grades_by_run[a], b, grades_by_run[b]) for a, b in pairwise(ranked)]
