"""Which questions of a benchmark are asked, and which of them together?

Both follow from the questions, the subset and the batch size alone, not from how many processes work or what is
answered already: so every history ends with the same answers.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vlmx.data.records import Question
from vlmx.errors import DataError

SLIM = 1024  # questions of each part, as in the reference's slim variants
# Whose parts (question types) the reference makes slim one by one; the others are one part.
_IN_PARTS = frozenset({"pope", "tallyqa", "ocid_ref"})

TOKENS_TOGETHER = 65_536  # positions that a default batch has keys and values for, about 32 GB for 7B LLMs in bfloat16
ROWS_TOGETHER = 64
_TEXT = 192  # positions of a prompt's text and an answer; for the default batch size alone


@dataclass(frozen=True, kw_only=True)
class Group:
    """Questions that are answered together.

    Attributes:
        number: from 0.
        questions: those of an image stand together.
        images: key of the image that each is shown.
    """

    number: int
    questions: tuple[Question, ...]
    images: tuple[str, ...]


def default_batch_size(visual_tokens: int) -> int:
    """How many questions are answered together unless somebody says otherwise: fewer where an image is long."""
    return max(1, min(ROWS_TOGETHER, TOKENS_TOGETHER // (visual_tokens + _TEXT)))


def subset(questions: Sequence[Question], limit: int | None, *, slim: bool = False) -> list[Question]:
    """The questions that are asked, in the benchmark's order; the same on every machine.

    Those with the smallest SHA-256 of their ids are taken, so that a subset does not follow the benchmark's order, and
    a larger one contains the smaller ones.

    Args:
        questions: all of a benchmark.
        limit: how many; None for all.
        slim: 1,024, or 1,024 of each part for benchmarks whose parts are scored apart; `limit` is None then.
    """
    assert not (slim and limit is not None)
    if not slim:
        return _few(questions, limit)
    parts: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        parts[question.question_type if question.benchmark in _IN_PARTS else ""].append(question)
    chosen = {question.id for part in parts.values() for question in _few(part, SLIM)}
    return [question for question in questions if question.id in chosen]


def _few(questions: Sequence[Question], limit: int | None) -> list[Question]:
    if limit is None or limit >= len(questions):
        return list(questions)
    chosen = {q.id for q in sorted(questions, key=lambda q: _digest(q.id))[:limit]}
    return [q for q in questions if q.id in chosen]


def groups_of(questions: Sequence[Question], batch_size: int, *, shuffled: Sequence[Question] = ()) -> list[Group]:
    """Groups of at most `batch_size` questions: those of an image together, prompts of like length together.

    Args:
        questions: those that are asked.
        batch_size: at most so many in a group.
        shuffled: all questions of the benchmark, where each is shown another image; see `shuffled_images`.
    """
    other_image = shuffled_images(shuffled) if shuffled else {}
    of_image: dict[tuple[str, bool], list[Question]] = defaultdict(list)
    for question in questions:
        of_image[question.image, bool(question.options)].append(question)

    def length(members: Sequence[Question]) -> int:
        return max(len(question.prompt) for question in members)

    # Sorting is stable: images whose longest prompts are alike stay in the benchmark's order.
    rows: list[list[Question]] = []
    for members in sorted(of_image.values(), key=lambda members: (bool(members[0].options), length(members))):
        for start in range(0, len(members), batch_size):
            some = members[start : start + batch_size]
            fits = rows and len(rows[-1]) + len(some) <= batch_size
            if fits and bool(rows[-1][0].options) == bool(some[0].options):
                rows[-1] += some
            else:
                rows.append(some)
    return [
        Group(number=number, questions=tuple(row), images=tuple(other_image.get(q.image, q.image) for q in row))
        for number, row in enumerate(rows)
    ]


def shuffled_images(questions: Iterable[Question]) -> dict[str, str]:
    """For each image of a benchmark another one of it: a fixed permutation that leaves none in its place.

    Args:
        questions: all questions of the benchmark, not a subset, so that a subset gets the same images as the whole.

    Raises:
        DataError: the benchmark has fewer than two images.
    """
    images = sorted({q.image for q in questions}, key=_digest)
    if len(images) < 2:
        raise DataError(
            "the control with shuffled images is not possible",
            why=f"the benchmark has {len(images)} image{'' if len(images) == 1 else 's'}",
        )
    return dict(zip(images, [*images[1:], images[0]], strict=True))


def questions_sha256(questions: Iterable[Question]) -> str:
    """SHA-256 of what is asked and of what is right: ids, images, prompts and annotations, in their order."""
    digest = hashlib.sha256()
    for q in questions:
        said = (q.id, q.image, q.prompt, q.kind, q.question_type, q.answers, q.box, q.image_wh, q.options)
        digest.update(json.dumps(said).encode() + b"\n")
    return digest.hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
