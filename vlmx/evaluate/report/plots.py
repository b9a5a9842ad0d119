"""How do results and losses look? SVG drawings in the page's own text colour, for light and dark.

matplotlib draws ink and rules in two place-holder colours, which are then replaced by CSS colours of the page.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlmx.evaluate.beside import part_of
from vlmx.evaluate.plot_text import as_written
from vlmx.evaluate.report.collect import Report
from vlmx.evaluate.report.paper_table import title_of
from vlmx.evaluate.report.run_data import RunData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#3b7dd8", "#e0802f", "#2a9d74", "#b04fa8", "#c0a020", "#6478a0", "#d1495b", "#3aa0b8")
INK, RULE = "#010203", "#040506"
_WIDTH_IN = 5.0  # its letters read on a phone, too, where it is about as wide
_BAR_IN = 0.17
_FAINT = 0.25  # the inside of a mark whose score is over a part of the questions
_SMOOTHED_STEPS = 25


def color_of(index: int) -> str:
    """The colour of the run at `index`; it repeats after eight, and `number_of` tells apart what looks alike."""
    return COLORS[index % len(COLORS)]


def number_of(index: int, runs: int) -> str:
    """What stands on a run's marks where there are more runs than colours: its number, from 1; else ""."""
    return str(index + 1) if runs > len(COLORS) else ""


def mark_style(color: str, *, partial: bool, edge: str) -> dict[str, Any]:
    """How a run's dot or star looks: full, or faint with an edge of its colour where its score is over a part."""
    from matplotlib.colors import to_rgba

    if partial:
        return {"markerfacecolor": to_rgba(color, _FAINT), "markeredgecolor": color, "markeredgewidth": 1.6}
    return {"markerfacecolor": color, "markeredgecolor": edge, "markeredgewidth": 0.8}


def result_plot(report: Report) -> str:
    """Bars with intervals for every benchmark and run; a line marks the baseline, an open circle the control.

    Outlined bars are over other questions than all of the benchmark.
    """
    benchmarks = report.benchmarks
    step = len(report.runs) + 1.2
    figure, axes = figure_of("results", height_in=0.7 + _BAR_IN * step * len(benchmarks))
    for place, benchmark in enumerate(benchmarks):
        for index, run in enumerate(report.runs):
            if benchmark in run.scores:
                y = place * step + index
                _result_bar(axes, run, benchmark, y, color_of(index))
                axes.plot([_baseline(run, benchmark)] * 2, [y - 0.5, y + 0.5], color=INK, linewidth=1.4, zorder=4)
                number = number_of(index, len(report.runs))
                axes.text(0.6, y, number, fontsize=6, color=INK, va="center_baseline", zorder=6)
    axes.set_yticks(
        [place * step + (len(report.runs) - 1) / 2 for place in range(len(benchmarks))],
        [as_written(title_of(name)) for name in benchmarks],
    )
    axes.set_ylim(len(benchmarks) * step - 0.6, -1.2)
    axes.set_xlim(0, 100)
    axes.set_xlabel("score in percent, 95 % interval")
    axes.grid(axis="x", color=RULE, linewidth=0.6, zorder=0)
    return svg_of(figure, "results")


def _result_bar(axes: Axes, run: RunData, benchmark: str, y: float, color: str) -> None:
    from matplotlib.colors import to_rgba

    score = run.scores[benchmark]
    low, high = score.interval95
    inside, edge = (to_rgba(color, _FAINT), color) if part_of(score) else (color, "none")
    axes.barh(y, score.score, height=0.8, color=inside, edgecolor=edge, linewidth=1.0, zorder=2)
    axes.plot([low, high], [y, y], color=INK, linewidth=1.0, alpha=0.75, zorder=3)
    if benchmark in run.control_scores:
        control = run.control_scores[benchmark].score
        axes.plot([control], [y], marker="o", markersize=3.6, markerfacecolor="none", color=INK, zorder=5)


def _baseline(run: RunData, benchmark: str) -> float:
    return max(run.scores[benchmark].baselines.values())


def loss_plot(runs: Sequence[RunData]) -> str:
    """Training loss by step: every logged value faintly, a running mean over 25 logged values on top."""
    figure, axes = figure_of("losses", height_in=3.2)
    for index, run in enumerate(runs):
        steps, losses = [step for step, _ in run.losses], [loss for _, loss in run.losses]
        smooth = [
            sum(losses[max(0, at - _SMOOTHED_STEPS + 1) : at + 1]) / min(at + 1, _SMOOTHED_STEPS)
            for at in range(len(losses))
        ]
        axes.plot(steps, losses, color=color_of(index), linewidth=0.5, alpha=0.3)
        axes.plot(steps, smooth, color=color_of(index), linewidth=1.6)
        if steps:
            axes.annotate(number_of(index, len(runs)), (steps[-1], smooth[-1]), fontsize=7, color=INK)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per answer token")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    axes.grid(color=RULE, linewidth=0.6)
    return svg_of(figure, "losses")


def figure_of(name: str, *, height_in: float) -> tuple[Figure, Axes]:
    """A figure of the page's width with one plot, in INK and RULE."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
    axes = figure.add_subplot(label=name)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.set_axisbelow(True)
    return figure, axes


def svg_of(figure: Figure, name: str) -> str:
    """The drawing as an <svg> element that takes the page's colours; the same drawing gives the same text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"vlmx {name}"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's browser has its own fonts
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg ", '<svg aria-hidden="true" ', 1)  # what it shows is said beside it
    svg = svg.replace("'DejaVu Sans', ", "").replace(INK, "currentColor").replace(RULE, "var(--rule)")
    return svg
