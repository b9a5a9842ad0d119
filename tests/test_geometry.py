"""Do boxes land where the photo's pixels land, and come back?"""

from __future__ import annotations

import math
import random

import pytest

from vlmx.cache_specs.geometry import Box, Frame, Geometry, convert_box
from vlmx.errors import CacheError

FRAMES: tuple[Frame, ...] = ("source", "source_unit", "padded", "padded_unit")


def letterbox(height: int, width: int) -> Geometry:
    return Geometry(mode="letterbox", height=height, width=width, fill=(123, 116, 103))


def test_a_wide_photo_is_padded_above_and_below() -> None:
    place = letterbox(512, 512).place((640, 480))
    assert (place.pad_left, place.pad_top, place.pad_right, place.pad_bottom) == (0, 80, 0, 80)
    assert place.padded_wh == (640, 640)
    assert place.scale_x == place.scale_y == 0.8


def test_an_odd_padding_is_completed_on_the_right() -> None:
    place = letterbox(224, 224).place((427, 640))
    assert (place.pad_left, place.pad_right) == (106, 107)
    assert place.padded_wh == (640, 640)


def test_a_target_that_is_not_square_has_its_own_aspect_ratio() -> None:
    tall = letterbox(800, 1333).place((640, 480))
    assert tall.padded_wh == (800, 480)  # 480 * 1333 / 800 = 799.8
    assert (tall.pad_left, tall.pad_right, tall.pad_top, tall.pad_bottom) == (80, 80, 0, 0)
    wide = letterbox(800, 1333).place((2000, 500))
    assert wide.padded_wh == (2000, 1200)  # 2000 * 800 / 1333 = 1200.3
    assert (wide.pad_top, wide.pad_bottom) == (350, 350)


def test_a_photo_of_the_target_ratio_is_not_padded() -> None:
    place = letterbox(100, 200).place((400, 200))
    assert (place.pad_left, place.pad_top, place.pad_right, place.pad_bottom) == (0, 0, 0, 0)
    assert (place.scale_x, place.scale_y) == (0.5, 0.5)


def test_stretch_never_pads() -> None:
    geometry = Geometry(mode="stretch", height=100, width=100, fill=(0, 0, 0))
    assert geometry.place((640, 480)).padded_wh == (640, 480)
    assert convert_box((64, 48, 320, 480), geometry, (640, 480), "source", "padded") == (10.0, 10.0, 50.0, 100.0)


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        ("source", (160.0, 120.0, 480.0, 360.0)),
        ("source_unit", (0.25, 0.25, 0.75, 0.75)),
        ("padded", (128.0, 160.0, 384.0, 352.0)),
        ("padded_unit", (0.25, 0.3125, 0.75, 0.6875)),
    ],
)
def test_one_box_in_all_frames(frame: Frame, expected: Box) -> None:
    box = (160.0, 120.0, 480.0, 360.0)
    assert convert_box(box, letterbox(512, 512), (640, 480), "source", frame) == pytest.approx(expected, abs=1e-12)


def test_square_targets_follow_the_published_conversion() -> None:
    # the formula that converts ground truth for a padded square: m = max(w, h), x' = (x + (m - w) / 2) / m
    width, height = 320, 640
    x1, y1, x2, y2 = convert_box((10, 20, 300, 600), letterbox(336, 336), (width, height), "source", "padded_unit")
    assert (x1, x2) == pytest.approx(((10 + 160) / 640, (300 + 160) / 640))
    assert (y1, y2) == pytest.approx((20 / 640, 600 / 640))


def test_random_boxes_come_back_from_every_frame() -> None:
    dice = random.Random(0)
    for _ in range(300):
        source_wh = (dice.randint(1, 3000), dice.randint(1, 3000))
        geometry = Geometry(
            mode=dice.choice(["letterbox", "stretch"]),
            height=dice.randint(1, 1400),
            width=dice.randint(1, 1400),
            fill=(0, 0, 0),
        )
        box = (dice.uniform(-5, 9), dice.uniform(-5, 9), dice.uniform(10, 3000), dice.uniform(10, 3000))
        for start in FRAMES:
            for end in FRAMES:
                there = convert_box(box, geometry, source_wh, start, end)
                back = convert_box(there, geometry, source_wh, end, start)
                assert back == pytest.approx(box, rel=1e-9, abs=1e-6), (source_wh, geometry, start, end)


def test_the_whole_photo_stays_inside_the_input_and_touches_two_borders() -> None:
    dice = random.Random(1)
    for _ in range(300):
        width, height = dice.randint(1, 3000), dice.randint(1, 3000)
        geometry = letterbox(dice.randint(16, 1400), dice.randint(16, 1400))
        place = geometry.place((width, height))
        assert place.pad_left + width + place.pad_right == place.padded_wh[0]
        assert place.pad_top + height + place.pad_bottom == place.padded_wh[1]
        assert 0 <= place.pad_right - place.pad_left <= 1
        assert 0 <= place.pad_bottom - place.pad_top <= 1
        assert (place.pad_left + place.pad_right) * (place.pad_top + place.pad_bottom) == 0
        x1, y1, x2, y2 = convert_box((0, 0, 1, 1), geometry, (width, height), "source_unit", "padded_unit")
        assert -1e-12 <= x1 < x2 <= 1 + 1e-12
        assert -1e-12 <= y1 < y2 <= 1 + 1e-12
        assert math.isclose(x2 - x1, 1) or math.isclose(y2 - y1, 1)


def test_all_problems_of_a_geometry_are_named_at_once() -> None:
    with pytest.raises(CacheError) as caught:
        Geometry(mode="crop", height=0, width=224, fill=(0, 0, 256))  # type: ignore[arg-type]
    assert "mode is 'crop'" in caught.value.why
    assert "0 x 224" in caught.value.why
    assert "(0, 0, 256)" in caught.value.why


def test_the_references_crop() -> None:
    """CLIP-B at 224: pad to a square, resize to floor(224 / 0.9) = 248, keep the middle 224."""
    geometry = Geometry(mode="letterbox", height=224, width=224, fill=(0, 0, 0), crop_pct=0.9)
    place = geometry.place((640, 480))
    assert (place.padded_wh, place.resized_wh) == ((640, 640), (248, 248))
    assert (place.crop_left, place.crop_top) == (12, 12)
    assert place.scale_x == place.scale_y == 248 / 640
    # the whole photo does not fit: its left edge lies 12 pixels outside
    assert convert_box((0, 0, 640, 480), geometry, (640, 480), "source", "padded") == (-12, 19, 236, 205)
    box = (10.0, 20.0, 200.0, 300.0)
    for frame in ("source_unit", "padded", "padded_unit"):
        there = convert_box(box, geometry, (640, 480), "source", frame)
        assert convert_box(there, geometry, (640, 480), frame, "source") == pytest.approx(box)


def test_a_crop_is_written_only_where_there_is_one() -> None:
    plain = Geometry(mode="letterbox", height=224, width=224, fill=(0, 0, 0))
    cropped = Geometry(mode="letterbox", height=224, width=224, fill=(0, 0, 0), crop_pct=0.95)
    assert "crop_pct" not in plain.to_dict()
    assert cropped.to_dict()["crop_pct"] == 0.95
    assert cropped.place((100, 100)).resized_wh == (235, 235)
    with pytest.raises(CacheError, match=r"crop_pct is 1\.5"):
        Geometry(mode="letterbox", height=224, width=224, fill=(0, 0, 0), crop_pct=1.5)
