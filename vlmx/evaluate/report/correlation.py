"""Which benchmarks of the report go together? Pearson's matrix over its models, with colours for a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmx.console import note
from vlmx.errors import UsageError
from vlmx.evaluate.correlate import LEAST_MODELS, Correlation, correlate, published_model
from vlmx.evaluate.report.collect import Report
from vlmx.evaluate.report.paper_table import WEIGHTED_LOC, WEIGHTED_VQA, PaperTable

_COLORS = "PuOr_r"  # from purple over white to orange: told apart without colour vision


@dataclass(frozen=True, kw_only=True)
class HeatCell:
    """A cell of the table.

    Attributes:
        text: the coefficient, or "".
        hint: its interval, or why there is none.
        background, ink: CSS colours.
    """

    text: str
    hint: str
    background: str
    ink: str


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """The matrix as a table.

    Attributes:
        columns: names, also of the rows.
        rows: as many cells as there are columns in each.
        runs, published: how many models of each kind there are.
    """

    columns: tuple[str, ...]
    rows: Sequence[Sequence[HeatCell]]
    runs: int
    published: int


def heat_map(report: Report, table: PaperTable) -> HeatMap | None:
    """The matrix over runs and published rows; None with fewer than four, or where nothing correlates.

    A score over a part of a benchmark is left out where it would stand among published ones.
    """
    runs = [
        {name: score for name, score in row.scores.items() if not (report.published and name in row.partial)}
        for row in table.rows
        if row.run
    ]
    models = [scores for scores in runs if scores]
    models += [published_model(row) for row in report.published]
    if len(models) < LEAST_MODELS:
        return None
    columns = [*table.vqa, *table.loc, *([WEIGHTED_VQA] if table.vqa else []), *([WEIGHTED_LOC] if table.loc else [])]
    known = [name for name in columns if any(name in model for model in models)]
    try:
        found = correlate(models, known)
    except UsageError as error:
        note(f"no correlation matrix: {error}")
        return None
    return HeatMap(
        columns=found.columns,
        rows=[[_cell(found, one, other) for other in found.columns] for one in found.columns],
        runs=len(models) - len(report.published),
        published=len(report.published),
    )


def _cell(found: Correlation, one: str, other: str) -> HeatCell:
    cell = found.cell(one, other)
    if cell is None:
        return HeatCell(text="", hint="the column itself", background="transparent", ink="inherit")
    if cell.r is None or cell.interval95 is None:
        return HeatCell(text="n/a", hint=cell.blank, background="transparent", ink="inherit")
    low, high = cell.interval95
    background, ink = colors_of(cell.r)
    hint = f"{low:.2f} to {high:.2f}, over {cell.n} models"
    return HeatCell(text=f"{cell.r:.2f}", hint=hint, background=background, ink=ink)


def colors_of(r: float) -> tuple[str, str]:
    """Background for a coefficient of -1..1, and an ink, black or white, that reads on it."""
    from matplotlib import colormaps

    red, green, blue, _ = colormaps[_COLORS]((r + 1) / 2)
    linear = [level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in (red, green, blue)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    background = "#" + "".join(f"{round(255 * level):02x}" for level in (red, green, blue))
    return background, "#000000" if luminance > 0.179 else "#ffffff"  # where both inks contrast the same
