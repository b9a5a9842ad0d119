"""Which conversations is a model trained on? The mini study, or a LLaVA-style JSON or JSONL file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmx.data.mini import study
from vlmx.data.records import Conversation, Turn
from vlmx.errors import DataError
from vlmx.registry import Registry, unknown_name

SHOWN = 5
_ROLES = ("human", "gpt")


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Conversations under a name.

    Attributes:
        name: also the default name of the image table in which its images are looked up.
        conversations: in the file's order.
        notes: what was left out and why, one line a kind; for the user.
    """

    name: str
    conversations: tuple[Conversation, ...]
    notes: tuple[str, ...] = ()


MIXTURES: Registry[Callable[[], list[Conversation]]] = Registry("mixture", group="vlmx.mixtures")
MIXTURES.add("mini", study.conversations)


def load_mixture(data: str) -> Mixture:
    """Load training data.

    Args:
        data: a registered name ("mini"), or the path of a LLaVA-style `.json` (one list) or `.jsonl` (one object a
            line) whose rows are {"id", "image" (optional), "conversations": [{"from": "human" | "gpt", "value"}, ...]}.

    Raises:
        UnknownNameError: neither a registered name nor a file.
        DataError: rows break the schema; says how many and shows the first few.
    """
    if data in MIXTURES.names():
        return Mixture(name=data, conversations=tuple(MIXTURES.get(data)()))
    path = Path(data)
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        error = unknown_name("training data", data, MIXTURES.names())
        error.fix += "; or give the path of a LLaVA-style .json or .jsonl file"
        raise error
    return read_llava(path)


def read_llava(path: Path) -> Mixture:
    """Read and check a LLaVA-style file.

    The literal `<image>` is removed from messages and they are stripped. A last message of the user that nobody answers
    is left out and counted. Ids that occur again get "#2", "#3", ... so that each is unique.

    Raises:
        DataError: the file is not JSON, or rows break the schema.
    """
    conversations: list[Conversation] = []
    problems: list[str] = []
    times_seen: dict[str, int] = {}
    unanswered = 0
    for number, row in _rows(path):
        problem = _problem(row)
        if problem:
            problems.append(f"row {number}: {problem}")
            continue
        messages = [message["value"].replace("<image>", "").strip() for message in row["conversations"]]
        unanswered += len(messages) % 2
        turns = tuple(Turn(question=q, answer=a) for q, a in zip(messages[::2], messages[1::2], strict=False))
        name = str(row.get("id", number))
        times_seen[name] = times_seen.get(name, 0) + 1
        unique = name if times_seen[name] == 1 else f"{name}#{times_seen[name]}"
        conversations.append(Conversation(id=unique, image=row.get("image"), turns=turns))
    if problems:
        raise DataError(
            f"{len(problems)} of {len(problems) + len(conversations)} rows of {path} are not LLaVA conversations",
            why="; ".join(problems[:SHOWN]) + ("; ..." if len(problems) > SHOWN else ""),
            fix="correct these rows or take them out",
        )
    if not conversations:
        raise DataError(f"{path} has no conversations", fix="give a file with at least one")
    notes = (f"{unanswered} conversations end with an unanswered message, which is left out",) if unanswered else ()
    return Mixture(name=path.stem, conversations=tuple(conversations), notes=notes)


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(row number from 1, value) of each row."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = json.loads(text)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read", why=str(error), fix="give a UTF-8 JSON list, or JSON lines in a .jsonl"
        ) from error
    if not isinstance(rows, list):
        raise DataError(f"{path} is not a list of conversations", why=f"it holds a {type(rows).__name__}")
    return enumerate(rows, start=1)


def _problem(row: Any) -> str:
    """What is wrong with a row; empty if nothing is."""
    if not isinstance(row, dict):
        return "not an object"
    image, messages = row.get("image"), row.get("conversations")
    if image is not None and not isinstance(image, str):
        return "image is not a text"
    if not isinstance(messages, list) or len(messages) < 2:
        return "conversations is not a list of two or more messages"
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            return f"message {index + 1} has no text in value"
        if message.get("from") != _ROLES[index % 2]:
            return f"message {index + 1} is from {message.get('from')!r}, expected {_ROLES[index % 2]!r}"
    return ""
