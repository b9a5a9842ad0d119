"""In which order did encoders, connectors and runs come out, and which steps of that order are more than chance?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

from vlmx.errors import UsageError
from vlmx.evaluate.compare import Difference, Key, compare, key_of, order
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
        steps: one fewer than there are names.
    """

    subject: Subject
    group: str
    steps: Sequence[Difference]


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
                try:
                    steps = order({name: mean_grades(rows) for name, rows in members.items()}, counts=weights)
                except UsageError:  # no question that all of them answered, so there is no order
                    continue
                result.append(Ranking(subject=subject, group=group, steps=steps))
    return result


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
    values: dict[Key, list[float]] = defaultdict(list)
    for row in rows:
        for grade in row:
            values[key_of(grade.question)].append(grade.value)
    return [
        replace(grade, value=sum(values[key_of(grade.question)]) / len(rows))
        for grade in rows[0]
        if len(values[key_of(grade.question)]) == len(rows)
    ]


def pairs(
    contestants: Sequence[Contestant], groups: Sequence[str], *, weights: Mapping[str, float]
) -> list[dict[str, Difference]]:
    """For every two runs their differences by group; a group in which they share no question is left out."""
    if len(contestants) < 2:
        return []
    asked = {
        (c.run, group): {key_of(g.question) for g in c.grades.get(group, ())} for c in contestants for group in groups
    }
    result = []
    for first, second in combinations(contestants, 2):
        shared = [group for group in groups if asked[first.run, group] & asked[second.run, group]]
        found = {g: compare(first.run, first.grades[g], second.run, second.grades[g], counts=weights) for g in shared}
        if found:
            result.append(found)
    return result
