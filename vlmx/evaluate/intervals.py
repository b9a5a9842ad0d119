"""How sure is a mean? Bootstrap intervals over images, since questions about one image are not independent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
_CHUNK = 100  # resamples drawn at once: 100 x 40,000 images are 32 MB


def interval95(values: Sequence[float], images: Sequence[str]) -> tuple[float, float]:
    """The 2.5 % and 97.5 % quantiles of the mean under resampling of images.

    Each of 2000 resamples draws as many images as there are, with replacement, and takes all questions of each. The
    generator is
    seeded, so the same values give the same interval.

    Args:
        values: one number per question; at least one.
        images: the image of each question.
    """
    _, image_of = np.unique(np.asarray(images), return_inverse=True)
    sums = np.bincount(image_of, weights=np.asarray(values, dtype=np.float64)).astype(np.float64)
    counts = np.bincount(image_of).astype(np.float64)
    means = _resampled_means(sums, counts)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _resampled_means(sums: npt.NDArray[np.float64], counts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    rng = np.random.default_rng(0)
    chance = np.full(len(sums), 1 / len(sums))
    means = []
    for _ in range(RESAMPLES // _CHUNK):
        draws = rng.multinomial(len(sums), chance, size=_CHUNK)
        means.append((draws @ sums) / (draws @ counts))
    return np.concatenate(means)
