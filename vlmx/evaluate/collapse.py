"""Has localization collapsed? The alarm for boxes that fall while text answers hold.

The paper calls it localization collapse (section 4.4.2): ViTDet-L and ViTDet-H "despite ViTDet-B being strong",
VMamba-T and VMamba-B "while VMamba-S is strong", all trained on COCO detection. It gives no threshold. These are its
own numbers, as shares of the strong relative's weighted averages:

                                  boxes    text answers
    ViTDet-L / ViTDet-B            30 %            91 %
    VMamba-T / VMamba-S            31 %            92 %
    VMamba-B / VMamba-S            31 %            93 %
    VMamba-B(f) / VMamba-S(f)      34 %            95 %
    ViTDet-H / ViTDet-B            81 %            98 %

Four of them lose two thirds of their boxes and at most a tenth of the text answers. The fifth is milder than what the
paper does not call a collapse (VMamba-B / VMamba-S on ImageNet-1K: 71 % and 98 %). So there are two levels, and the
limits lie in the wide gap between the first four and the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Level = Literal["collapsed", "fallen"]
COLLAPSED_BOXES, COLLAPSED_TEXT = 0.5, 0.8
FALLEN_BOXES, FALLEN_TEXT = 0.85, 0.95
SQUARE = "512x512"


@dataclass(frozen=True, kw_only=True)
class Collapse:
    """What was found when a run was held against a reference.

    Attributes:
        level: "collapsed": at most half of the reference's boxes are left and at least 80 % of its text answers;
            "fallen": at most 85 % and at least 95 %.
        text, box: averages of the run over text and box benchmarks, percent.
        text_reference, box_reference: of the reference, over the same benchmarks.
    """

    level: Level
    text: float
    box: float
    text_reference: float
    box_reference: float

    def sentence(self, run: str, reference: str, *, connector: str = "", resolution: str = "") -> str:
        """What to tell the user: what fell, how far, and what helped in the paper.

        Args:
            run, reference: their names.
            connector: the run's, e.g. "mlp2".
            resolution: height x width of the run's input, e.g. "800x1328".
        """
        said = {
            "collapsed": f"localization collapse of {run}",
            "fallen": f"localization of {run} has fallen while text answers hold",
        }[self.level]
        return (
            f"{said}: boxes {self.box:.1f} where {reference} has {self.box_reference:.1f}, text answers "
            f"{self.text:.1f} against {self.text_reference:.1f}. {_what_helped(connector, resolution)}"
        )


def collapse(
    *,
    text: float,
    box: float,
    text_reference: float,
    box_reference: float,
    box_highest: float | None = None,
    box_reference_lowest: float | None = None,
) -> Collapse | None:
    """Hold a run against a published row or another run.

    Args:
        text, box: averages of the run over text and box benchmarks, percent.
        text_reference, box_reference: of the reference, over the same benchmarks.
        box_highest: upper end of the interval of the run's box average; None where it is exact. An interval without
            width is not exact (`highest_of_equal`).
        box_reference_lowest: lower end of the reference's; None where it is exact. As long as the two intervals meet,
            nothing is said.

    Returns:
        None if boxes have not fallen, or text answers have fallen with them.
    """
    highest = box if box_highest is None else box_highest
    lowest = box_reference if box_reference_lowest is None else box_reference_lowest
    if highest >= lowest:
        return None
    level: Level
    if box <= COLLAPSED_BOXES * box_reference and text >= COLLAPSED_TEXT * text_reference:
        level = "collapsed"
    elif box <= FALLEN_BOXES * box_reference and text >= FALLEN_TEXT * text_reference:
        level = "fallen"
    else:
        return None
    return Collapse(level=level, text=text, box=box, text_reference=text_reference, box_reference=box_reference)


def highest_of_equal(box: float, images: int) -> float:
    """Upper end of the interval of a box average where all boxes are worth the same, so that a bootstrap has no width.

    It is the bound of Clopper and Pearson when none of so many images is a hit: 97.5 percent for one, 3.6 for 100.

    Args:
        box: the average, percent.
        images: how many images it is over; where it is over several benchmarks, the fewest of any.
    """
    return box + (100 - box) * (1 - math.pow(0.025, 1 / images))


def _what_helped(connector: str, resolution: str) -> str:
    left = []
    if connector != "mlp3":
        left.append("the 3-layer connector (connector=mlp3)")
    if resolution != SQUARE:
        left.append("square input, a cache at --res 512")
    if not left:
        return "What helped in the paper (section 4.5), the 3-layer connector and 512 x 512 input, this run has already"
    return f"What helped in the paper (section 4.5): {' and '.join(left)}"
