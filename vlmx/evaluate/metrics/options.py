"""Which of a few options was chosen? POPE (yes or no) and TallyQA (0 to 15, asked as letters A to P).

The paper's evaluation takes the option with the largest probability of the first token. Where there is only a text,
POPE is read as the script of its authors does it (AoiDragon/POPE, evaluate.py): the first sentence without commas
means no if one of its words is "No", "no" or "not", and yes otherwise, whatever else it says. TallyQA has no script for
texts; `read_count` says what is taken.
"""

from __future__ import annotations

import re

from vlmx.evaluate.metrics.rule import OptionRule, all_or_nothing
from vlmx.evaluate.metrics.vqa import DIGITS

YES, NO = "yes", "no"
_SAYS_NO = frozenset({"No", "no", "not"})
_YES_OR_NO = re.compile(r"\b(yes|no|not)\b", re.IGNORECASE)

COUNTS = tuple(str(count) for count in range(16))
_LETTERS = "ABCDEFGHIJKLMNOP"
# "C", "(C)", "C.", "C. 2", "C: two dogs"; a letter that goes on without a mark is a word ("A dog").
_LETTER_FIRST = re.compile(rf"\(?([{_LETTERS}])(?:[).:,].*)?", re.DOTALL)


def read_yes_no(text: str) -> str:
    """What POPE's own script takes a text for, "yes" or "no"."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return YES if _SAYS_NO.isdisjoint(words) else NO


def read_count(text: str) -> str:
    """The count that a text names, "0" to "15"; empty if it names none of these.

    An option's letter, in capitals with or without what follows it ("C", "(C)", "C. 2"), in small letters alone ("c");
    or the count itself in digits or words ("2", "two.").
    """
    stripped = text.strip()
    letter = _LETTER_FIRST.fullmatch(stripped if len(stripped) > 1 else stripped.upper())
    if letter is not None:
        return COUNTS[_LETTERS.index(letter[1])]
    word = stripped.rstrip(".").lower()
    count = DIGITS.get(word, word)
    return count if count in COUNTS else ""


def _plain(text: str) -> str:
    return text.strip().lower()


POPE = OptionRule(
    text="yes or no as POPE asks it, mean of its splits",
    clean_prediction=read_yes_no,
    clean_answer=_plain,
    worth=all_or_nothing,
    is_readable=lambda text: _YES_OR_NO.search(text) is not None,
    options=(YES, NO),
)
TALLYQA = OptionRule(
    text="exact count, 0 to 15",
    clean_prediction=read_count,
    clean_answer=_plain,
    worth=all_or_nothing,
    is_readable=lambda text: read_count(text) != "",
    options=COUNTS,
)
