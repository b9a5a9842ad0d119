"""Where do runs stand among the paper's models? Two drawings of published rows with the runs on top."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from vlmx.evaluate.plot_text import as_written
from vlmx.evaluate.report.paper_table import WEIGHTED_LOC, WEIGHTED_VQA, PaperTable, TableRow, title_of
from vlmx.evaluate.report.plots import INK, RULE, figure_of, mark_style, number_of, svg_of

_FAMILIES: Mapping[str, tuple[str, str]] = {  # beginning of the encoder's name -> family, marker
    "VMamba": ("VMamba", "o"),
    "MambaVision": ("MambaVision", "v"),
    "Vim": ("Vim", "<"),
    "MaxViT": ("MaxViT", "s"),
    "ViTDet": ("ViTDet", "D"),
    "ViT-": ("ViT", "^"),
    "DeiT": ("ViT-Adapter", "P"),
    "BeiT": ("ViT-Adapter", "P"),
    "AugReg": ("ViT-Adapter", "P"),
    "Perceiver": ("ViT-Adapter", "P"),
}
_OTHERS = ("contrastive, self-supervised", "X")
_LETTERS = 26  # of a run's name in a line
_FAMILY_COLORS = ("#4477aa", "#66a5d8", "#228833", "#aa8800", "#ee6677", "#aa3377", "#8a8a8a", "#994455")


def family_of(encoder: str) -> tuple[str, str]:
    """Family and marker of a published encoder."""
    return next((family for start, family in _FAMILIES.items() if encoder.startswith(start)), _OTHERS)


def averages_plot(table: PaperTable, colors: Mapping[str, str]) -> str:
    """Weighted VQA against weighted localization: published rows by family, runs as large named stars.

    A faint star with a dagger is over other questions than all of the benchmarks.

    Args:
        table: rows of runs and of the paper.
        colors: of the runs, by name.
    """
    figure, axes = figure_of("averages", height_in=4.6)
    published = [row for row in table.rows if not row.run]
    families = sorted({family_of(row.model["encoder"]) for row in published})
    for number, family in enumerate(families):
        members = [row for row in published if family_of(row.model["encoder"]) == family]
        axes.scatter(
            [row.scores[WEIGHTED_VQA] for row in members],
            [row.scores[WEIGHTED_LOC] for row in members],
            marker=family[1],
            s=26,
            color=_FAMILY_COLORS[number % len(_FAMILY_COLORS)],
            alpha=0.85,
            linewidths=0,
            label=family[0],
        )
    ours = _runs_with_averages(table)
    places = [(row.scores[WEIGHTED_VQA], row.scores[WEIGHTED_LOC]) for row in ours]
    for row, at in zip(ours, places, strict=True):
        partial = bool({WEIGHTED_VQA, WEIGHTED_LOC} & row.partial)
        axes.plot(*at, "*", markersize=15, **mark_style(colors[row.run], partial=partial, edge=INK))
    low, high = axes.get_xlim()
    for row, at in zip(ours, places, strict=True):
        is_left = at[0] < (low + high) / 2  # then its name has room on the right
        name = textwrap.fill(row.run, _LETTERS) + (" †" if {WEIGHTED_VQA, WEIGHTED_LOC} & row.partial else "")
        axes.annotate(
            as_written(name),
            at,
            xytext=(8 if is_left else -8, 4),
            textcoords="offset points",
            ha="left" if is_left else "right",
            fontsize=8,
            color=INK,
        )
    axes.set_xlabel("weighted VQA, percent")
    axes.set_ylabel("weighted localization, percent")
    axes.grid(color=RULE, linewidth=0.6)
    axes.legend(fontsize=8, frameon=False, labelcolor=INK, loc="upper left", handletextpad=0.2)
    return svg_of(figure, "averages")


def _runs_with_averages(table: PaperTable) -> list[TableRow]:
    return [row for row in table.rows if row.run and {WEIGHTED_VQA, WEIGHTED_LOC} <= set(row.scores)]


def strip_plot(table: PaperTable, colors: Mapping[str, str]) -> str:
    """For each benchmark a line of all published scores, with the runs' scores on it; faint ones are over a part."""
    benchmarks = [*table.vqa, *table.loc]
    figure, axes = figure_of("strips", height_in=0.7 + 0.36 * len(benchmarks))
    for place, name in enumerate(benchmarks):
        values = [row.scores[name] for row in table.rows if not row.run and name in row.scores]
        axes.plot(values, [place] * len(values), "|", markersize=13, markeredgewidth=1.0, color=INK, alpha=0.35)
        for row in table.rows:
            if row.run and name in row.scores:
                style = mark_style(colors[row.run], partial=name in row.partial, edge=INK)
                axes.plot(row.scores[name], place, "o", markersize=7, clip_on=False, zorder=5, **style)
                number = number_of([*colors].index(row.run), len(colors))
                at = (row.scores[name], place)
                axes.annotate(number, at, fontsize=5, color=INK, ha="center", va="center_baseline", zorder=6)
    axes.set_yticks(range(len(benchmarks)), [as_written(title_of(name)) for name in benchmarks])
    axes.set_ylim(len(benchmarks) - 0.5, -0.6)
    axes.set_xlim(0, 100)
    axes.set_xlabel("score in percent")
    axes.grid(axis="x", color=RULE, linewidth=0.6)
    return svg_of(figure, "strips")
