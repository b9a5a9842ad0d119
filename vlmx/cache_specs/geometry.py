"""Where does a point of a photo land in the encoder's input, and where does a point of that input come from?

Frames of a box (x1, y1, x2, y2), x to the right, y down, pixel coordinates continuous (the image spans 0..width):

    source        pixels of the photo as it is stored
    source_unit   the same, divided by the photo's (width, height)
    padded        pixels of the encoder's input (`Geometry.width` x `Geometry.height`)
    padded_unit   the same, divided by (`Geometry.width`, `Geometry.height`)

Letterbox follows the rule of Prismatic's `letterbox-pad`: the photo is padded at its native size with a constant
colour, half of it on each side, and only then resized bicubically. Three things differ on purpose: the target may be
other than square, an odd padding is completed on the right or at the bottom instead of being one pixel short, and
nothing is cropped unless `crop_pct` says so. With it, the padded photo is resized to 1 / `crop_pct` of the target and
its centre is cut out, as that code does for encoders whose timm id has neither "siglip" nor "in1k" in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from vlmx.errors import CacheError

Mode = Literal["letterbox", "stretch"]
Frame = Literal["source", "source_unit", "padded", "padded_unit"]
Box = tuple[float, float, float, float]

MODES: tuple[Mode, ...] = ("letterbox", "stretch")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What is done to one photo: pad by (left, top, right, bottom) source pixels, resize, cut the target out.

    Attributes:
        pad_left, pad_top, pad_right, pad_bottom: source pixels of fill colour added on each side.
        padded_wh: width and height after padding, before resizing.
        resized_wh: width and height after resizing; the target's, unless a border is cropped.
        crop_left, crop_top: pixels of the resized image before the target.
        scale_x, scale_y: target pixels a source pixel; they differ slightly where padding had to be rounded.
    """

    pad_left: int
    pad_top: int
    pad_right: int
    pad_bottom: int
    padded_wh: tuple[int, int]
    resized_wh: tuple[int, int]
    crop_left: int
    crop_top: int
    scale_x: float
    scale_y: float


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How photos of all sizes become inputs of one size.

    Attributes:
        mode: "letterbox" keeps the aspect ratio and pads, "stretch" resizes to the target as it is.
        height, width: the encoder's input in pixels.
        fill: colour of the padding, 0..255.
        resampling: the filter of the resize.
        crop_pct: share of the resized photo's sides that is kept, from its centre; 1 keeps everything.
    """

    mode: Mode
    height: int
    width: int
    fill: tuple[int, int, int]
    resampling: Literal["bicubic"] = "bicubic"
    crop_pct: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "fill", tuple(self.fill))
        problems = []
        if self.mode not in MODES:
            problems.append(f"mode is {self.mode!r}, not one of {', '.join(MODES)}")
        if not all(type(side) is int and side > 0 for side in (self.height, self.width)):
            problems.append(f"height x width is {self.height!r} x {self.width!r}, not positive integers")
        if len(self.fill) != 3 or not all(type(level) is int and 0 <= level <= 255 for level in self.fill):
            problems.append(f"fill is {self.fill!r}, not three integers 0..255")
        if self.resampling != "bicubic":
            problems.append(f"resampling is {self.resampling!r}, not bicubic")
        if not 0.5 <= self.crop_pct <= 1:
            problems.append(f"crop_pct is {self.crop_pct!r}, not within 0.5..1")
        if problems:
            raise CacheError("this geometry is not valid", why="; ".join(problems))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `crop_pct` is in it only where something is cropped, as in files that know no crop."""
        plain = {
            "mode": self.mode,
            "height": self.height,
            "width": self.width,
            "fill": list(self.fill),
            "resampling": self.resampling,
        }
        return plain if self.crop_pct == 1 else {**plain, "crop_pct": self.crop_pct}

    def place(self, source_wh: tuple[int, int]) -> Placement:
        """Where a photo of `source_wh` (width, height in pixels) goes."""
        source_w, source_h = source_wh
        assert min(source_wh) > 0, source_wh
        padded_w, padded_h = source_w, source_h
        if self.mode == "letterbox":
            if source_w * self.height >= source_h * self.width:  # the photo is at least as wide as the target
                padded_h = _round_ratio(source_w * self.height, self.width)
            else:
                padded_w = _round_ratio(source_h * self.width, self.height)
        pad_left = (padded_w - source_w) // 2
        pad_top = (padded_h - source_h) // 2
        resized_w, resized_h = (math.floor(side / self.crop_pct) for side in (self.width, self.height))
        return Placement(
            pad_left=pad_left,
            pad_top=pad_top,
            pad_right=padded_w - source_w - pad_left,
            pad_bottom=padded_h - source_h - pad_top,
            padded_wh=(padded_w, padded_h),
            resized_wh=(resized_w, resized_h),
            crop_left=round((resized_w - self.width) / 2),
            crop_top=round((resized_h - self.height) / 2),
            scale_x=resized_w / padded_w,
            scale_y=resized_h / padded_h,
        )


def _round_ratio(numerator: int, denominator: int) -> int:
    """The nearest integer, halves up, in integer arithmetic so that every machine agrees."""
    return (2 * numerator + denominator) // (2 * denominator)


def convert_box(box: Box, geometry: Geometry, source_wh: tuple[int, int], from_frame: Frame, to_frame: Frame) -> Box:
    """The same rectangle in another frame; nothing is clipped or rounded.

    Args:
        box: x1, y1, x2, y2 in `from_frame`.
        geometry: how the photo was brought to the encoder's size.
        source_wh: width and height of the photo in pixels.
        from_frame: the frame of `box`.
        to_frame: the frame of the result.
    """
    if from_frame == to_frame:
        return box
    placement = geometry.place(source_wh)
    x_axis = _Axis(source_wh[0], placement.pad_left, placement.scale_x, placement.crop_left, geometry.width)
    y_axis = _Axis(source_wh[1], placement.pad_top, placement.scale_y, placement.crop_top, geometry.height)
    x1, x2 = (x_axis.from_source(x_axis.to_source(x, from_frame), to_frame) for x in (box[0], box[2]))
    y1, y2 = (y_axis.from_source(y_axis.to_source(y, from_frame), to_frame) for y in (box[1], box[3]))
    return (x1, y1, x2, y2)


class _Axis(NamedTuple):
    """One direction: source pixel x lands at (x + pad) * scale - crop."""

    source_side: int
    pad: int
    scale: float
    crop: int
    target_side: int

    def to_source(self, value: float, frame: Frame) -> float:
        if frame == "source":
            return value
        if frame == "source_unit":
            return value * self.source_side
        in_target = value if frame == "padded" else value * self.target_side
        return (in_target + self.crop) / self.scale - self.pad

    def from_source(self, value: float, frame: Frame) -> float:
        if frame == "source":
            return value
        if frame == "source_unit":
            return value / self.source_side
        in_target = (value + self.pad) * self.scale - self.crop
        return in_target if frame == "padded" else in_target / self.target_side
