"""Where does an answer point, and how well does that fit? Parsing of "[x1, y1, x2, y2]" and overlap of boxes.

Boxes are x1, y1, x2, y2. Overlap (intersection over union) does not change under scaling of an axis, so it may be
taken in any frame that both boxes share.
"""

from __future__ import annotations

import ast

from vlmx.data.records import Box

_LONGEST_ANSWER = 400  # characters; keeps the parser away from runaway generations


def parse_box(text: str) -> Box | None:
    """The box that an answer names, in parts of an image's width and height; None if the answer is not valid.

    The whole answer has to be a list of four numbers in 0..1 with x1 < x2 and y1 < y2, as in the reference
    evaluation. Which frame it
    is in (the letterboxed image or the source) is up to the caller.
    """
    if len(text) > _LONGEST_ANSWER:
        return None
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    if not isinstance(value, list) or len(value) != 4 or any(type(edge) not in (int, float) for edge in value):
        return None
    x1, y1, x2, y2 = (float(edge) for edge in value)
    return (x1, y1, x2, y2) if 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1 else None


def iou(box: Box, other: Box) -> float:
    """Intersection over union of two boxes in the same frame, 0..1."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / (_area(box) + _area(other) - shared)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
