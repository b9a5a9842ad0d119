"""In which order did encoders, connectors and runs come out, and which steps of that order are more than chance?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

from vlmx.errors import UsageError
from vlmx.evaluate.compare import Difference, common, compare, order, unlike_text
from vlmx.evaluate.score import Grade

Subject = Literal["encoder", "connector", "run"]
SUBJECT_TEXT: Mapping[Subject, str] = {
    "encoder": "encoders, mean over connectors",
    "connector": "connectors, mean over encoders",
    "run": "runs",
}


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A run and its graded answers.

    Attributes:
        run, encoder, connector: names.
        grades: by group of benchmarks ("VQA", "boxes").
    """

    run: str
    encoder: str
    connector: str
    grades: Mapping[str, Sequence[Grade]]


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """From best to worst, as differences between neighbours.

    Attributes:
        subject: what is ranked.
        group: on which benchmarks.
        steps: one fewer than there are names; none where all of them have answered no question in common.
        basis: over what, e.g. "all 5 runs answered 80 questions of vqav2, pope", or why there is no order.
    """

    subject: Subject
    group: str
    steps: Sequence[Difference]
    basis: str


def rankings(
    contestants: Sequence[Contestant], groups: Sequence[str], *, weights: Mapping[str, float]
) -> list[Ranking]:
    """Rankings of whatever there are two or more of; `weights` as of `vlmx.evaluate.beside.weights_of`.

    Encoders and connectors are averaged over each other only if every combination was run exactly once; otherwise an
    average would mix what differs with what was left out.
    """
    subjects: list[Subject] = ["run"]
    if is_balanced(contestants):
        subjects = ["encoder", "connector", "run"]
    result = []
    for subject in subjects:
        for group in groups:
            members: dict[str, list[Sequence[Grade]]] = defaultdict(list)
            for contestant in contestants:
                if contestant.grades.get(group):
                    members[getattr(contestant, subject)].append(contestant.grades[group])
            if len(members) > 1:
                result.append(_ranking(subject, group, members, weights))
    return result


def _ranking(
    subject: Subject, group: str, members: Mapping[str, Sequence[Sequence[Grade]]], weights: Mapping[str, float]
) -> Ranking:
    rows = [row for of_one in members.values() for row in of_one]
    who = "both runs" if len(rows) == 2 else f"all {len(rows)} runs"
    _, unlike = common(rows)
    try:
        steps = order({name: mean_grades(of_one) for name, of_one in members.items()}, counts=weights)
    except UsageError:
        why = f": {unlike_text(unlike)}" if unlike else ""
        return Ranking(subject=subject, group=group, steps=(), basis=f"{who} answered no question in common{why}")
    steps = [replace(step, unlike=unlike) for step in steps]
    return Ranking(subject=subject, group=group, steps=steps, basis=f"{who} answered {steps[0].basis}")


def is_balanced(contestants: Sequence[Contestant]) -> bool:
    """Whether two or more encoders were each run once with each of two or more connectors."""
    found = sorted((c.encoder, c.connector) for c in contestants)
    encoders, connectors = sorted({c.encoder for c in contestants}), sorted({c.connector for c in contestants})
    all_combinations = [(encoder, connector) for encoder in encoders for connector in connectors]
    return found == all_combinations and len(encoders) > 1 and len(connectors) > 1


def mean_grades(rows: Sequence[Sequence[Grade]]) -> list[Grade]:
    """For each question that all rows answered one grade whose value is the mean of theirs."""
    if len(rows) == 1:
        return list(rows[0])
    shared, _ = common(rows)
    return [
        replace(grades[0], value=sum(grade.value for grade in grades) / len(grades))
        for grades in zip(*shared, strict=True)
    ]


def pairs(
    contestants: Sequence[Contestant], groups: Sequence[str], *, weights: Mapping[str, float]
) -> list[dict[str, Difference]]:
    """For every two runs their differences by group; a group in which they share no question is left out."""
    result = []
    for first, second in combinations(contestants, 2):
        found: dict[str, Difference] = {}
        for group in groups:
            rows = [one.grades.get(group, ()) for one in (first, second)]
            with suppress(UsageError):  # they have no question in common
                found[group] = compare(first.run, rows[0], second.run, rows[1], counts=weights)
        if found:
            result.append(found)
    return result
