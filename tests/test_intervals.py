"""Do intervals know that questions share images, and are two runs compared question by question?"""

import numpy as np
import pytest

from vlmx.errors import DataError
from vlmx.evaluate.intervals import estimate, interval95, paired_difference


def test_intervals_are_wider_when_questions_share_images() -> None:
    values = [0.0, 100.0] * 200
    alone = interval95(values, [str(n) for n in range(400)])
    shared = interval95(sorted(values), [str(n // 20) for n in range(400)])
    assert alone[0] < 50 < alone[1]
    assert alone[1] - alone[0] == pytest.approx(2 * 1.96 * 50 / np.sqrt(400), rel=0.1)
    assert shared[1] - shared[0] > 3 * (alone[1] - alone[0])
    assert interval95([100.0, 100.0], ["a", "b"]) == (100.0, 100.0)


def test_an_image_brings_all_its_questions() -> None:
    # two images, three questions of 1 and one of 0: a resample is (a, a), (a, b), (b, a) or (b, b)
    found = estimate([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"], resamples=4000)
    assert (found.value, found.interval95, found.images, found.resamples) == (0.75, (0.0, 1.0), 2, 4000)


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(1).random(50).tolist()
    images = [str(n // 3) for n in range(50)]
    assert estimate(values, images) == estimate(values, images)
    assert estimate(values, images) != estimate(values, images, seed=1)


@pytest.mark.parametrize("resamples", [10, 1000])
def test_many_images_are_drawn_in_parts(resamples: int) -> None:
    # 40,000 images do not fit into one part; the interval is the one of the theory all the same
    values = [0.0, 1.0] * 20_000
    found = estimate(values, [str(n) for n in range(40_000)], resamples=resamples)
    half_width = 1.96 * 0.5 / np.sqrt(40_000)
    assert found.interval95[1] - found.interval95[0] == pytest.approx(
        2 * half_width, rel=0.6 if resamples == 10 else 0.1
    )


def test_strata_count_the_same_however_large() -> None:
    values = [1.0] * 8 + [0.0] * 2
    strata = ["big"] * 8 + ["small"] * 2
    images = [str(n) for n in range(10)]
    assert estimate(values, images).value == 0.8
    found = estimate(values, images, strata=strata)
    assert found.value == 0.5
    assert found.interval95 == (0.5, 0.5)  # also where a resample has drawn none of the small ones


def test_values_that_have_no_interval_are_an_error() -> None:
    for values, images in (([], []), ([1.0, 0.0], ["a"]), ([1.0, float("nan")], ["a", "b"])):
        with pytest.raises(DataError, match="no interval of these values"):
            estimate(values, images)
    with pytest.raises(DataError, match="no difference of these values"):
        paired_difference([1.0, 0.0, 1.0], [1.0], ["a", "b", "c"])


def test_pairing_takes_out_what_both_find_hard() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(500) < 0.5
    first = np.where(hard, 0.0, 100.0)
    second = first.copy()
    second[:20] = 0.0
    images = [str(n) for n in range(500)]
    ahead = paired_difference(first.tolist(), second.tolist(), images)
    assert ahead.value == pytest.approx((first - second).mean())
    assert 0 < ahead.interval95[0] < ahead.value < ahead.interval95[1]
    alone = interval95(first.tolist(), images)
    assert ahead.interval95[1] - ahead.interval95[0] < (alone[1] - alone[0]) / 3
    back = paired_difference(second.tolist(), first.tolist(), images)
    assert back.value == -ahead.value
    assert back.interval95 == pytest.approx((-ahead.interval95[1], -ahead.interval95[0]))


def test_strata_may_have_weights() -> None:
    values = [1.0] * 8 + [0.0] * 2
    strata = ["big"] * 8 + ["small"] * 2
    images = [str(n) for n in range(10)]
    found = estimate(values, images, strata=strata, weights={"big": 3, "small": 1})
    assert found.value == 0.75
    assert found.interval95 == (0.75, 0.75)
    assert estimate(values, images, strata=strata, weights={"big": 8, "small": 2}).value == 0.8
    ahead = paired_difference(values, [0.0] * 10, images, strata=strata, weights={"big": 3, "small": 1})
    assert ahead == found
