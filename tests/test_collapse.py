"""Does the alarm go off for the rows that the paper calls collapsed, and not for those that it calls stable?"""

import pytest

from vlmx.evaluate.collapse import collapse, highest_of_equal
from vlmx.evaluate.paper_rows import paper_row


def level(name: str, reference: str) -> str | None:
    run, other = paper_row(name).published, paper_row(reference).published
    found = collapse(
        text=run.weighted_vqa,
        box=run.weighted_loc,
        text_reference=other.weighted_vqa,
        box_reference=other.weighted_loc,
    )
    return found.level if found else None


@pytest.mark.parametrize(
    ("name", "reference", "expected"),
    [
        # section 4.4.2: "ViTDet-L/H collapses despite ViTDet-B being strong"
        ("vitdet-l-coco@1024/mlp2", "vitdet-b-coco@1024/mlp2", "collapsed"),
        ("vitdet-h-coco@1024/mlp2", "vitdet-b-coco@1024/mlp2", "fallen"),
        # "VMamba-T/B collapse while VMamba-S is strong"
        ("vmamba-t-coco@800x1328/mlp2", "vmamba-s-coco@800x1328/mlp2", "collapsed"),
        ("vmamba-b-coco@800x1328/mlp2", "vmamba-s-coco@800x1328/mlp2", "collapsed"),
        # section 4.5.2: with the 3-layer connector "the collapse largely persists"
        ("vmamba-b-coco@800x1328/mlp3", "vmamba-b-coco@512/mlp3", "collapsed"),
        # the same cases against what the stabilizations made of them
        ("vitdet-l-coco@1024/mlp2", "vitdet-l-coco@1024/mlp3", "collapsed"),
        ("vitdet-h-coco@1024/mlp2", "vitdet-h-coco@1024/mlp3", "fallen"),
        ("vmamba-t-coco@800x1328/mlp2", "vmamba-t-coco@512/mlp2", "collapsed"),
        ("vmamba-b-coco@800x1328/mlp2", "vmamba-b-coco@512/mlp3", "collapsed"),
        # appendix F.2: direct fusion is "not always stable, particularly for localization"
        ("dinov2-l+siglip-so400m-224@224/mlp2", "dinov2-l+siglip-so400m-224@224/mlp3", "collapsed"),
        ("dinov2-l+clip-l-336@336/mlp2", "dinov2-l+clip-l-336@336/mlp3", "collapsed"),
        # stable ones: strong relatives, controls of section 4.5, and what was repaired
        ("vitdet-b-coco@1024/mlp2", "vitdet-l-coco@1024/mlp3", None),
        ("vmamba-s-coco@512/mlp2", "vmamba-s-coco@800x1328/mlp2", None),
        ("vmamba-t-coco@512/mlp2", "vmamba-s-coco@800x1328/mlp2", None),
        ("vmamba-b-coco@512/mlp3", "vmamba-s-coco@800x1328/mlp2", None),
        ("vmamba-t-coco@800x1328/mlp3", "vmamba-t-in1k@224/mlp2", None),
        ("vmamba-s-in1k@224/mlp2", "vmamba-t-in1k@224/mlp2", None),
        ("vmamba-s-ade20k@512/mlp2", "vmamba-b-ade20k@512/mlp2", None),
        ("vmamba-s-coco@800x1328/mlp2", "vmamba-b-coco@800x1328/mlp2", None),  # better than the reference
    ],
)
def test_published_rows(name: str, reference: str, expected: str | None) -> None:
    assert level(name, reference) == expected


def test_all_fell_together_is_no_collapse() -> None:
    assert collapse(text=20, box=10, text_reference=60, box_reference=40) is None
    assert collapse(text=54, box=30, text_reference=60, box_reference=40) is None  # text is at 90 %
    assert collapse(text=58, box=30, text_reference=60, box_reference=40) is not None


def test_what_may_be_chance_is_no_collapse() -> None:
    assert collapse(text=60, box=15, text_reference=60, box_reference=40, box_highest=41) is None
    assert (
        collapse(text=60, box=15, text_reference=60, box_reference=40, box_highest=30, box_reference_lowest=25) is None
    )
    found = collapse(text=60, box=15, text_reference=60, box_reference=40, box_highest=20, box_reference_lowest=30)
    assert found is not None
    assert found.level == "collapsed"


def test_one_image_without_a_hit_says_nothing_and_a_hundred_say_much() -> None:
    assert highest_of_equal(0, 1) == pytest.approx(97.5)
    assert highest_of_equal(0, 100) == pytest.approx(3.6, abs=0.05)
    assert highest_of_equal(100, 1) == 100
    assert collapse(text=60, box=0, text_reference=60, box_reference=40, box_highest=highest_of_equal(0, 5)) is None
    assert collapse(text=60, box=0, text_reference=60, box_reference=40, box_highest=highest_of_equal(0, 50))


def test_nothing_can_fall_from_nothing() -> None:
    assert collapse(text=60, box=0, text_reference=60, box_reference=0) is None


def test_it_says_what_fell_and_what_helped() -> None:
    found = collapse(text=58.05, box=14.86, text_reference=62.78, box_reference=47.94)
    assert found is not None
    assert found.sentence("a", "b", connector="mlp2", resolution="800x1328") == (
        "localization collapse of a: boxes 14.9 where b has 47.9, text answers 58.0 against 62.8. What helped in the "
        "paper (section 4.5): the 3-layer connector (connector=mlp3) and square input, a cache at --res 512"
    )
    assert found.sentence("a", "b", connector="mlp3", resolution="512x512").endswith("this run has already")
    mild = collapse(text=61, box=35, text_reference=62, box_reference=44)
    assert mild is not None
    assert mild.sentence("a", "b").startswith("localization of a has fallen while text answers hold: boxes 35.0 where")
