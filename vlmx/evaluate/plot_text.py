"""How does a plot show a name or phrase as it is written? Dollar signs are not the borders of formulas."""

from __future__ import annotations


def as_written(text: str) -> str:
    """The text for matplotlib, which would take what stands between two dollar signs for a formula."""
    return text.replace("$", r"\$")
