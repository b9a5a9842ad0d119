"""What do the official scripts report beside a benchmark's score? Parts, areas under curves, overlaps; all in percent.

Everything is a flat mapping from a name to a number. A part of a benchmark (`Question.question_type`) is named as it
is, a figure of that part "PART_FIGURE", a figure of all questions "all_FIGURE". What is not defined, such as an area
under a curve where every right answer is the same, is left out.

| benchmark | parts | figures |
| --- | --- | --- |
| pope | random, popular, adversarial | accuracy, precision, recall, f1, yes_ratio; auc_roc and auc_pr of P(yes) |
| tallyqa | simple, complex | accuracy; auc_roc (one against one) and auc_pr (one against the rest), mean over counts |
| vizwiz | answerable, unanswerable | unanswerable_average_precision, unanswerable_f1 |
| boxes | e.g. OCID-Ref's clutter | CORRECTED or RAW: iou50, iou25, mean_iou |
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from vlmx.evaluate.metrics.boxes import COMPARISONS, Comparison
from vlmx.evaluate.metrics.options import COUNTS, YES
from vlmx.evaluate.metrics.ranking import (
    Bools,
    Floats,
    Ints,
    area_under_roc,
    average_precision,
    one_vs_one_roc,
    one_vs_rest_average_precision,
    precision_recall_f1,
)
from vlmx.evaluate.metrics.vqa import says_unanswerable

ALL = "all"
UNANSWERABLE = "unanswerable"
Probabilities = Sequence[Sequence[float]]


def parts(types: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    """Mean value of each question type, sorted by name."""
    found: dict[str, list[float]] = defaultdict(list)
    for name, value in zip(types, values, strict=True):
        found[name].append(value)
    return {name: 100 * sum(members) / len(members) for name, members in sorted(found.items())}


def pope(
    types: Sequence[str], said: Sequence[str], truths: Sequence[str], probabilities: Probabilities | None
) -> dict[str, float]:
    """Figures of each split and of all questions; "yes" is the positive class, as in POPE's script.

    Args:
        types: the split of each question.
        said: "yes" or "no", as the answer was read.
        truths: "yes" or "no".
        probabilities: of (yes, no) for each question, for the areas under curves.
    """
    says_yes = np.array([each == YES for each in said])
    is_yes = np.array([each == YES for each in truths])
    scores = None if probabilities is None else np.array([each[0] for each in probabilities], dtype=np.float64)
    found: dict[str, float | None] = {}
    for name, chosen in _split(types).items():
        said_here, truth_here = says_yes[chosen], is_yes[chosen]
        precision, recall, f1 = precision_recall_f1(said_here, truth_here)
        found |= {
            f"{name}_accuracy": float((said_here == truth_here).mean()),
            f"{name}_precision": precision,
            f"{name}_recall": recall,
            f"{name}_f1": f1,
            f"{name}_yes_ratio": float(said_here.mean()),
        }
        if scores is not None:
            found[f"{name}_auc_roc"] = area_under_roc(scores[chosen], truth_here)
            found[f"{name}_auc_pr"] = average_precision(scores[chosen], truth_here)
    return _percent(found)


def tallyqa(
    types: Sequence[str], right: Sequence[bool], truths: Sequence[str], probabilities: Probabilities | None
) -> dict[str, float]:
    """Figures of simple, complex and all questions.

    Args:
        types: "simple" or "complex".
        right: whether the count is right.
        truths: "0" to "15".
        probabilities: of the counts 0 to 15 for each question, for the areas under curves.
    """
    hits = np.array(right, dtype=np.float64)
    counts: Ints = np.array([COUNTS.index(each) for each in truths], dtype=np.int64)
    scores: Floats | None = None if probabilities is None else np.array(probabilities, dtype=np.float64)
    found: dict[str, float | None] = {}
    for name, chosen in _split(types).items():
        found[f"{name}_accuracy"] = float(hits[chosen].mean())
        if scores is not None:
            found[f"{name}_auc_roc"] = one_vs_one_roc(scores[chosen], counts[chosen])
            found[f"{name}_auc_pr"] = one_vs_rest_average_precision(scores[chosen], counts[chosen])
    return _percent(found)


def vizwiz(types: Sequence[str], texts: Sequence[str]) -> dict[str, float]:
    """How well answers tell that a question cannot be answered, by what they say: "unanswerable" or not.

    Args:
        types: "answerable" or "unanswerable", VizWiz's own label.
        texts: the answers as the model wrote them.
    """
    says_so = np.array([says_unanswerable(text) for text in texts])
    is_so = np.array([each == UNANSWERABLE for each in types])
    return _percent(
        {
            "unanswerable_average_precision": average_precision(says_so.astype(np.float64), is_so),
            "unanswerable_f1": precision_recall_f1(says_so, is_so)[2],
        }
    )


def boxes(overlaps: Sequence[Mapping[Comparison, float]]) -> dict[str, float]:
    """Rates at IoU 0.5 and 0.25, and mean IoU, by both comparisons; an answer that is no box has overlap 0."""
    found: dict[str, float | None] = {}
    for comparison in COMPARISONS:
        values = np.array([each[comparison] for each in overlaps])
        found[f"{comparison}_iou50"] = float((values >= 0.5).mean())
        found[f"{comparison}_iou25"] = float((values >= 0.25).mean())
        found[f"{comparison}_mean_iou"] = float(values.mean())
    return _percent(found)


def _split(types: Sequence[str]) -> dict[str, Bools]:
    kinds = np.array(types)
    return {**{name: kinds == name for name in sorted(set(types))}, ALL: np.ones(len(types), dtype=np.bool_)}


def _percent(found: Mapping[str, float | None]) -> dict[str, float]:
    return {name: 100 * value for name, value in found.items() if value is not None}
