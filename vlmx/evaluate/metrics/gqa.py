"""Is a short answer exactly the right one? The GQA rule, and the same with both sides normalised."""

from __future__ import annotations

import string

from vlmx.evaluate.metrics.rule import TextRule, all_or_nothing

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _plain(text: str) -> str:
    return text.translate(_NO_PUNCTUATION).lower()


def _plain_and_stripped(text: str) -> str:
    return _plain(text).strip()


def _as_it_stands(text: str) -> str:
    return text


# The reference evaluation normalises only the prediction, and leaves its spaces alone; GQA's own answers are lower
# case without punctuation.
GQA = TextRule(
    text="exact match by the GQA rule (prediction in lower case and without ASCII punctuation)",
    clean_prediction=_plain,
    clean_answer=_as_it_stands,
    worth=all_or_nothing,
)
EXACT = TextRule(
    text="exact match, both sides in lower case and without punctuation (the GQA normalisation)",
    clean_prediction=_plain_and_stripped,
    clean_answer=_plain_and_stripped,
    worth=all_or_nothing,
)
