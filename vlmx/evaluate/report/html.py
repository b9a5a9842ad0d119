"""How does a report become one file? Data, drawings and pictures go into a template; nothing is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from vlmx import __version__
from vlmx.evaluate.baselines import BASELINE_TEXT, Baseline
from vlmx.evaluate.beside import AVERAGE_TEXT, part_of
from vlmx.evaluate.maps_plot import COLORS
from vlmx.evaluate.report.collect import Report
from vlmx.evaluate.report.correlation import heat_map
from vlmx.evaluate.report.map_samples import map_samples
from vlmx.evaluate.report.paper_table import made_with, paper_table, printed, remarks_of, title_of
from vlmx.evaluate.report.plots import color_of, loss_plot, result_plot
from vlmx.evaluate.report.published_plots import averages_plot, strip_plot
from vlmx.evaluate.report.rankings import SUBJECT_TEXT
from vlmx.evaluate.report.run_data import RunData
from vlmx.evaluate.report.samples import choose_samples, said
from vlmx.evaluate.score import Score

# What a study should show before its scores are read as seeing: times the best baseline of the kind.
TEXT_GOAL = 1.3
BOX_GOAL = 1.5
_RAMP_STEPS = 9


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
    environment.filters["column"] = title_of
    environment.filters["printed"] = printed
    environment.filters["part"] = part_of
    environment.filters["said"] = said
    colors = {run.name: color_of(index) for index, run in enumerate(report.runs)}
    samples = choose_samples(report)
    table = paper_table(report)
    rows = [_row(report, name) for name in report.benchmarks]
    return environment.get_template("report.html.jinja").render(
        report=report,
        version=__version__,
        colors=colors,
        table=table,
        best={name: table.best(name) for name in table.columns},
        results_svg=result_plot(report) if report.runs else "",
        losses_svg=loss_plot(report.runs) if any(run.losses for run in report.runs) else "",
        strips_svg=strip_plot(table, colors) if report.published else "",
        averages_svg=averages_plot(table, colors) if report.published else "",
        has_published_runs=any(run.of_paper for run in report.runs),
        heat=heat_map(report, table),
        samples=samples,
        maps=map_samples(report, samples),
        ramp=_ramp(),
        rows=rows,
        has_own_base=any(text for row in rows for text in row["own_base"].values()),
        parts=_parts(report),
        baseline_text=BASELINE_TEXT,
        subject_text=SUBJECT_TEXT,
        goals={"text": TEXT_GOAL, "box": BOX_GOAL},
        configs={run.name: config_text(run) for run in report.runs},
        remarks={run.name: remarks_of(run) for run in report.runs},
        has_control=any(run.control_scores for run in report.runs),
        made_with={run.name: made_with(run.scores.values()) for run in report.runs},
        made_with_groups=_made_with_groups(report),
        metrics=sorted({score.metric for run in report.runs for score in run.scores.values()}),
        **_beside(report),
    )


def _beside(report: Report) -> dict[str, Any]:
    """What stands beside the paper: runs with a row, their lines, and alarms."""
    runs = [run for run in report.runs if run.beside is not None]
    lines = {run.name: {x.name: x for x in (*run.beside.lines, *run.beside.averages)} for run in runs if run.beside}
    benchmarks = [name for name in report.benchmarks if any(name in known for known in lines.values())]
    averages = [name for name in AVERAGE_TEXT if any(name in known for known in lines.values())]
    return {
        "beside": runs,
        "beside_lines": lines,
        "beside_names": [*benchmarks, *averages],
        "average_text": AVERAGE_TEXT,
        "alarms": [alarm for run in runs if (alarm := alarm_of(run))],
    }


def _made_with_groups(report: Report) -> dict[str, list[str]]:
    """How questions were worded and boxes compared -> the runs of which this is so."""
    found: dict[str, list[str]] = {}
    for run in report.runs:
        found.setdefault("; or ".join(made_with(run.scores.values())), []).append(run.name)
    return found


def alarm_of(run: RunData) -> str:
    """What to say if localization has collapsed beside the published row; else ""."""
    if run.beside is None or run.beside.collapse is None or run.row.row is None:
        return ""
    return run.beside.collapse.sentence(
        run.name,
        f"the published {run.row.row.label}",
        connector=run.connector,
        resolution=run.resolution,
    )


def _row(report: Report, benchmark: str) -> dict[str, Any]:
    """One benchmark of the result table."""
    scores = {run.name: run.scores[benchmark] for run in report.runs if benchmark in run.scores}
    any_score = next(iter(scores.values()))
    baselines = report.baselines_of(benchmark)
    return {
        "benchmark": benchmark,
        "kind": any_score.kind,
        "expected": any_score.expected,
        "baselines": baselines,
        "scores": scores,
        "controls": {run.name: run.control_scores.get(benchmark) for run in report.runs},
        "times": {name: times_baseline(score) for name, score in scores.items()},
        "own_base": {name: _own_base(score, baselines) for name, score in scores.items()},
    }


def _own_base(score: Score, shown: Mapping[str, float]) -> str:
    """The baseline over the questions of a score, where it is another than the one that is shown for its benchmark."""
    name = _counting_baseline(score)
    own = score.baselines.get(name)
    return "" if own is None or f"{own:.1f}" == f"{shown.get(name, -1):.1f}" else f" {own:.1f}"


def _parts(report: Report) -> dict[str, list[str]]:
    """By benchmark the parts and figures that any run has, where there are several."""
    found: dict[str, list[str]] = {}
    for name in report.benchmarks:
        figures = dict.fromkeys(key for run in report.runs if name in run.scores for key in run.scores[name].details)
        if len(figures) > 1:
            found[name] = list(figures)
    return found


def _ramp() -> str:
    """The colours of the maps from low to high, as CSS takes them."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return ", ".join(to_hex(colormaps[COLORS](step / (_RAMP_STEPS - 1))) for step in range(_RAMP_STEPS))


def times_baseline(score: Score) -> float | None:
    """Score over the baseline that counts: the answer prior for text, a random true object for boxes; None without."""
    baseline = score.baselines.get(_counting_baseline(score))
    return score.score / baseline if baseline else None


def _counting_baseline(score: Score) -> Baseline:
    return "prior" if score.kind == "text" else "random_object"


def config_text(run: RunData) -> dict[str, str]:
    """Everything that a run's numbers depend on, as titled YAML."""
    parts: Mapping[str, Any] = {
        "configuration": run.config,
        "model": run.card,
        "cache spec (its fingerprint is " + run.fingerprint[:12] + ")": run.spec,
        "answers": _headers(run.headers),
        "environment": run.environment,
        "status": run.status,
    }
    return {
        title: yaml.safe_dump(_plain(data), sort_keys=False, width=100).strip() for title, data in parts.items() if data
    }


def _headers(headers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Under "all" what the headers of all benchmarks have in common, then by benchmark the rest."""
    first = next(iter(headers.values()))
    common = {key: value for key, value in first.items() if all(h.get(key) == value for h in headers.values())}
    rest = {name: {k: v for k, v in h.items() if k not in {*common, "benchmark"}} for name, h in headers.items()}
    return {"all": common, **rest}


def _plain(value: Any) -> Any:
    """Mappings and sequences of any kind as those that YAML writes plainly."""
    if isinstance(value, Mapping):
        return {str(key): _plain(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(member) for member in value]
    return value
