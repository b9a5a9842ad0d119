"""How sure is a mean? Bootstrap intervals over images, since questions about one image are not independent.

Q questions, I images, S strata (mostly one), R resamples.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
_DRAWN_AT_ONCE = 300_000  # images; the numbers gathered for them take a few megabytes

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its bootstrap interval.

    Attributes:
        value: the mean, or the mean of the strata's means.
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
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Mean and interval under resampling of images.

    Each resample draws as many images as there are, with replacement, and takes all questions of each. The generator
    is seeded, so the same values give the same interval.

    Args:
        values: one number per question; at least one.
        images: the image of each question.
        strata: where the score is the unweighted mean over parts of the questions (POPE's splits), the part of each.
            A resample without any question of some part is the mean of the others.
        resamples, seed: of the bootstrap.
    """
    image_Q, image_count = _numbered(images)
    stratum_Q, stratum_count = _numbered(strata) if strata is not None else (np.zeros_like(image_Q), 1)
    cell_Q = stratum_Q * image_count + image_Q
    cells = stratum_count * image_count
    sums = np.bincount(cell_Q, weights=np.asarray(values, dtype=np.float64), minlength=cells)
    counts = np.bincount(cell_Q, minlength=cells)
    sums_SI: Floats = sums.reshape(-1, image_count).astype(np.float64)
    counts_SI: Floats = counts.reshape(-1, image_count).astype(np.float64)
    means_R = _resampled_means(sums_SI, counts_SI, resamples, np.random.default_rng(seed))
    low, high = np.quantile(means_R, (0.025, 0.975))
    return Estimate(
        value=float((sums_SI.sum(axis=1) / counts_SI.sum(axis=1)).mean()),
        interval95=(float(low), float(high)),
        images=image_count,
        resamples=resamples,
    )


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    images: Sequence[str],
    *,
    strata: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """How far `first` is ahead of `second` on the same questions, in the same order; arguments as of `estimate`.

    Both are resampled together: what makes an image hard for both does not widen the interval.
    """
    ahead = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    return estimate(ahead.tolist(), images, strata=strata, resamples=resamples, seed=seed)


def interval95(
    values: Sequence[float], images: Sequence[str], *, strata: Sequence[Hashable] | None = None
) -> tuple[float, float]:
    """Only the interval of `estimate`."""
    return estimate(values, images, strata=strata).interval95


def _numbered(names: Iterable[Hashable]) -> tuple[npt.NDArray[np.int64], int]:
    """For each name a number, 0, 1, ... in the order of first appearance, and how many there are."""
    numbers: dict[Hashable, int] = {}
    numbered = [numbers.setdefault(name, len(numbers)) for name in names]
    return np.asarray(numbered, dtype=np.int64), len(numbers)


def _resampled_means(sums_SI: Floats, counts_SI: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """The mean of the strata's means in each resample of the columns."""
    images = sums_SI.shape[1]
    means: list[Floats] = []
    rows = max(1, _DRAWN_AT_ONCE // images)
    for start in range(0, resamples, rows):
        drawn_RI = rng.integers(images, size=(min(rows, resamples - start), images), dtype=np.int32)
        sums_SR = np.stack([sums_I[drawn_RI].sum(axis=1) for sums_I in sums_SI])
        counts_SR = np.stack([counts_I[drawn_RI].sum(axis=1) for counts_I in counts_SI])
        asked_SR = counts_SR > 0
        means_SR = np.divide(sums_SR, counts_SR, out=np.zeros_like(sums_SR), where=asked_SR)
        means.append(means_SR.sum(axis=0) / asked_SR.sum(axis=0))
    return np.concatenate(means)
