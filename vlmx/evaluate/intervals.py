"""How sure is a mean? Bootstrap intervals over images, since questions about one image are not independent.

Q questions, I images, S strata (mostly one), R resamples, B resamples that are counted together.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vlmx.errors import DataError

RESAMPLES = 2000
_DRAWN_AT_ONCE = 300_000  # images; the numbers gathered for them take a few megabytes

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its bootstrap interval.

    Attributes:
        value: the mean, or the weighted mean of the strata's means.
        interval95: the 2.5 % and 97.5 % quantiles of the resampled means.
        images: number of images that were resampled.
        resamples: how often.
    """

    value: float
    interval95: tuple[float, float]
    images: int
    resamples: int


def estimate(
    values: Sequence[float],
    images: Sequence[str],
    *,
    strata: Sequence[Hashable] | None = None,
    weights: Mapping[Hashable, float] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Mean and interval under resampling of images.

    Each resample draws as many images as there are, with replacement, and takes all questions of each. The generator
    is seeded, so the same values give the same interval.

    Args:
        values: one number per question; at least one.
        images: the image of each question.
        strata: where the score is a mean over parts of the questions (POPE's splits, the benchmarks of an average), the
            part of each. In a resample that has drawn no image of some part, that part keeps its mean over all.
        weights: of each part; without them every part counts the same.
        resamples, seed: of the bootstrap.

    Raises:
        DataError: no values, one that is no number, or not as many images and strata as values.
    """
    lengths = {len(values), len(images), len(values if strata is None else strata)}
    if len(lengths) > 1 or not len(values) or not np.isfinite(values).all():
        raise DataError(
            "no interval of these values",
            why=f"{len(values)} values of {len(images)} images"
            + ("" if strata is None else f" in {len(strata)} parts")
            + "; there must be one at least, as many of each, and each value a number",
        )
    image_Q, image_names = _numbered(images)
    stratum_Q, names = _numbered(strata if strata is not None else [None] * len(images))
    weight_S = np.asarray([1.0 if weights is None else weights[name] for name in names])
    cell_Q = stratum_Q * len(image_names) + image_Q
    cells = len(names) * len(image_names)
    sums = np.bincount(cell_Q, weights=np.asarray(values, dtype=np.float64), minlength=cells)
    counts = np.bincount(cell_Q, minlength=cells)
    sums_SI: Floats = sums.reshape(len(names), -1).astype(np.float64)
    counts_SI: Floats = counts.reshape(len(names), -1).astype(np.float64)
    means_R = _resampled_means(sums_SI, counts_SI, weight_S, resamples, np.random.default_rng(seed))
    low, high = np.quantile(means_R, (0.025, 0.975))
    return Estimate(
        value=float(np.average(sums_SI.sum(axis=1) / counts_SI.sum(axis=1), weights=weight_S)),
        interval95=(float(low), float(high)),
        images=len(image_names),
        resamples=resamples,
    )


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    images: Sequence[str],
    *,
    strata: Sequence[Hashable] | None = None,
    weights: Mapping[Hashable, float] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """How far `first` is ahead of `second` on the same questions, in the same order; arguments as of `estimate`.

    Both are resampled together: what makes an image hard for both does not widen the interval.
    """
    if len(first) != len(second):
        raise DataError(
            "no difference of these values", why=f"{len(first)} values and {len(second)} are not of the same questions"
        )
    ahead = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    return estimate(ahead.tolist(), images, strata=strata, weights=weights, resamples=resamples, seed=seed)


def interval95(
    values: Sequence[float], images: Sequence[str], *, strata: Sequence[Hashable] | None = None
) -> tuple[float, float]:
    """Only the interval of `estimate`."""
    return estimate(values, images, strata=strata).interval95


def _numbered(names: Iterable[Hashable]) -> tuple[npt.NDArray[np.int64], list[Hashable]]:
    """For each name a number, 0, 1, ... in the order of first appearance, and the names in that order."""
    numbers: dict[Hashable, int] = {}
    numbered = [numbers.setdefault(name, len(numbers)) for name in names]
    return np.asarray(numbered, dtype=np.int64), list(numbers)


def _resampled_means(
    sums_SI: Floats, counts_SI: Floats, weight_S: Floats, resamples: int, rng: np.random.Generator
) -> Floats:
    """The weighted mean of the strata's means in each resample of the columns."""
    images = sums_SI.shape[1]
    means_S = sums_SI.sum(axis=1) / counts_SI.sum(axis=1)
    means: list[Floats] = []
    rows = max(1, _DRAWN_AT_ONCE // images)
    for start in range(0, resamples, rows):
        drawn_BI = rng.integers(images, size=(min(rows, resamples - start), images), dtype=np.int32)
        # how often each image was drawn: then strata cost a product of matrices, and not a look-up for each draw
        times_BI: Floats = np.empty(drawn_BI.shape)
        for times_I, drawn_I in zip(times_BI, drawn_BI, strict=True):
            times_I[:] = np.bincount(drawn_I, minlength=images)
        sums_SB, counts_SB = sums_SI @ times_BI.T, counts_SI @ times_BI.T
        means_SB = np.repeat(means_S[:, None], sums_SB.shape[1], axis=1)  # of those parts that were not drawn
        np.divide(sums_SB, counts_SB, out=means_SB, where=counts_SB > 0)
        means.append(weight_S @ means_SB / weight_S.sum())
    return np.concatenate(means)
