"""What does a report say? Plain data gathered from run folders, with the annotations and caches that they name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vlmx.cache_specs.catalog import stem
from vlmx.cache_specs.places import Place
from vlmx.console import note
from vlmx.errors import RunError, UnknownNameError
from vlmx.evaluate.aggregate import Averages, averages_by_questions
from vlmx.evaluate.answers import answered_benchmarks
from vlmx.evaluate.compare import Difference
from vlmx.evaluate.intervals import interval95
from vlmx.evaluate.probe import ProbeResult, read_probe
from vlmx.evaluate.report.rankings import Contestant, Ranking, pairs, rankings
from vlmx.evaluate.score import Grade, Score, grades_of_run, score_grades
from vlmx.runs import RunFolder


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """A mean over the questions of several benchmarks, in percent."""

    score: float
    interval95: tuple[float, float]
    n: int


@dataclass(frozen=True, kw_only=True)
class RunData:
    """One run, read from disk.

    Attributes:
        name: the run folder's name.
        encoder, connector, llm, data: what was combined.
        cache, fingerprint: where the tokens came from.
        spec: the cache's spec as plain data; empty if the cache is not at hand.
        scores, control_scores: by benchmark; `control_scores` are those with shuffled images.
        grades: graded answers by benchmark, without the control.
        averages: weighted over the benchmarks of the run; None if it lacks text or box benchmarks.
        pooled: mean over all questions of a group ("VQA", "boxes", "overall"), which is the same weighting, with its
            interval.
        losses: (step, loss) as logged.
        config, environment, status, card: the run's files as plain data.
    """

    name: str
    encoder: str
    connector: str
    llm: str
    data: str
    cache: str
    fingerprint: str
    spec: Mapping[str, Any]
    scores: Mapping[str, Score]
    control_scores: Mapping[str, Score]
    grades: Mapping[str, Sequence[Grade]]
    averages: Averages | None
    pooled: Mapping[str, Pooled]
    losses: Sequence[tuple[int, float]]
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    status: Mapping[str, Any]
    card: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that the page shows.

    Attributes:
        runs: in the order in which they were named.
        benchmarks: of all runs, text ones first.
        text_benchmarks, box_benchmarks: the two groups.
        rankings: of encoders, connectors and runs, each on "VQA" and "boxes".
        pairs: for every two runs their differences by group.
        probes: by cache name, of the caches that were probed.
        partial: whether any score covers only a part of its benchmark.
    """

    runs: Sequence[RunData]
    benchmarks: Sequence[str]
    text_benchmarks: Sequence[str]
    box_benchmarks: Sequence[str]
    rankings: Sequence[Ranking]
    pairs: Sequence[Mapping[str, Difference]]
    probes: Mapping[str, ProbeResult]
    partial: bool


def collect(runs: Sequence[RunFolder], *, caches: str | Path | Place) -> Report:
    """Read runs and compare them.

    Args:
        runs: evaluated runs; scores are computed from their answers, so that no stale scores.json is shown.
        caches: folder or url of all caches, for specs and probe results; what is not there is left out and noted.

    Raises:
        RunError: a run has no answers, or two runs have the same name.
    """
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise RunError("two of the runs have the same name", why=", ".join(names), fix="rename one of the folders")
    data = [_read_run(run, caches) for run in runs]
    if len({run.cache for run in data}) > len({run.encoder for run in data}):  # one backbone at several sizes
        data = [replace(run, encoder=stem(run.cache)) for run in data]
    kinds = {name: score.kind for run in data for name, score in run.scores.items()}
    text = [name for name, kind in kinds.items() if kind == "text"]
    boxes = [name for name, kind in kinds.items() if kind == "box"]
    groups = {"VQA": text, "boxes": boxes}
    contestants = [
        Contestant(
            run=run.name,
            encoder=run.encoder,
            connector=run.connector,
            grades={
                group: [grade for name in members for grade in run.grades.get(name, ())]
                for group, members in groups.items()
            },
        )
        for run in data
    ]
    probes = {run.cache: read_probe(caches, run.cache) for run in data}
    for cache in (cache for cache, result in probes.items() if result is None):
        note(f"no linear probe of {cache} is at hand: vlmx probe --cache {cache} --caches {caches}")
    return Report(
        runs=data,
        benchmarks=[*text, *boxes],
        text_benchmarks=text,
        box_benchmarks=boxes,
        rankings=rankings(contestants, list(groups)),
        pairs=pairs(contestants, list(groups)),
        probes={cache: result for cache, result in probes.items() if result is not None},
        partial=any(score.partial for run in data for score in (*run.scores.values(), *run.control_scores.values())),
    )


def _read_run(run: RunFolder, caches: str | Path | Place) -> RunData:
    names = answered_benchmarks(run, "none")
    if not names:
        raise RunError(f"run '{run.name}' has no answers", fix=f"give `vlmx eval --run {run.path}` first")
    scores, grades = {}, {}
    for name in names:
        header, grades[name] = grades_of_run(run, name, "none")
        scores[name] = score_grades(header, grades[name])
    control_scores = {
        name: score_grades(*grades_of_run(run, name, "shuffled")) for name in answered_benchmarks(run, "shuffled")
    }
    card = _json(run.path / "model" / "model.json")
    first = next(iter(scores.values()))
    return RunData(
        name=run.name,
        encoder=first.encoder,
        connector=str(card.get("connector", "")),
        llm=str(card.get("llm", "")),
        data=str(run.config.get("data", "")),
        cache=first.cache,
        fingerprint=first.fingerprint,
        spec=_spec(first.cache, caches),
        scores=scores,
        control_scores=control_scores,
        grades=grades,
        averages=_averages(scores),
        pooled=_pooled(scores, grades),
        losses=[(int(line["step"]), float(line["loss"])) for line in run.metrics() if {"step", "loss"} <= set(line)],
        config=run.config,
        environment=_json(run.path / "environment.json"),
        status=run.status,
        card=card,
    )


def _averages(scores: Mapping[str, Score]) -> Averages | None:
    counts = {kind: {n: s.n for n, s in scores.items() if s.kind == kind} for kind in ("text", "box")}
    if not (counts["text"] and counts["box"]):
        return None
    percent = {name: score.score for name, score in scores.items()}
    return averages_by_questions(percent, vqa_questions=counts["text"], loc_questions=counts["box"])


def _pooled(scores: Mapping[str, Score], grades: Mapping[str, Sequence[Grade]]) -> dict[str, Pooled]:
    members = {
        "VQA": [g for name, score in scores.items() if score.kind == "text" for g in grades[name]],
        "boxes": [g for name, score in scores.items() if score.kind == "box" for g in grades[name]],
    }
    members["overall"] = [*members["VQA"], *members["boxes"]]
    result = {}
    for group, graded in members.items():
        values = [100 * g.value for g in graded]
        if values:
            interval = interval95(values, [g.question.image for g in graded])
            result[group] = Pooled(score=sum(values) / len(values), interval95=interval, n=len(values))
    return result


def _spec(cache: str, caches: str | Path | Place) -> dict[str, Any]:
    from vlmx.cache_specs.reader import open_cache

    try:
        return open_cache(cache, caches, allow_partial=True).spec.to_dict()
    except UnknownNameError:
        note(f"the cache {cache} is not at hand, so the report lacks its spec: give its folder with --caches")
        return {}


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}


def score_rows(report: Report) -> list[dict[str, Any]]:
    """One flat row per run, benchmark and control, for a CSV file: the score with everything that belongs to it."""
    rows = []
    for run in report.runs:
        for score in (*run.scores.values(), *run.control_scores.values()):
            low, high = score.interval95
            rows.append(
                {
                    "run": run.name,
                    "encoder": run.encoder,
                    "connector": run.connector,
                    "benchmark": score.benchmark,
                    "control": score.control,
                    "score": round(score.score, 4),
                    "low95": round(low, 4),
                    "high95": round(high, 4),
                    **{key: asdict(score)[key] for key in ("n", "expected", "partial", "invalid")},
                    **{name: _rounded(score.baselines.get(name)) for name in ("prior", "random_object", "mean_box")},
                    "metric": score.metric,
                    "cache": score.cache,
                    "fingerprint": score.fingerprint,
                }
            )
    return rows


def _rounded(value: float | None) -> float | str:
    return "" if value is None else round(value, 4)
