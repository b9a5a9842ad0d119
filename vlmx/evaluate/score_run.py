"""How are all answers of a run scored, though some may be damaged? What can be scored is, and the rest is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from vlmx.console import note
from vlmx.errors import RunError, VlmxError
from vlmx.evaluate.answers import Control, answered_benchmarks, answers_path, has_unfinished
from vlmx.evaluate.score import BoxRule, Score, grades_of_run, score_grades
from vlmx.runs import RunFolder, write_json


def score_run(
    run: RunFolder,
    *,
    box_rule: BoxRule = "exact",
    data_root: str | Path | None = None,
    benchmarks: Sequence[str] | None = None,
    controls: Sequence[Control] = ("none", "shuffled"),
) -> list[Score]:
    """Score answers of a run and write a scores.json beside each answers.jsonl; see `score_benchmarks`.

    Raises:
        VlmxError: the run has no answers at all, or those to a benchmark cannot be scored; the others are then.
    """
    scores, problems = score_benchmarks(
        run, box_rule=box_rule, data_root=data_root, benchmarks=benchmarks, controls=controls
    )
    if problems:
        raise problems[0]
    return scores


def score_benchmarks(
    run: RunFolder,
    *,
    box_rule: BoxRule = "exact",
    data_root: str | Path | None = None,
    benchmarks: Sequence[str] | None = None,
    controls: Sequence[Control] = ("none", "shuffled"),
) -> tuple[list[Score], list[VlmxError]]:
    """Score what can be scored of a run, and write a scores.json beside each answers.jsonl.

    Args:
        box_rule, data_root: see `grades_of_run`.
        benchmarks, controls: which; None: all that have answers.

    Returns:
        The scores, and what is wrong with the other benchmarks.

    Raises:
        RunError: the run has no answers at all.
    """
    scores: list[Score] = []
    problems: list[VlmxError] = []
    for control in controls:
        for benchmark in answered_benchmarks(run, control):
            if benchmarks is not None and benchmark not in benchmarks:
                continue
            path = answers_path(run, benchmark, control)
            try:
                header, grades = grades_of_run(run, benchmark, control, box_rule=box_rule, data_root=data_root)
                score = score_grades(header, grades, box_rule=box_rule)
            except VlmxError as error:
                problems.append(error)
                continue
            if path.exists() and has_unfinished(path):
                note(f"{path} is scored; there are others, not finished, beside it")
            write_json(path.with_name("scores.json"), asdict(score))
            scores.append(score)
    if not scores and not problems:
        raise RunError(f"run '{run.name}' has no answers to score", fix=f"give `vlmx eval --run {run.path}` first")
    return scores, problems
