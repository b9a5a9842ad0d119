"""Is a short answer exactly the right one? The GQA rule, and the same with both sides normalised."""

from __future__ import annotations

import string
from collections.abc import Sequence

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, ASCII punctuation removed, outer spaces removed."""
    return text.translate(_NO_PUNCTUATION).lower().strip()


def gqa(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the normalised prediction is one of `answers` as they stand, else 0.0.

    The reference evaluation normalises only the prediction; GQA's own answers are lower case without punctuation.
    """
    return float(normalise(prediction) in answers)


def exact(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction is one of `answers` after both were normalised as GQA does it, else 0.0."""
    return float(normalise(prediction) in {normalise(answer) for answer in answers})
