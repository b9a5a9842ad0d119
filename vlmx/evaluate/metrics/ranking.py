"""How well do probabilities separate right options from wrong ones? Areas under ROC and precision-recall curves.

Q questions, C classes. Equal scores share a threshold. The definitions are those that the paper's evaluation uses
through scikit-learn (`roc_auc_score`, `average_precision_score`, `f1_score`); with several classes, only those take
part that occur as a right answer.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


def area_under_roc(scores_Q: Floats, positive_Q: Bools) -> float | None:
    """Chance that a positive scores above a negative, ties counting half; None without one of the two."""
    positives = int(positive_Q.sum())
    negatives = len(positive_Q) - positives
    if not positives or not negatives:
        return None
    _, level_Q, count = np.unique(scores_Q, return_inverse=True, return_counts=True)
    middle_rank = np.cumsum(count) - (count - 1) / 2
    above = middle_rank[level_Q][positive_Q].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def average_precision(scores_Q: Floats, positive_Q: Bools) -> float | None:
    """Precision at each threshold, weighted by the recall that it adds; None without a positive."""
    positives = int(positive_Q.sum())
    if not positives:
        return None
    _, level_Q = np.unique(-scores_Q, return_inverse=True)
    found = np.cumsum(np.bincount(level_Q, weights=positive_Q))
    taken = np.cumsum(np.bincount(level_Q))
    gained = np.diff(found, prepend=0.0)
    return float((gained * found / taken).sum() / positives)


def one_vs_one_roc(scores_QC: Floats, truth_Q: Ints) -> float | None:
    """Mean over all pairs of classes of how well each of the two is told from the other (Hand and Till 2001).

    Args:
        scores_QC: probability of each class.
        truth_Q: right class, 0 to C - 1.

    Returns:
        0..1; None if fewer than two classes occur.
    """
    areas = []
    for one, other in combinations(np.unique(truth_Q), 2):
        pair = (truth_Q == one) | (truth_Q == other)
        for named in (one, other):
            areas.append(area_under_roc(scores_QC[pair, named], truth_Q[pair] == named))
    known = [area for area in areas if area is not None]
    return sum(known) / len(known) if known else None


def one_vs_rest_average_precision(scores_QC: Floats, truth_Q: Ints) -> float:
    """Mean over the classes that occur of the average precision of finding each among all questions."""
    found = [average_precision(scores_QC[:, named], truth_Q == named) for named in np.unique(truth_Q)]
    return float(np.mean([value for value in found if value is not None]))


def precision_recall_f1(said_Q: Bools, positive_Q: Bools) -> tuple[float, float, float]:
    """Precision, recall and F1 of a yes-or-no answer, each 0..1, and 0 where it would be 0 / 0."""
    hits, said, positives = int((said_Q & positive_Q).sum()), int(said_Q.sum()), int(positive_Q.sum())
    precision = hits / said if said else 0.0
    recall = hits / positives if positives else 0.0
    return precision, recall, 2 * hits / (said + positives) if said + positives else 0.0
