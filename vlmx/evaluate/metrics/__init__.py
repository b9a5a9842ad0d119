"""Which rule turns an answer into a score? Names of the text rules; boxes have their own module.

Every rule is a pure function `(prediction, answers) -> 0..1`. A benchmark whose name is that of a rule is scored by
it, and every other one, the mini study's groups included, by "exact".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vlmx.evaluate.metrics import gqa, vqa

TextScorer = Callable[[str, Sequence[str]], float]

SCORERS: dict[str, TextScorer] = {
    "vqav2": vqa.vqav2,
    "vizwiz": vqa.vizwiz,
    "textvqa": vqa.textvqa,
    "textvqa_ocr": vqa.textvqa,
    "gqa": gqa.gqa,
    "exact": gqa.exact,
}
RULE_TEXT: dict[str, str] = {
    "vqav2": "VQA-v2 accuracy (soft vote of ten annotators)",
    "vizwiz": "VizWiz accuracy (soft vote of ten annotators)",
    "textvqa": "TextVQA soft accuracy",
    "textvqa_ocr": "TextVQA soft accuracy",
    "gqa": "exact match by the GQA rule",
    "exact": "exact match, both sides in lower case and without punctuation (the GQA normalisation)",
}


def rule_of(benchmark: str) -> str:
    """The name of the text rule that scores `benchmark`."""
    return benchmark if benchmark in SCORERS else "exact"
