"""Where does an answer point, and how well does that fit? Parsing of "[x1, y1, x2, y2]" and overlap of boxes.

Boxes are x1, y1, x2, y2. Overlap (intersection over union) does not change under scaling of an axis, so it may be
taken in any frame that both boxes share. Two comparisons are made of each answer, and each is named:

    corrected   the answer is in parts of the encoder's input, as the model saw the photo, and is converted to the photo
    raw         the paper's evaluation: the answer is taken in parts of the photo's sides, whatever was done to it, and
                the true box is rounded to two decimals of these
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlmx.cache_specs.geometry import Geometry, convert_box
from vlmx.data.records import Box
from vlmx.errors import DataError

Comparison = Literal["corrected", "raw"]
COMPARISONS: tuple[Comparison, ...] = ("corrected", "raw")

_LONGEST_ANSWER = 4096  # characters; 128 tokens are far below, and the parser has to be kept from runaway texts


def parse_box(text: str) -> Box | None:
    """The box that an answer names, in parts of an image's width and height; None if the answer is not valid.

    The whole answer has to be a Python list of four numbers in 0..1 with x1 < x2 and y1 < y2, as in the reference
    evaluation. Which frame it is in (the letterboxed image or the source) is up to the caller.
    """
    if len(text) > _LONGEST_ANSWER:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes and the like in texts that are no box anyway
            value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    if not isinstance(value, list) or len(value) != 4 or not all(isinstance(edge, int | float) for edge in value):
        return None
    if not all(0 <= edge <= 1 for edge in value):  # before a long integer meets float()
        return None
    x1, y1, x2, y2 = (float(edge) for edge in value)
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


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


def overlaps(answered: Box, truth: Box, geometry: Geometry, image_wh: tuple[int, int]) -> dict[Comparison, float]:
    """IoU of an answer and the true box by both comparisons.

    Args:
        answered: as the model wrote it, 0..1.
        truth: in pixels of the source image.
        geometry: how the image was brought to the encoder's size.
        image_wh: width and height of the source image in pixels.
    """
    converted = convert_box(answered, geometry, image_wh, "padded_unit", "source")
    # The way to the photo and back costs the last digits, which must not decide about an overlap of exactly one half.
    return {"corrected": round(iou(converted, truth), 12), "raw": iou(answered, rounded_unit(truth, image_wh))}


def rounded_unit(box: Box, image_wh: tuple[int, int]) -> Box:
    """A box in pixels as parts of the image's sides, rounded to two decimals: how the reference stores true boxes."""
    width, height = image_wh
    return (
        round(box[0] / width, 2),
        round(box[1] / height, 2),
        round(box[2] / width, 2),
        round(box[3] / height, 2),
    )


@dataclass(frozen=True, kw_only=True)
class BoxHit:
    """A pure function `rule(prediction, box) -> 0.0 or 1.0`: whether an answer overlaps a box well enough.

    Attributes:
        least_iou: the overlap that counts as a hit.
    """

    least_iou: float

    @property
    def text(self) -> str:
        """The rule in words."""
        return f"IoU >= {self.least_iou:g}"

    def __call__(self, prediction: str, answers: Sequence[float] | Sequence[Sequence[float]]) -> float:
        """Score one answer; one that is no box scores 0.

        Args:
            prediction: the answer as the model wrote it.
            answers: the true box, or a list of true boxes any of which counts, in the frame of the prediction.

        Raises:
            DataError: `answers` are no boxes, or none at all, or the prediction is no text.
        """
        try:
            edges = np.asarray(answers, dtype=np.float64)
            truths = edges.reshape(-1, 4).tolist()
        except (ValueError, TypeError) as error:
            raise DataError(f"{answers!r} is not a box of four numbers, nor a list of such", why=str(error)) from error
        if not truths:
            raise DataError("an answer cannot be scored without a true box", why="none is given")
        if not isinstance(prediction, str):
            raise DataError("this answer cannot be scored", why=f"it is {prediction!r}, not a text")
        answered = parse_box(prediction)
        if answered is None:
            return 0.0
        return float(any(iou(answered, (x1, y1, x2, y2)) >= self.least_iou for x1, y1, x2, y2 in truths))


BOX_HIT = BoxHit(least_iou=0.5)
_OCID_REF = BoxHit(least_iou=0.25)
# The objects of OCID-Ref are small; its authors and the paper count at 0.25. The paper's table spells it with _, its
# files with -.
BOX_HITS: Mapping[str, BoxHit] = {
    "refcoco": BOX_HIT,
    "refcoco+": BOX_HIT,
    "refcocog": BOX_HIT,
    "ocid_ref": _OCID_REF,
    "ocid-ref": _OCID_REF,
    "boxes": BOX_HIT,  # as "exact" for texts: the rule of benchmarks that have none of their own
}


def hit_of(benchmark: str) -> BoxHit:
    """The rule that decides what counts as a hit in `benchmark`: IoU 0.5 unless its authors say otherwise."""
    return BOX_HITS.get(benchmark, BOX_HIT)
