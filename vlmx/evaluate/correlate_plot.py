"""How does a matrix of correlations look? A heat map that can be read without colour: the numbers are in the cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmx.evaluate.correlate import INTERVAL_TEXT, Cell, Correlation
from vlmx.evaluate.plot_text import as_written

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = "PuOr_r"  # purple to orange: told apart with any kind of colour vision
_DARK_FROM = 0.72  # |r| from which the cell is so dark that its number is white
_CELL_IN = 0.62


def heat_map(correlation: Correlation, *, title: str = "", ink: str = "black") -> Figure:
    """Draw the matrix; each cell has its coefficient and, smaller, its 95 % interval.

    Args:
        correlation: what is drawn. Blank pairs are left white with a dash.
        title: above it.
        ink: colour of everything outside of the cells.
    """
    import numpy as np
    from matplotlib.figure import Figure

    columns = correlation.columns
    r_CC = np.ones((len(columns), len(columns)))
    side_in = 1.4 + _CELL_IN * len(columns)
    figure = Figure(figsize=(side_in + 0.7, side_in), layout="constrained")
    axes = figure.add_subplot(label="correlation")
    for at, first in enumerate(columns):
        for beside, second in enumerate(columns):
            cell = correlation.cell(first, second)
            if cell is not None:
                r_CC[at, beside] = np.nan if cell.r is None else cell.r
            text, small = _texts(cell, correlation.models)
            color = "white" if abs(r_CC[at, beside]) >= _DARK_FROM else "black"
            axes.text(beside, at - 0.12, text, ha="center", va="center", fontsize=9, color=color)
            axes.text(beside, at + 0.25, small, ha="center", va="center", fontsize=5.5, color=color)
    image = axes.imshow(r_CC, cmap=COLORS, vmin=-1, vmax=1)
    names = [as_written(column) for column in columns]
    axes.set_xticks(range(len(columns)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(columns)), names)
    axes.tick_params(colors=ink, labelsize=9, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.035, pad=0.02)
    bar.set_label(
        f"Pearson's r over {correlation.models} models; small: 95 % interval ({INTERVAL_TEXT[correlation.interval]})",
        color=ink,
    )
    bar.ax.tick_params(colors=ink, labelsize=8)
    bar.outline.set_visible(False)  # type: ignore[operator]  # a spine, which matplotlib's stubs take for a function
    if title:
        axes.set_title(as_written(title), color=ink, fontsize=11)
    return figure


def _texts(cell: Cell | None, models: int) -> tuple[str, str]:
    """What stands in a cell, large and small."""
    if cell is None:
        return "1", ""
    if cell.r is None or cell.interval95 is None:
        return "-", f"n = {cell.n}"
    low, high = cell.interval95
    return f"{cell.r:.2f}", f"{low:.2f} to {high:.2f}" + (f"\nn = {cell.n}" if cell.n < models else "")
