"""How do the official scripts compare a free answer with ten human ones? VQA-v2, VizWiz and TextVQA.

All three vote softly: an answer is worth min(1, k / 3), k being how many of the *other* annotators gave it, averaged
over leaving out each annotator once. They differ in what is cleaned before comparing:

| | prediction | annotators' answers |
| --- | --- | --- |
| VQA-v2 | punctuation, case, articles, numbers, contractions | punctuation only |
| VizWiz | the same, but most contractions are written with a backtick | as they stand |
| TextVQA | the same after lower case, without commas and question marks, "'s" set apart | cleaned like the prediction |

The rules are those of the evaluation that the paper used (TRI-ML/vlm-evaluation, which follows the scripts of the
benchmarks' authors), oddities included: see `_DROPPED_PERIODS` and `_BACKTICK_EXCEPTIONS`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from vlmx.evaluate.metrics.rule import TextRule, leave_one_out_vote

_MARKS = frozenset(';/[]"{}()=+\\_-><@`,?!')
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS: Mapping[str, str] = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBER_WORDS)}
_ARTICLES = frozenset({"a", "an", "the"})
_PERIOD = re.compile(r"\.(?!\d)")
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
# The reference hands a regex flag (re.UNICODE, which is 32) to the argument `count`, so only the first 32 periods go.
_DROPPED_PERIODS = 32
_KEPT = 1 << 15  # cleaned texts that are remembered: annotators repeat themselves

# Right spellings; each is also what its variants with one apostrophe forgotten are turned into.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
    we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
    who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've
    you'll you're you've
"""
_BACKTICK_EXCEPTIONS = frozenset({"ain't", "aren't", "can't", "could've", "couldn't", "we've", "where's", "who've"})


def _one_apostrophe_short(word: str) -> list[str]:
    return [word[:at] + word[at + 1 :] for at, letter in enumerate(word) if letter == "'"]


_WITH_APOSTROPHE = {wrong: right for right in _CONTRACTIONS.split() for wrong in _one_apostrophe_short(right)}
_WITH_APOSTROPHE["somebody'd"] = "somebodyd"  # the reference's table has this one the wrong way round

# VizWiz's table expects backticks in the misspelling too, but punctuation has been removed by then: what is left are
# words without any mark, and two entries whose misspelling has a true apostrophe.
_WITH_BACKTICK = {
    wrong: right if right in _BACKTICK_EXCEPTIONS else right.replace("'", "`")
    for wrong, right in _WITH_APOSTROPHE.items()
    if "'" not in wrong
} | {"couldn'tve": "couldn`t`ve", "hadn'tve": "hadn`t`ve"}


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=_KEPT)
def _clean_marks(text: str) -> str:
    """Drop marks that touch a space somewhere, or all marks if there is a number like 1,000; others become spaces."""
    has_long_number = _DIGIT_COMMA_DIGIT.search(text) is not None
    table = {
        ord(mark): "" if has_long_number or f"{mark} " in text or f" {mark}" in text else " "
        for mark in _MARKS.intersection(text)
    }
    return _PERIOD.sub("", text.translate(table), count=_DROPPED_PERIODS)


def _clean_words(text: str, contractions: Mapping[str, str]) -> str:
    words = [DIGITS.get(word, word) for word in text.lower().split() if word not in _ARTICLES]
    return " ".join(contractions.get(word, word) for word in words)


@lru_cache(maxsize=_KEPT)
def _clean_vqav2(text: str) -> str:
    return _clean_words(_clean_marks(_one_line(text)), _WITH_APOSTROPHE)


@lru_cache(maxsize=_KEPT)
def _clean_vizwiz(text: str) -> str:
    return _clean_words(_clean_marks(_one_line(text)), _WITH_BACKTICK)


@lru_cache(maxsize=_KEPT)
def _clean_textvqa(text: str) -> str:
    lowered = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _clean_vqav2(lowered)


def _as_it_stands(text: str) -> str:
    return text


def says_unanswerable(prediction: str) -> bool:
    """Whether VizWiz's script takes a prediction as "this cannot be answered"."""
    return _clean_vizwiz(prediction) == "unanswerable"


VQAV2 = TextRule(
    text="VQA-v2 accuracy (soft vote of ten annotators)",
    clean_prediction=_clean_vqav2,
    clean_answer=_clean_marks,
    worth=leave_one_out_vote,
    one_annotator=False,
)
VIZWIZ = TextRule(
    text="VizWiz accuracy (soft vote of ten annotators)",
    clean_prediction=_clean_vizwiz,
    clean_answer=_as_it_stands,
    worth=leave_one_out_vote,
    one_annotator=False,
)
TEXTVQA = TextRule(
    text="TextVQA soft accuracy",
    clean_prediction=_clean_textvqa,
    clean_answer=_clean_textvqa,
    worth=leave_one_out_vote,
    one_annotator=False,
)
