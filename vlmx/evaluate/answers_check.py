"""Do answers belong to the questions that they are scored with? Those that do not are named by file and line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from vlmx.data.records import Question
from vlmx.errors import RunError
from vlmx.evaluate.answers import Answer, Header, asked_again
from vlmx.evaluate.groups import questions_sha256

_LISTED = 3


def check_answers(header: Header, answers: Sequence[Answer], questions: Sequence[Question]) -> None:
    """Make sure that answers were given to these questions, each once.

    Args:
        header, answers: as read from an answers.jsonl.
        questions: all questions of the benchmark.

    Raises:
        RunError: the questions are not those that were asked, an answer's question is not among them, or a question is
            answered twice.
    """
    if header.questions_sha256 and header.questions_sha256 != questions_sha256(questions):
        raise RunError(
            f"the annotations of '{header.benchmark}' are not the ones that its answers were made for",
            why="ids, prompts or right answers are others; scores of the two would not be comparable",
            fix=f"give --data-root the folder of the files that were asked{_known_root(header)}, or have the others "
            "answered, too, with `vlmx eval`, which keeps the old answers",
        )
    asked = {question.id: question for question in questions}
    strangers = [answer for answer in answers if answer.id not in asked]
    if strangers:
        raise RunError(
            f"{len(strangers):,} answers belong to no question of '{header.benchmark}'",
            why=f"{listed(strangers)}; they belong to another benchmark or split, or it has changed since",
            fix=_fix_of_lines(header),
        )
    by_id = {answer.id: answer for answer in answers}
    if len(by_id) < len(answers):
        times = Counter(answer.id for answer in answers)
        raise RunError(
            f"{sum(count > 1 for count in times.values()):,} questions of '{header.benchmark}' are answered more than "
            "once",
            why=f"{listed([a for a in answers if times[a.id] > 1])}; which answer is meant cannot be known",
            fix=delete_lines(header),
        )
    changed = [
        answer
        for answer in answers
        # under the control each question is shown another image
        if answer.prompt != asked[answer.id].prompt
        or (header.control == "none" and answer.image != asked[answer.id].image)
    ]
    if changed:
        raise RunError(
            f"{len(changed):,} answers to '{header.benchmark}' were given to other questions than the annotations have",
            why=f"{listed(changed)}; prompt or image is another one in the answers",
            fix=_fix_of_lines(header),
        )


def delete_lines(header: Header) -> str:
    """What to do about answers that cannot be used."""
    return f"delete these lines, and {asked_again(header.control)}"


def listed(answers: Sequence[Answer]) -> str:
    """Where the first of some answers stand, and how many more there are."""
    more = f" and {len(answers) - _LISTED:,} more" if len(answers) > _LISTED else ""
    return "; ".join(answer.named for answer in answers[:_LISTED]) + more


def _known_root(header: Header) -> str:
    return f" (they were in {header.data_root})" if header.data_root else ""


def _fix_of_lines(header: Header) -> str:
    """What to do about single answers; without a digest of the questions all may have been made for other files."""
    other_files = f"if they were made for other files, give --data-root their folder{_known_root(header)}; else "
    return ("" if header.questions_sha256 else other_files) + delete_lines(header)
