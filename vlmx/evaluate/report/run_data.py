"""What does a report know of one run? Its answers, graded and scored, and all that they were made with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlmx.cache_specs.places import Place
from vlmx.console import note
from vlmx.errors import RunError, UnknownNameError
from vlmx.evaluate.aggregate import Averages, averages_by_questions
from vlmx.evaluate.answers import answered_benchmarks
from vlmx.evaluate.beside import PAPER_QUESTIONS, BesidePaper, beside_paper, weights_of
from vlmx.evaluate.compare import mean
from vlmx.evaluate.paper_rows import PaperRow, RowMatch, row_of_run
from vlmx.evaluate.score import BoxRule, Grade, Score, grades_of_run, score_grades
from vlmx.runs import RunFolder


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """A mean over several benchmarks, in percent, weighted as `vlmx.evaluate.beside.weights_of` says."""

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
        headers: by benchmark what the answers were made with, as their file says it.
        row: the published row that the run is compared with, and what is different from it.
        own_row: the published row that it corresponds to, whatever it is compared with; None if there is none.
        beside: its numbers beside that row's; None without a row, or without a benchmark of the paper.
        averages: weighted over the benchmarks of the run; None if it lacks text or box benchmarks.
        pooled: mean over a group ("VQA", "boxes", "overall") with the same weights, and its interval.
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
    headers: Mapping[str, Mapping[str, Any]]
    row: RowMatch
    own_row: PaperRow | None
    beside: BesidePaper | None
    averages: Averages | None
    pooled: Mapping[str, Pooled]
    losses: Sequence[tuple[int, float]]
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    status: Mapping[str, Any]
    card: Mapping[str, Any]

    @property
    def resolution(self) -> str:
        """Height x width of the encoder's input, e.g. "512x512"."""
        geometry = next(iter(self.headers.values()))["geometry"]
        return f"{geometry['height']}x{geometry['width']}"

    @property
    def of_paper(self) -> bool:
        """Whether it has answered any of the paper's benchmarks."""
        return any(name in PAPER_QUESTIONS for name in self.scores)


def read_run(
    run: RunFolder,
    *,
    caches: str | Path | Place,
    row: str | None = None,
    box_rule: BoxRule = "exact",
    data_root: str | Path | None = None,
) -> RunData:
    """Read a run and score its answers.

    Args:
        run: an evaluated run.
        caches: folder or url of all caches.
        row: the published row to compare with; None: the one that the run corresponds to.
        box_rule, data_root: see `vlmx.evaluate.score.grades_of_run`.

    Raises:
        RunError: it has no answers, or they do not belong to the benchmark's questions.
        DataError: the files of a benchmark are missing or damaged.
        UnknownNameError: `row` is no row.
    """
    names = answered_benchmarks(run, "none")
    if not names:
        raise RunError(f"run '{run.name}' has no answers", fix=f"give `vlmx eval --run {run.path}` first")
    scores, grades, headers = {}, {}, {}
    for name in names:
        header, grades[name] = grades_of_run(run, name, "none", box_rule=box_rule, data_root=data_root)
        scores[name] = score_grades(header, grades[name], box_rule=box_rule)
        headers[name] = asdict(header)
    control_scores = {}
    for name in answered_benchmarks(run, "shuffled"):
        header, of_control = grades_of_run(run, name, "shuffled", box_rule=box_rule, data_root=data_root)
        control_scores[name] = score_grades(header, of_control, box_rule=box_rule)
    card = _json(run.path / "model" / "model.json")
    first = next(iter(scores.values()))
    own = row_of_run(run, cache=first.cache, encoder_weights=first.encoder_weights)
    match = own if row is None else row_of_run(run, cache=first.cache, encoder_weights=first.encoder_weights, row=row)
    of_paper = any(name in PAPER_QUESTIONS for name in scores)
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
        headers=headers,
        row=match,
        own_row=own.row,
        beside=beside_paper(scores, grades, match.row) if match.row is not None and of_paper else None,
        averages=_averages(scores),
        pooled=_pooled(scores, grades),
        losses=[(int(line["step"]), float(line["loss"])) for line in run.metrics() if {"step", "loss"} <= set(line)],
        config=run.config,
        environment=_json(run.path / "environment.json"),
        status=run.status,
        card=card,
    )


def _averages(scores: Mapping[str, Score]) -> Averages | None:
    counts = {kind: weights_of(s for s in scores.values() if s.kind == kind) for kind in ("text", "box")}
    if not (counts["text"] and counts["box"]):
        return None
    percent = {name: score.score for name, score in scores.items()}
    return averages_by_questions(percent, vqa_questions=counts["text"], loc_questions=counts["box"])


def _pooled(scores: Mapping[str, Score], grades: Mapping[str, Sequence[Grade]]) -> dict[str, Pooled]:
    members = {
        "VQA": [g for name, score in scores.items() if score.kind == "text" for g in grades[name]],
        "boxes": [g for name, score in scores.items() if score.kind == "box" for g in grades[name]],
    }
    if all(members.values()):
        members["overall"] = [*members["VQA"], *members["boxes"]]
    result = {}
    for group, graded in members.items():
        if graded:
            found = mean(graded, counts=weights_of(scores.values()))
            result[group] = Pooled(score=found.value, interval95=found.interval95, n=len(graded))
    return result


def _spec(cache: str, caches: str | Path | Place) -> dict[str, Any]:
    from vlmx.cache_specs.reader import open_cache

    try:
        return open_cache(cache, caches, allow_partial=True).spec.to_dict()
    except UnknownNameError:
        note(f"the cache {cache} is not at hand, so the report lacks its spec and maps: give its folder with --caches")
        return {}


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}
