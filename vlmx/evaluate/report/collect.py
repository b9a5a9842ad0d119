"""What does a report say? Plain data of its runs, ranked and compared, and of the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlmx.cache_specs.catalog import stem
from vlmx.cache_specs.places import Place
from vlmx.console import note
from vlmx.data.published import DATA_ROOT
from vlmx.errors import RunError
from vlmx.evaluate.beside import PAPER_QUESTIONS, part_of, parts_of_average, weights_of
from vlmx.evaluate.compare import Difference
from vlmx.evaluate.paper_rows import PaperRow, named_rows, paper_rows
from vlmx.evaluate.probe import ProbeResult, read_probe
from vlmx.evaluate.report.rankings import Contestant, Ranking, pairs, rankings
from vlmx.evaluate.report.run_data import RunData, read_run
from vlmx.evaluate.score import BoxRule
from vlmx.runs import RunFolder

MOST_PAIRED = 6  # with more runs a table of all pairs is no longer read, and takes long


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that the page shows.

    Attributes:
        runs: in the order in which they were named.
        benchmarks: of all runs, text ones first; the paper's in its order.
        text_benchmarks, box_benchmarks: the two groups.
        rankings: of encoders, connectors and runs, each on "VQA" and "boxes".
        pairs: for every two runs their differences by group; empty with more than MOST_PAIRED runs.
        probes: by cache name, of the caches that were probed.
        published: the paper's rows, where they were asked for.
        box_rule: how boxes were compared.
        caches: folder or url of all caches.
        data_roots: by benchmark the folder below which its photos may lie.
        partial: whether any score is over other questions than all of its benchmark (`vlmx.evaluate.beside.part_of`).
    """

    runs: Sequence[RunData]
    benchmarks: Sequence[str]
    text_benchmarks: Sequence[str]
    box_benchmarks: Sequence[str]
    rankings: Sequence[Ranking]
    pairs: Sequence[Mapping[str, Difference]]
    probes: Mapping[str, ProbeResult]
    published: Sequence[PaperRow]
    box_rule: BoxRule
    caches: str | Path | Place
    data_roots: Mapping[str, Path]
    partial: bool

    def parts_of(self, run: RunData, group: str) -> tuple[str, ...]:
        """In what a run's average over a group ("VQA", "boxes", "overall") is not over the whole of this report."""
        members = {"VQA": self.text_benchmarks, "boxes": self.box_benchmarks, "overall": self.benchmarks}[group]
        return parts_of_average([run.scores[name] for name in members if name in run.scores], len(members))

    def baselines_of(self, benchmark: str) -> Mapping[str, float]:
        """The baselines over the questions of the run that answered most of a benchmark."""
        scores = [run.scores[benchmark] for run in self.runs if benchmark in run.scores]
        return max(scores, key=lambda score: score.n).baselines


def collect(
    runs: Sequence[RunFolder],
    *,
    caches: str | Path | Place,
    published: bool = False,
    rows: Sequence[str] = (),
    box_rule: BoxRule = "exact",
    data_root: str | Path | None = None,
) -> Report:
    """Read runs and compare them.

    Args:
        runs: evaluated runs; scores are computed from their answers, so that no stale scores.json is shown.
        caches: folder or url of all caches, for specs, probe results and maps; what is not there is left out and noted.
        published: whether the paper's rows are shown, too.
        rows: published rows to compare with, one for all runs or one for each; empty: those that fit the runs.
        box_rule: how boxes are compared, see `vlmx.evaluate.score.grade`.
        data_root: where published benchmarks lie, and their photos if they are at hand; None: where they were when the
            questions were answered.

    Raises:
        RunError: a run has no answers, two runs have the same name, there is nothing to report, or answers do not
            belong to the benchmark's questions.
        DataError: the files of a benchmark are missing or damaged.
        UsageError: it is not clear which row is meant for which run.
        UnknownNameError: one of `rows` is no row.
    """
    if not runs and not published:
        raise RunError("there is nothing to report", fix="name runs, or give --published")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise RunError("two of the runs have the same name", why=", ".join(names), fix="rename one of the folders")
    data = [
        read_run(run, caches=caches, row=row, box_rule=box_rule, data_root=data_root)
        for run, row in zip(runs, named_rows(rows, len(runs)), strict=True)
    ]
    if len({run.cache for run in data}) > len({run.encoder for run in data}):  # one backbone at several sizes
        data = [replace(run, encoder=stem(run.cache)) for run in data]
    kinds = _kinds(data)
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
    weights = weights_of(score for run in data for score in run.scores.values())
    probes = {run.cache: read_probe(caches, run.cache) for run in data}
    mini = {run.cache for run in data if any(name not in PAPER_QUESTIONS for name in run.scores)}
    for cache in (cache for cache, result in probes.items() if result is None and cache in mini):
        note(f"no linear probe of {cache} is at hand: vlmx probe --cache {cache} --caches {caches}")
    return Report(
        runs=data,
        benchmarks=[*text, *boxes],
        text_benchmarks=text,
        box_benchmarks=boxes,
        rankings=rankings(contestants, list(groups), weights=weights),
        pairs=pairs(contestants, list(groups), weights=weights) if len(data) <= MOST_PAIRED else [],
        probes={cache: result for cache, result in probes.items() if result is not None},
        published=paper_rows() if published else (),
        box_rule=box_rule,
        caches=caches,
        data_roots={
            name: Path(data_root or header["data_root"] or DATA_ROOT)
            for run in data
            for name, header in run.headers.items()
        },
        partial=any(part_of(score) for run in data for score in (*run.scores.values(), *run.control_scores.values())),
    )


def _kinds(runs: Sequence[RunData]) -> dict[str, str]:
    """Benchmark -> kind, the paper's benchmarks first and in its order."""
    found = {name: score.kind for run in runs for name, score in run.scores.items()}
    return {name: found[name] for name in [*PAPER_QUESTIONS, *found] if name in found}


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
                    **{key: getattr(score, key) for key in ("n", "expected", "missing", "invalid")},
                    "partial": bool(part_of(score)),
                    "part": part_of(score),
                    **{name: _rounded(score.baselines.get(name)) for name in ("prior", "random_object", "mean_box")},
                    "metric": score.metric,
                    **{key: getattr(score, key) for key in ("wording", "boxes", "subset", "dtype", "exact")},
                    "cache": score.cache,
                    "fingerprint": score.fingerprint,
                    "encoder_weights": score.encoder_weights,
                    "model": score.model,
                }
            )
    return rows


def _rounded(value: float | None) -> float | str:
    return "" if value is None else round(value, 4)
