"""Do boxes parse, overlap and count as in the reference evaluation, and in which frame?"""

import warnings

import pytest

from vlmx.cache_specs.geometry import Geometry
from vlmx.errors import DataError
from vlmx.evaluate.metrics import SCORERS, breakdown
from vlmx.evaluate.metrics.boxes import hit_of, iou, overlaps, parse_box, rounded_unit

SQUARE = Geometry(mode="letterbox", height=64, width=64, fill=(0, 0, 0))
STRETCHED = Geometry(mode="stretch", height=64, width=64, fill=(0, 0, 0))


@pytest.mark.parametrize(
    "text",
    [
        "0.1, 0.2, 0.3, 0.4",
        "(0.1, 0.2, 0.3, 0.4)",
        "[0.1, 0.2, 0.3]",
        "[0.1, 0.2, 0.3, 0.4, 0.5]",
        "[[0.1, 0.2, 0.3, 0.4]]",
        "[0.3, 0.2, 0.1, 0.4]",
        "[0.1, 0.2, 0.1, 0.4]",
        "[0.1, 0.2, 0.3, 1.4]",
        "[0.1, 0.2, 0.3, 1" + "0" * 400 + "]",
        "[-0.1, 0.2, 0.3, 0.4]",
        "[0.1, 0.2, 0.3, 0.4",
        "[0.1 0.2 0.3 0.4]",
        "[0.1, 0.2, '0.3', 0.4]",
        "[0.1, 0.2, None, 0.4]",
        "[0.1, 0.2, 0.3j, 0.4]",
        "[nan, 0.2, 0.3, 0.4]",
        "[0.1, 0.2, 0.3, 1e999]",
        "[0.1, 0.2, 0.3, 0.4].",
        "the box is [0.1, 0.2, 0.3, 0.4]",
        "['\\d', 0.2, 0.3, 0.4]",
        "\0",
        "\ud800",
        "",
        "[" * 4000,
        "-" * 4000 + "1",
        "[" * 100_000,
    ],
)
def test_what_is_not_a_box(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parse_box(text) is None
    assert SCORERS["refcoco"](text, [0.1, 0.2, 0.3, 0.4]) == 0.0


@pytest.mark.parametrize(
    "text", [" [0.1, 0.2, 0.30, 1]\n", "[.1,.2,.3,1.0]", "([0.1, 0.2, 0.3, 1])", "[0.1, 0.2, 0.3, True]"]
)
def test_what_is_a_box(text: str) -> None:
    assert parse_box(text) == (0.1, 0.2, 0.3, 1.0)  # all that the reference's parser takes


@pytest.mark.parametrize(
    ("box", "other", "expected"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
        ((0, 0, 2, 2), (0, 0, 1, 2), 0.5),
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7),
        ((0, 0, 2, 2), (2, 0, 4, 2), 0.0),
        ((0, 0, 2, 2), (1, 1, 1, 2), 0.0),  # a true box that rounding made empty
    ],
)
def test_iou(box: tuple[float, ...], other: tuple[float, ...], expected: float) -> None:
    assert iou(box, other) == pytest.approx(expected)  # type: ignore[arg-type]
    assert iou(other, box) == pytest.approx(expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("benchmark", "expected"),
    [("refcoco", 0.0), ("refcoco+", 0.0), ("refcocog", 0.0), ("ocid_ref", 1.0), ("ocid-ref", 1)],
)
def test_ocid_ref_counts_at_a_quarter_and_the_others_at_a_half(benchmark: str, expected: float) -> None:
    assert SCORERS[benchmark]("[0.0, 0.0, 0.25, 1.0]", [0.0, 0.0, 1.0, 1.0]) == expected
    assert SCORERS[benchmark]("[0.0, 0.0, 0.5, 1.0]", [0.0, 0.0, 1.0, 1.0]) == 1.0
    assert SCORERS[benchmark]("[0.0, 0.0, 0.24, 1.0]", [[0.0, 0.0, 1.0, 1.0]]) == 0.0


def test_any_of_several_true_boxes_counts() -> None:
    assert SCORERS["refcoco"]("[0, 0, 0.5, 1]", [[0.6, 0, 1, 1], [0, 0, 0.4, 1]]) == 1.0
    with pytest.raises(DataError, match="not a box"):
        SCORERS["refcoco"]("[0, 0, 0.5, 1]", [0.6, 0, 1])
    with pytest.raises(DataError, match="not a box"):
        SCORERS["refcoco"]("[0, 0, 0.5, 1]", ["left"])
    with pytest.raises(DataError, match="without a true box"):
        SCORERS["refcoco"]("[0, 0, 0.5, 1]", [])


def test_the_way_back_to_the_photo_does_not_decide_about_a_half() -> None:
    letterbox = Geometry(mode="letterbox", height=224, width=224, fill=(0, 0, 0))
    answered = (0.3671875, 0.028125, 0.490625, 0.1625)  # exactly half of the true box
    assert overlaps(answered, (155, 18, 313, 104), letterbox, (480, 640))["corrected"] == 0.5


def test_a_benchmark_of_ones_own_counts_at_a_half() -> None:
    assert hit_of("mini-ref") is SCORERS["boxes"]
    assert SCORERS["boxes"]("[0, 0, 0.5, 1]", [0, 0, 1, 1]) == 1.0
    assert SCORERS["boxes"]("[0, 0, 0.49, 1]", [0, 0, 1, 1]) == 0.0
    assert hit_of("ocid-ref").text == "IoU >= 0.25"


def test_raw_and_corrected_differ_by_the_letterbox() -> None:
    truth, image_wh = (0.0, 0.0, 100.0, 100.0), (200, 100)  # letterboxed: the photo spans y from 0.25 to 0.75
    seen, unaware = (0.0, 0.25, 0.5, 0.75), (0.0, 0.0, 0.5, 1.0)
    assert overlaps(seen, truth, SQUARE, image_wh) == {"corrected": 1.0, "raw": 0.5}
    assert overlaps(unaware, truth, SQUARE, image_wh) == {"corrected": 0.5, "raw": 1.0}
    assert overlaps(unaware, truth, STRETCHED, image_wh) == {"corrected": 1.0, "raw": 1.0}


def test_raw_rounds_the_true_box_to_two_decimals() -> None:
    truth, image_wh = (1.0, 2.0, 334.0, 334.0), (1000, 1000)
    assert rounded_unit(truth, image_wh) == (0.0, 0.0, 0.33, 0.33)
    assert overlaps((0.0, 0.0, 0.33, 0.33), truth, STRETCHED, image_wh)["raw"] == 1.0
    assert overlaps((0.0, 0.0, 0.33, 0.33), truth, STRETCHED, image_wh)["corrected"] < 1.0


def test_rates_and_mean_iou_by_both_comparisons() -> None:
    found = breakdown.boxes([{"corrected": 0.6, "raw": 0.3}, {"corrected": 0.25, "raw": 0.0}])
    assert found == pytest.approx(
        {
            "corrected_iou50": 50,
            "corrected_iou25": 100,
            "corrected_mean_iou": 42.5,
            "raw_iou50": 0,
            "raw_iou25": 50,
            "raw_mean_iou": 15,
        }
    )
