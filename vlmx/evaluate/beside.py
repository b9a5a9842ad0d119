"""How far is a run from a published row? Benchmark by benchmark, and in the averages.

Averages weigh each benchmark by its number of questions, as the paper does, however few of them were asked. Where a run
lacks benchmarks, both sides are averaged over those that it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vlmx.evaluate.aggregate import LOC_QUESTIONS, VQA_QUESTIONS, average
from vlmx.evaluate.collapse import Collapse, collapse, highest_of_equal
from vlmx.evaluate.compare import has_width, mean
from vlmx.evaluate.paper_rows import PaperRow
from vlmx.evaluate.score import Grade, Score

Average = Literal["weighted_vqa", "weighted_loc", "weighted_overall", "macro"]
AVERAGE_TEXT: Mapping[Average, str] = {
    "weighted_vqa": "weighted VQA",
    "weighted_loc": "weighted Loc.",
    "weighted_overall": "weighted overall",
    "macro": "macro",
}
PAPER_QUESTIONS: Mapping[str, int] = {**VQA_QUESTIONS, **LOC_QUESTIONS}
_COLUMNS: Mapping[Average, Sequence[str]] = {
    "weighted_vqa": tuple(VQA_QUESTIONS),
    "weighted_loc": tuple(LOC_QUESTIONS),
    "weighted_overall": tuple(PAPER_QUESTIONS),
    "macro": tuple(PAPER_QUESTIONS),
}
_LAST_DIGIT = 0.005  # what the rounding of a published number may have taken away


@dataclass(frozen=True, kw_only=True)
class PaperLine:
    """One number of a run beside the published one, in percent.

    Attributes:
        name: a benchmark, or an `Average`.
        ours: two decimals, rounded as the paper does it.
        ours_exact: not rounded.
        interval95: of ours, by bootstrap over images.
        published: what the paper prints; of an average that is not over all its benchmarks, and of macro, what follows
            from the printed scores.
        n, expected: questions answered, and questions that there are.
        is_whole: whether it is over all questions, and all benchmarks of an average.
        marks: how it was made: a part of the questions, a part of the benchmarks, wording, frame of boxes.
    """

    name: str
    ours: float
    ours_exact: float
    interval95: tuple[float, float]
    published: float
    n: int
    expected: int
    is_whole: bool
    marks: tuple[str, ...]

    @property
    def difference(self) -> float:
        """Ours minus published, in points."""
        return round(self.ours - self.published, 2)

    @property
    def difference95(self) -> tuple[float, float]:
        """Its interval; the published number is taken as it stands, although it is a sample, too."""
        low, high = self.interval95
        return low - self.published, high - self.published

    @property
    def within(self) -> bool | None:
        """Whether the published number lies in our interval, as far as its rounding tells.

        None if all answers are worth the same: resampling them then says nothing about chance.
        """
        low, high = self.interval95
        known = has_width(self.interval95)
        return low - _LAST_DIGIT <= self.published <= high + _LAST_DIGIT if known else None


@dataclass(frozen=True, kw_only=True)
class BesidePaper:
    """A run beside its row.

    Attributes:
        lines: benchmarks in the paper's order.
        averages: those of which the run has any benchmark.
        left_out: benchmarks of the run that the paper does not have.
        remark: in what the boxes were asked for or compared in another way than the paper's; "" if they were not.
        collapse: the alarm, against the row.
    """

    lines: tuple[PaperLine, ...]
    averages: tuple[PaperLine, ...]
    left_out: tuple[str, ...]
    remark: str
    collapse: Collapse | None


def beside_paper(scores: Mapping[str, Score], grades: Mapping[str, Sequence[Grade]], row: PaperRow) -> BesidePaper:
    """A run's numbers and those of a published row.

    Args:
        scores, grades: of the run by benchmark, without the control; other benchmarks than the paper's are left out.
        row: what they are compared with.
    """
    published = row.published.scores
    known = [name for name in PAPER_QUESTIONS if name in scores]
    lines = [
        PaperLine(
            name=name,
            ours=average({name: scores[name].score}, {name: 1})[0],
            ours_exact=scores[name].score,
            interval95=scores[name].interval95,
            published=published[name],
            n=scores[name].n,
            expected=PAPER_QUESTIONS[name],
            is_whole=not part_of(scores[name]),
            marks=marks_of(scores[name]),
        )
        for name in known
    ]
    averages = {
        name: _paper_average(name, [c for c in columns if c in scores], scores, grades, published)
        for name, columns in _COLUMNS.items()
        if any(column in scores for column in columns)
    }
    return BesidePaper(
        lines=tuple(lines),
        averages=tuple(averages.values()),
        left_out=tuple(name for name in scores if name not in PAPER_QUESTIONS),
        remark=_remark([scores[name] for name in known]),
        collapse=_beside_row(
            averages.get("weighted_vqa"),
            averages.get("weighted_loc"),
            min((len({g.question.image for g in grades[name]}) for name in known if name in LOC_QUESTIONS), default=0),
        ),
    )


def weights_of(scores: Iterable[Score]) -> dict[str, int]:
    """What each benchmark weighs in an average over several: the paper's number of questions, or else its own.

    Args:
        scores: of one or several runs; how many questions were asked changes nothing.
    """
    found: dict[str, int] = {}
    for score in scores:
        found.setdefault(score.benchmark, PAPER_QUESTIONS.get(score.benchmark, score.expected))
    return found


def _paper_average(
    name: Average,
    columns: Sequence[str],
    scores: Mapping[str, Score],
    grades: Mapping[str, Sequence[Grade]],
    published: Mapping[str, float],
) -> PaperLine:
    counts = {column: 1 if name == "macro" else PAPER_QUESTIONS[column] for column in columns}
    ours, exact = average({column: scores[column].score for column in columns}, counts)
    members = [scores[column] for column in columns]
    found = mean([g for column in columns for g in grades[column]], counts=counts)
    return PaperLine(
        name=name,
        ours=ours,
        ours_exact=exact,
        interval95=found.interval95,
        published=average(published, counts)[0],
        n=sum(scores[column].n for column in columns),
        expected=sum(PAPER_QUESTIONS[column] for column in columns),
        is_whole=not parts_of_average(members, len(_COLUMNS[name])),
        marks=marks_of_average(members, len(_COLUMNS[name])),
    )


def _remark(scores: Sequence[Score]) -> str:
    boxes = [score for score in scores if score.kind == "box"]
    problems = []
    if any(score.wording != "paper" for score in boxes):
        problems.append("its box prompts are worded as in training (vlmx eval --profile paper words them as the paper)")
    if any(score.boxes != "paper" for score in boxes):
        problems.append("its boxes are compared in the source image, the paper's raw (--boxes paper)")
    return "; ".join(problems)


def _beside_row(text: PaperLine | None, box: PaperLine | None, images: int) -> Collapse | None:
    """The alarm; `images` is how many the box benchmark with the fewest has."""
    if text is None or box is None:
        return None
    known = has_width(box.interval95)
    return collapse(
        text=text.ours,
        box=box.ours,
        text_reference=text.published,
        box_reference=box.published,
        box_highest=box.interval95[1] if known else highest_of_equal(box.ours, images),
    )


def marks_of(score: Score) -> tuple[str, ...]:
    """What a reader has to know about a score before holding it against another one: how much was asked, and how."""
    part = part_of(score)
    return (*([f"partial: {part}"] if part else []), *_profile(score))


def part_of(score: Score) -> str:
    """How many questions were answered, and of how many, if these are not all of the benchmark's; else "".

    A benchmark of the paper has as many questions as the paper's, whatever its files have: both fewer and more than
    these are another set of questions, which is not to be compared with the whole, and so may be a subset of as many.
    """
    expected = PAPER_QUESTIONS.get(score.benchmark, score.expected)
    is_subset = bool(score.subset) and score.benchmark in PAPER_QUESTIONS
    if score.n == expected and not (score.partial or is_subset):
        return ""
    why = ", ".join(filter(None, [score.subset, f"{score.missing:,} not answered yet" if score.missing else ""]))
    known = f" ({why})" if why else ""
    if score.n > expected:
        return f"{score.n:,} of {expected:,} published{known}: another version"
    return f"{score.n:,} of {expected:,}{known}"


def parts_of_average(scores: Sequence[Score], of_all: int) -> tuple[str, ...]:
    """In what a mean over several of `of_all` benchmarks is not over the whole of them: some lack, some are partial."""
    partial = sum(bool(part_of(score)) for score in scores)
    return (
        *([f"over {len(scores)} of {of_all} benchmarks"] if len(scores) < of_all else []),
        *([f"partial: {partial} of {len(scores)} benchmarks"] if partial else []),
    )


def marks_of_average(scores: Sequence[Score], of_all: int | None = None) -> tuple[str, ...]:
    """The marks of a mean over several of `of_all` benchmarks; None: these are all."""
    parts = parts_of_average(scores, len(scores) if of_all is None else of_all)
    return (*parts, *dict.fromkeys(mark for score in scores for mark in _profile(score)))


def _profile(score: Score) -> tuple[str, ...]:
    """The names that the options of `vlmx eval` and `vlmx score` have for it, where they make a difference."""
    worded = score.kind == "box" or score.wording != "default"
    return (
        *([f"prompts {score.wording}"] if worded else []),
        *([f"boxes {score.boxes}"] if score.boxes else []),
    )
