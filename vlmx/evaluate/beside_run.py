"""How far is a run from another run? Paired differences, benchmark by benchmark and in the averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from vlmx.errors import RunError, UsageError
from vlmx.evaluate.answers import answered_benchmarks
from vlmx.evaluate.beside import PAPER_QUESTIONS, Average, marks_of, marks_of_average, weights_of
from vlmx.evaluate.collapse import Collapse, collapse
from vlmx.evaluate.compare import SAME_FILES, Difference, common, compare, unlike_text
from vlmx.evaluate.paper_rows import facts_of_run
from vlmx.evaluate.score import BoxRule, Grade, Score, grades_of_run, score_grades
from vlmx.runs import RunFolder


@dataclass(frozen=True, kw_only=True)
class Graded:
    """A run's answers with what they are worth.

    Attributes:
        name: of the run.
        connector: its name; "" if it is not known.
        resolution: height x width of the encoder's input, e.g. "512x512".
        scores, grades: by benchmark, without the control.
    """

    name: str
    connector: str
    resolution: str
    scores: Mapping[str, Score]
    grades: Mapping[str, Sequence[Grade]]


@dataclass(frozen=True, kw_only=True)
class PairLine:
    """One number of two runs, over the questions that both answered.

    Attributes:
        name: a benchmark, or an `Average`.
        difference: first minus second, with its paired interval.
        marks: as of `PaperLine`, with the run's name where they are one run's alone.
    """

    name: str
    difference: Difference
    marks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class BesideRun:
    """Two runs beside each other.

    Attributes:
        first, second: their names.
        lines: benchmarks that both answered; the paper's in its order, others before them.
        averages: over those; weighted by number of questions, and macro.
        left_out: benchmarks that only one of them answered.
        nothing_common: benchmarks that both answered, without a question in common: for each, how many questions have
            the same id and are not the same.
        collapse: the alarm, for the one whose boxes are worse.
        alarm: it in words; "" without an alarm.
    """

    first: str
    second: str
    lines: tuple[PairLine, ...]
    averages: tuple[PairLine, ...]
    left_out: tuple[str, ...]
    nothing_common: Mapping[str, int]
    collapse: Collapse | None
    alarm: str


def read_graded(run: RunFolder, *, box_rule: BoxRule = "exact", data_root: str | Path | None = None) -> Graded:
    """Grade a run's answers anew, so that no stale scores.json is shown.

    Args:
        run: finished or not.
        box_rule: how boxes are compared.
        data_root: where published benchmarks' files are; None: where they were when the run was answered.

    Raises:
        RunError: the run has no answers, or some are damaged.
        DataError: a benchmark's files are missing or damaged.
    """
    names = answered_benchmarks(run, "none")
    if not names:
        raise RunError(f"run '{run.name}' has no answers", fix=f"give `vlmx eval --run {run.path}` first")
    scores, grades = {}, {}
    for name in names:
        header, grades[name] = grades_of_run(run, name, "none", box_rule=box_rule, data_root=data_root)
        scores[name] = score_grades(header, grades[name], box_rule=box_rule)
    return Graded(
        name=run.name,
        connector=facts_of_run(run)["connector"],
        resolution=f"{header.geometry['height']}x{header.geometry['width']}",
        scores=scores,
        grades=grades,
    )


def beside_run(first: Graded, second: Graded) -> BesideRun:
    """Paired differences between two runs; without a benchmark that both answered there are none.

    Raises:
        UsageError: they answered benchmarks both, but no question of any in common.
    """
    places = {name: place for place, name in enumerate(PAPER_QUESTIONS)}
    both = sorted((name for name in first.scores if name in second.scores), key=lambda name: places.get(name, -1))
    nothing_common: dict[str, int] = {}
    for name in both:
        (found_first, _), unlike = common([first.grades[name], second.grades[name]])
        if not found_first:
            nothing_common[name] = unlike
    shared = [name for name in both if name not in nothing_common]
    if both and not shared:
        unlike = sum(nothing_common.values())
        raise UsageError(
            f"'{first.name}' and '{second.name}' have answered no question in common",
            why=unlike_text(unlike),
            fix=SAME_FILES if unlike else "",
        )
    counts = weights_of(first.scores[name] for name in shared)
    same = dict.fromkeys(shared, 1)
    members: Mapping[Average, tuple[list[str], Mapping[str, float]]] = {
        "weighted_vqa": ([name for name in shared if first.scores[name].kind == "text"], counts),
        "weighted_loc": ([name for name in shared if first.scores[name].kind == "box"], counts),
        "weighted_overall": (shared, counts),
        "macro": (shared, same),
    }
    averages = {
        name: _line(name, members[name][0], members[name][1], first, second)
        for name in get_args(Average)
        if members[name][0]
    }
    found, alarm = _alarm(averages, first, second)
    return BesideRun(
        first=first.name,
        second=second.name,
        lines=tuple(_line(name, [name], same, first, second) for name in shared),
        averages=tuple(averages.values()),
        left_out=tuple(name for name in {**first.scores, **second.scores} if name not in both),
        nothing_common=nothing_common,
        collapse=found,
        alarm=alarm,
    )


def _line(name: str, members: Sequence[str], counts: Mapping[str, float], first: Graded, second: Graded) -> PairLine:
    ours, theirs = ([g for member in members for g in run.grades[member]] for run in (first, second))
    of_first, of_second = (_marks([run.scores[member] for member in members]) for run in (first, second))
    both = [mark for mark in of_first if mark in of_second]
    alone = [
        f"{run.name}: {mark}" for run, of in ((first, of_first), (second, of_second)) for mark in of if mark not in both
    ]
    return PairLine(
        name=name,
        difference=compare(first.name, ours, second.name, theirs, counts=counts),
        marks=(*alone, *both),
    )


def _marks(scores: Sequence[Score]) -> tuple[str, ...]:
    return marks_of(scores[0]) if len(scores) == 1 else marks_of_average(scores)


def _alarm(averages: Mapping[Average, PairLine], first: Graded, second: Graded) -> tuple[Collapse | None, str]:
    """The alarm for the run whose boxes are worse, unless that may be chance, and what it says."""
    if not {"weighted_vqa", "weighted_loc"} <= set(averages):
        return None, ""
    text, box = averages["weighted_vqa"].difference, averages["weighted_loc"].difference
    if not box.separable:
        return None, ""
    percents = [(text.first_percent, box.first_percent), (text.second_percent, box.second_percent)]
    (worse, (text_worse, box_worse)), (other, (text_other, box_other)) = sorted(
        zip((first, second), percents, strict=True), key=lambda side: side[1][1]
    )
    found = collapse(text=text_worse, box=box_worse, text_reference=text_other, box_reference=box_other)
    if found is None:
        return None, ""
    return found, found.sentence(worse.name, other.name, connector=worse.connector, resolution=worse.resolution)
