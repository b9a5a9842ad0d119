"""What exactly is the user's message of a question? The wordings of the paper's evaluation, and of the training data.

They are those of TRI-ML/vlm-evaluation at d9f5896. Where its wording of a question differs from that of the data which
the models were trained on, "default" is as in training, and "paper" is the evaluation's: phrases to locate are in
double quotes there, without a period after them.
"""

from __future__ import annotations

from typing import Literal

Wording = Literal["default", "paper"]

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
BOX_REQUEST = "Please provide the bounding box coordinate of the region this sentence describes:"

LETTERS = tuple("ABCDEFGHIJKLMNOP")
COUNTS = tuple(str(count) for count in range(len(LETTERS)))
_COUNT_OPTIONS = "".join(f"\n{letter}. {count}" for letter, count in zip(LETTERS, COUNTS, strict=True))
_OCR_MARK = "\nReference OCR token:"


def short_answer(question: str) -> str:
    """For VQA-v2, GQA, POPE and TextVQA."""
    return question + SHORT_ANSWER


def short_or_unanswerable(question: str) -> str:
    """For VizWiz."""
    return question + "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT_ANSWER


def without_ocr(question: str) -> str:
    """A question of LLaVA's TextVQA list without the text that was read in the image."""
    return question.partition(_OCR_MARK)[0]


def count_as_option(question: str) -> str:
    """For TallyQA: the counts 0 to 15 are the options A to P."""
    return f"{question}{_COUNT_OPTIONS}\nAnswer with the option's letter from the given choices directly."


def region(phrase: str, wording: Wording) -> str:
    """For RefCOCO, RefCOCO+, RefCOCOg and OCID-Ref. In training, a period follows the phrase, and only one."""
    if wording == "paper":
        return f'{BOX_REQUEST} "{phrase}"'
    return f"{BOX_REQUEST} {phrase.removesuffix('.')}."
