"""What an annotation is: a conversation to train on, a question to answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Box = tuple[float, float, float, float]  # x1, y1, x2, y2; the frame is named beside it


@dataclass(frozen=True, kw_only=True, slots=True)  # a mixture has millions of them
class Turn:
    """One exchange: the user's message and the answer to learn."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """One training example.

    Attributes:
        id: unique within its mixture.
        image: key of the image in the data set's image table; None for text only.
        turns: the exchanges, in order.
    """

    id: str
    image: str | None
    turns: tuple[Turn, ...]


@dataclass(frozen=True, kw_only=True, slots=True)  # VQA-v2 has 214,354 of them
class Question:
    """One question of a benchmark.

    Attributes:
        id: unique within its benchmark, the same on every machine.
        benchmark: e.g. "mini-count".
        image: key of the image in the data set's image table.
        prompt: the user's message.
        kind: "text" is scored against `answers`, "box" against `box`.
        question_type: the class within which the answer prior is taken, e.g. "what color".
        answers: accepted answers of a text question.
        box: true box of a box question, x1 y1 x2 y2 in pixels of the source image.
        image_wh: width and height of the source image in pixels; box questions always have it.
        options: what the model may say, where the probabilities of the first token are asked for instead of a text, in
            the order of the benchmark's rule: ("Yes", "No") for POPE, ("A", ..., "P") for TallyQA.
        object_boxes: all true objects of the image, the target included, in the same frame as `box`:
            what an answer "some object" is drawn from.
    """

    id: str
    benchmark: str
    image: str
    prompt: str
    kind: Literal["text", "box"]
    question_type: str
    answers: tuple[str, ...] = ()
    box: Box | None = None
    image_wh: tuple[int, int] | None = None
    options: tuple[str, ...] = ()
    object_boxes: tuple[Box, ...] = ()

    @property
    def region(self) -> tuple[Box, tuple[int, int]]:
        """What a box question is scored with: its true box and the size of its image."""
        assert self.box is not None
        assert self.image_wh is not None
        return self.box, self.image_wh
