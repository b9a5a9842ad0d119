"""What makes up a rule that scores an answer in words? Cleaning of both sides, and what agreement is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from vlmx.errors import DataError


@dataclass(frozen=True, kw_only=True)
class TextRule:
    """A pure function `rule(prediction, answers) -> 0..1`.

    Attributes:
        text: the rule in words, for people who read a score.
        clean_prediction: what is compared of a prediction.
        clean_answer: what is compared of an accepted answer.
        worth: from (number of answers that agree with the prediction, number of answers) to 0..1.
        is_readable: whether a prediction says anything that the rule can read; others are counted as invalid.
        one_annotator: whether one answer alone makes sense; a vote needs several.
    """

    text: str
    clean_prediction: Callable[[str], str]
    clean_answer: Callable[[str], str]
    worth: Callable[[int, int], float]
    is_readable: Callable[[str], bool] = lambda text: bool(text.strip())
    one_annotator: bool = True

    def __call__(self, prediction: str, answers: Sequence[str] | str) -> float:
        """Score one answer.

        Args:
            prediction: the answer as the model wrote it.
            answers: what annotators answered, or the accepted answers. One text alone stands for a list of it.

        Raises:
            DataError: the prediction is no text, there is nothing to compare with, something that is no text, or one
                text where the rule is a vote of several.
        """
        if not isinstance(prediction, str):
            raise DataError("this answer cannot be scored", why=f"it is {prediction!r}, not a text")
        cleaned = [self.clean_answer(answer) for answer in self.listed(answers)]
        return self.worth(cleaned.count(self.clean_prediction(prediction)), len(cleaned))

    def listed(self, answers: Sequence[str] | str) -> Sequence[str]:
        """The answers as a list of at least one."""
        if isinstance(answers, str) and self.one_annotator:
            return [answers]
        several = isinstance(answers, Iterable) and not isinstance(answers, str | Mapping)
        listed = list(answers) if several else []
        if not listed or not all(isinstance(answer, str) for answer in listed):
            raise DataError(
                "an answer cannot be scored without those of the annotators",
                why=f"they are {answers!r}, where {self.text} needs a list of texts",
            )
        return listed


@dataclass(frozen=True, kw_only=True)
class OptionRule(TextRule):
    """A rule for questions with a fixed list of answers; it takes the probabilities of these as well as a text.

    Attributes:
        options: the answers that exist, as `clean_answer` leaves them, in the order of the probabilities.
    """

    options: tuple[str, ...]

    def __call__(self, prediction: str | Sequence[float], answers: Sequence[str | int] | str | int) -> float:
        """Score one answer.

        Args:
            prediction: the answer as the model wrote it, or one probability for each of `options`; of equal ones the
                first counts.
            answers: the right option, alone or in a list; numbers may be given as numbers.

        Raises:
            DataError: another number of probabilities than of options, one that is no number, or a right answer that is
                none of the options.
        """
        text = prediction if isinstance(prediction, str) else self.chosen(prediction)
        listed = answers if isinstance(answers, Iterable) and not isinstance(answers, str | Mapping) else [answers]
        right = [str(answer) for answer in listed]
        if not all(self.clean_answer(answer) in self.options for answer in right):
            raise DataError(
                "an answer cannot be scored beside something that is no option",
                why=f"it is {answers!r}; the options are {', '.join(self.options)}",
            )
        return super().__call__(text, right)

    def chosen(self, probabilities: Sequence[float]) -> str:
        """The option with the largest probability; of equal ones the first."""
        try:
            values = [] if isinstance(probabilities, Mapping) else [float(value) for value in probabilities]
        except (TypeError, ValueError):
            values = []
        if len(values) != len(self.options) or not all(math.isfinite(value) for value in values):
            raise DataError(
                "these are not the probabilities of the options",
                why=f"{probabilities!r} do not fit {len(self.options)} options "
                f"({self.options[0]} .. {self.options[-1]})",
            )
        return self.options[values.index(max(values))]


def all_or_nothing(agreeing: int, _total: int) -> float:
    """1.0 if any answer agrees, else 0.0."""
    return float(agreeing > 0)


def leave_one_out_vote(agreeing: int, total: int) -> float:
    """min(1, k / 3), k being how many of the other annotators agree, averaged over leaving out each annotator once.

    In closed form: leaving out one who agrees makes k one less, leaving out another one does not.
    """
    without_one_who_agrees, without_another = min(1.0, (agreeing - 1) / 3), min(1.0, agreeing / 3)
    return (agreeing * without_one_who_agrees + (total - agreeing) * without_another) / total
