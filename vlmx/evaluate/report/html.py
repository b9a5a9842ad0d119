"""How does a report become one file? Data, drawings and pictures go into a template; nothing is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from vlmx import __version__
from vlmx.evaluate.baselines import BASELINE_TEXT
from vlmx.evaluate.report.collect import Report, RunData
from vlmx.evaluate.report.plots import color_of, loss_plot, result_plot
from vlmx.evaluate.report.rankings import SUBJECT_TEXT
from vlmx.evaluate.report.samples import choose_samples
from vlmx.evaluate.score import Score

# What a study should show before its scores are read as seeing: times the best baseline of the kind.
TEXT_GOAL = 1.3
BOX_GOAL = 1.5


def render(report: Report) -> str:
    """The page as HTML text, self-contained."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("vlmx.evaluate.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["one"] = lambda value: f"{value:.1f}"
    environment.filters["short"] = lambda name: name.removeprefix("mini-")
    template = environment.get_template("report.html.jinja")
    return template.render(
        report=report,
        version=__version__,
        colors={run.name: color_of(index) for index, run in enumerate(report.runs)},
        results_svg=result_plot(report),
        losses_svg=loss_plot(report.runs) if any(run.losses for run in report.runs) else "",
        samples=choose_samples(report),
        rows=[_row(report, name) for name in report.benchmarks],
        baseline_text=BASELINE_TEXT,
        subject_text=SUBJECT_TEXT,
        goals={"text": TEXT_GOAL, "box": BOX_GOAL},
        configs={run.name: config_text(run) for run in report.runs},
        has_control=any(run.control_scores for run in report.runs),
        metrics=sorted({score.metric for run in report.runs for score in run.scores.values()}),
    )


def _row(report: Report, benchmark: str) -> dict[str, Any]:
    """One benchmark of the result table."""
    scores = {run.name: run.scores[benchmark] for run in report.runs if benchmark in run.scores}
    any_score = next(iter(scores.values()))
    return {
        "benchmark": benchmark,
        "kind": any_score.kind,
        "expected": any_score.expected,
        "baselines": any_score.baselines,
        "scores": scores,
        "controls": {run.name: run.control_scores.get(benchmark) for run in report.runs},
        "times": {name: times_baseline(score) for name, score in scores.items()},
    }


def times_baseline(score: Score) -> float | None:
    """Score over the baseline that counts: the answer prior for text, a random true object for boxes; None without."""
    baseline = score.baselines.get("prior" if score.kind == "text" else "random_object")
    return score.score / baseline if baseline else None


def config_text(run: RunData) -> dict[str, str]:
    """Everything that a run's numbers depend on, as titled YAML."""
    parts: Mapping[str, Any] = {
        "configuration": run.config,
        "model": run.card,
        "cache spec (its fingerprint is " + run.fingerprint[:12] + ")": run.spec,
        "environment": run.environment,
        "status": run.status,
    }
    return {
        title: yaml.safe_dump(dict(data), sort_keys=False, width=100).strip() for title, data in parts.items() if data
    }
