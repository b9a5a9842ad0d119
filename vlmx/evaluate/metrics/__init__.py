"""Which rule turns an answer into a score? The official ones by name, as pure functions.

from vlmx.evaluate.metrics import SCORERS
SCORERS["vqav2"]("two", ["2", "2", "2", "3", ...])       0..1, soft vote of the annotators
SCORERS["gqa"]("Blue.", "blue")                          0.0 or 1.0
SCORERS["pope"]("No, there is none.", "no")              0.0 or 1.0
SCORERS["pope"]([0.7, 0.3], "yes")                       from the probabilities of yes and no
SCORERS["tallyqa"]([0.1, 0.8, ...], 1)                   from those of the options A to P, which are 0 to 15
SCORERS["refcoco"]("[0.1, 0.2, 0.5, 0.6]", [0.1, 0.2, 0.5, 0.6])    IoU >= 0.5, ocid_ref: 0.25
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vlmx.evaluate.metrics import boxes, gqa, options, vqa
from vlmx.evaluate.metrics.rule import TextRule

TEXT_RULES: Mapping[str, TextRule] = {
    "vqav2": vqa.VQAV2,
    "vizwiz": vqa.VIZWIZ,
    "textvqa": vqa.TEXTVQA,
    "textvqa_ocr": vqa.TEXTVQA,
    "gqa": gqa.GQA,
    "pope": options.POPE,
    "tallyqa": options.TALLYQA,
    "exact": gqa.EXACT,
}
SCORERS: Mapping[str, Callable[..., float]] = {**TEXT_RULES, **boxes.BOX_HITS}

# Benchmarks whose score is the mean of their splits (question types) however many questions each has.
MEAN_OF_TYPES = frozenset({"pope"})


def rule_of(benchmark: str) -> TextRule:
    """The rule that scores the text questions of `benchmark`: its own, or "exact" as for the mini study."""
    return TEXT_RULES.get(benchmark, gqa.EXACT)
