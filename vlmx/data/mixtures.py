"""Which conversations is a model trained on? The mini study, or a LLaVA-style JSON, JSONL or parquet file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from vlmx.cache_specs.ids import table_name
from vlmx.data.annotation_files import without_collector
from vlmx.data.llava665k import check_mixture
from vlmx.data.mini import study
from vlmx.data.records import Conversation, Turn
from vlmx.errors import BackendError, DataError
from vlmx.registry import Registry, unknown_name

SHOWN = 5
SUFFIXES = (".json", ".jsonl", ".parquet")
IMAGE_MARK = "<image>"
_ROLES = ("human", "gpt")
_OTHER_MEDIA = ("images", "video", "videos")  # what other projects' lists name beside or instead of one image
_CHUNK_CHARS = 1 << 20
_BATCH_ROWS = 1024
_MEMO_CHARS = 16  # answers up to this length occur again and again: one copy of each is kept
_BLANK = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Conversations under a name.

    Attributes:
        name: also the default name of the image table in which its images are looked up.
        conversations: in the file's order.
        notes: what was left out and why, and what is known of this data, one line a kind; for the user.
    """

    name: str
    conversations: tuple[Conversation, ...]
    notes: tuple[str, ...] = ()


MIXTURES: Registry[Callable[[], list[Conversation]]] = Registry("mixture", group="vlmx.mixtures")
MIXTURES.add("mini", study.conversations)


def load_mixture(data: str) -> Mixture:
    """Load training data.

    Args:
        data: a registered name ("mini"), or the path of a LLaVA-style file: `.json` (one list), `.jsonl` (one object a
            line) or `.parquet` (one row each) of {"id", "image" (optional), "conversations": [{"from": "human" | "gpt",
            "value"}, ...]}.

    Raises:
        UnknownNameError: neither a registered name nor a file.
        DataError: the file is damaged, or rows break the schema; says how many and shows the first few.
        BackendError: a parquet file, and pyarrow is not installed.
    """
    if data in MIXTURES.names():
        return Mixture(name=data, conversations=tuple(MIXTURES.get(data)()))
    path = Path(data)
    if path.suffix not in SUFFIXES or not path.is_file():
        error = unknown_name("training data", data, MIXTURES.names())
        error.fix += f"; or give the path of a LLaVA-style {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file"
        raise error
    return read_llava(path)


@without_collector()
def read_llava(path: Path) -> Mixture:
    """Read and check a LLaVA-style file, row by row: never is there more of it in memory than what is kept.

    The literal `<image>` is removed from messages and they are stripped. A last message of the user that nobody answers
    is left out and counted, and so is the mark `<image>` where no image is named. Answers may be empty. Ids that occur
    again get "#2", "#3", ... so that each is unique. Other keys of a row, such as "model", mean nothing.

    Raises:
        DataError: the file is damaged, or rows break the schema.
        BackendError: a parquet file, and pyarrow is not installed.
    """
    conversations: list[Conversation] = []
    problems: list[str] = []
    times_seen: dict[str, int] = {}
    answers: dict[str, str] = {}
    count = problem_count = unanswered = unnamed = 0
    for count, row in enumerate(_rows(path), start=1):
        problem = _problem(row)
        if problem:
            problem_count += 1
            if len(problems) < SHOWN:
                problems.append(f"row {count}: {problem}")
            continue
        image, values = row.get("image"), [message["value"] for message in row["conversations"]]
        unnamed += image is None and any(IMAGE_MARK in value for value in values)
        messages = [value.replace(IMAGE_MARK, "").strip() for value in values]
        unanswered += len(messages) % 2
        turns = tuple(
            Turn(question=question, answer=answers.setdefault(answer, answer) if len(answer) <= _MEMO_CHARS else answer)
            for question, answer in zip(messages[::2], messages[1::2], strict=False)
        )
        name = row.get("id")
        unique = _unique(str(count if name is None else name), times_seen)
        conversations.append(Conversation(id=unique, image=image, turns=turns))
    if problem_count:
        raise DataError(
            f"{problem_count:,} of {count:,} rows of {path} are not LLaVA conversations",
            why="; ".join(problems) + ("; ..." if problem_count > SHOWN else ""),
            fix="correct these rows or take them out",
        )
    if not conversations:
        raise DataError(f"{path} has no conversations", fix="give a file with at least one")
    notes = [f"{unanswered:,} conversations end with an unanswered message, which is left out"] if unanswered else []
    if unnamed:
        notes.append(f"{unnamed:,} conversations have the mark {IMAGE_MARK} but name no image: they are text only")
    report = check_mixture(conversations)
    if report is not None:
        notes += report.notes
    return Mixture(name=table_name(path.stem), conversations=tuple(conversations), notes=tuple(notes))


def _unique(name: str, times_seen: dict[str, int]) -> str:
    times_seen[name] = times = times_seen.get(name, 0) + 1
    return name if times == 1 else _unique(f"{name}#{times}", times_seen)


def _problem(row: Any) -> str:
    """What is wrong with a row; empty if nothing is."""
    if not isinstance(row, dict):
        return "not an object"
    image, messages = row.get("image"), row.get("conversations")
    if isinstance(image, list):
        return f"image is a list of {len(image)}; a conversation can have one image, given as a text"
    if image is not None and not isinstance(image, str):
        return "image is not a text"
    if image == "":
        return "image is empty; a text-only conversation has none"
    if not _is_unicode(f"{row.get('id')} {image}"):
        return "id or image has half a character (a surrogate, \\ud800 to \\udfff)"
    others = [key for key in _OTHER_MEDIA if row.get(key)]
    if others:
        return f"it has {' and '.join(others)}; a conversation can have one image, under image"
    if not isinstance(messages, list) or len(messages) < 2:
        return "conversations is not a list of two or more messages"
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            return f"message {index + 1} has no text in value"
        if not _is_unicode(message["value"]):
            return f"message {index + 1} has half a character (a surrogate, \\ud800 to \\udfff) in value"
        if message.get("from") != _ROLES[index % 2]:
            return f"message {index + 1} is from {message.get('from')!r}, expected {_ROLES[index % 2]!r}"
    return ""


def _is_unicode(text: str) -> bool:
    """Whether a text can be written; JSON has escapes for halves of characters, which alone are none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _rows(path: Path) -> Iterator[Any]:
    """The rows of a file, one after the other.

    Raises:
        DataError: the file cannot be read, or is damaged.
        BackendError: a parquet file, and pyarrow is not installed.
    """
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            yield from _json_lines(file) if path.suffix == ".jsonl" else _list_items(file)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read", why=str(error), fix="give a UTF-8 JSON list, or JSON lines in a .jsonl"
        ) from error


def _json_lines(file: TextIO) -> Iterator[Any]:
    """The value of each line that is not blank.

    Raises:
        ValueError: a line is not JSON, or the file not UTF-8.
    """
    for number, line in enumerate(file, start=1):
        if not line.isspace():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error.msg} at character {error.pos + 1}") from error


def _list_items(file: TextIO) -> Iterator[Any]:
    """The items of a JSON list, of which no more than a part is in memory.

    Raises:
        ValueError: it is not a JSON list, or the file not UTF-8.
    """
    text = _Window(file)
    if not text.take("["):
        raise ValueError(f"it does not start with [, so it is no list: {text.shown()}")
    count, more = 0, not text.take("]")
    while more:
        count += 1
        try:
            yield text.value()
        except json.JSONDecodeError as error:
            raise ValueError(f"row {count}: {error.msg}: {text.shown()}") from error
        more = bool(text.take(","))
        if not more and not text.take("]"):
            raise ValueError(f"there is no comma after row {count}: {text.shown()}")
    if not text.at_end():
        raise ValueError(f"something follows the list: {text.shown()}")


class _Window:
    """The part of a JSON text that is being read."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text = ""
        self._at = 0
        self._decoder = json.JSONDecoder()

    def take(self, mark: str) -> bool:
        """Step over the next character that is not blank, if it is this one."""
        self._skip_blank()
        found = self._text.startswith(mark, self._at)
        self._at += found
        return found

    def at_end(self) -> bool:
        """Whether nothing but blanks is left."""
        self._skip_blank()
        return self._at == len(self._text)

    def value(self) -> Any:
        """Read one value.

        Raises:
            json.JSONDecodeError: there is none.
        """
        self._skip_blank()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError:
                if not self._more():
                    raise
                continue
            if end + 3 > len(self._text) and self._more():  # a number may go on: -1 could be the start of -1.5 or -1e+5
                continue
            self._at = end
            return value

    def shown(self) -> str:
        """The next characters, for an error."""
        return repr(self._text[self._at : self._at + 40]) if self._at < len(self._text) else "the file ends there"

    def _skip_blank(self) -> None:
        while True:
            blank = _BLANK.match(self._text, self._at)
            self._at = blank.end() if blank else self._at
            if self._at < len(self._text) or not self._more():
                return

    def _more(self) -> bool:
        """Read on, as much again as is not used up; False at the end of the file."""
        rest = len(self._text) - self._at
        chunk = self._file.read(max(_CHUNK_CHARS, rest))
        if chunk:
            self._text, self._at = self._text[self._at :] + chunk, 0
        return bool(chunk)


def _parquet_rows(path: Path) -> Iterator[Any]:
    """The rows of a parquet file, with no more columns than are needed.

    Raises:
        DataError: the file is damaged, or holds images where their names are expected.
        BackendError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise BackendError(
            f"{path} cannot be read",
            why="pyarrow, the library for parquet files, is not installed",
            fix="pip install 'vlmx[parquet]'",
        ) from error
    try:
        with ParquetFile(path, pre_buffer=False) as file:
            _require_names_of_images(path, file.schema_arrow)
            columns = [name for name in ("id", "image", "conversations") if name in file.schema_arrow.names]
            for batch in file.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read",
            why=(str(error) or repr(error)).splitlines()[0],
            fix="it is damaged, or no parquet file: fetch it again",
        ) from error


def _require_names_of_images(path: Path, schema: Any) -> None:
    """Make sure that images are named and not contained, before gigabytes of them are read.

    Raises:
        DataError: a column has them otherwise.
    """
    from pyarrow import types

    def is_text(kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind))

    wrong = [
        f"{field.name} ({field.type})"
        for field in schema
        if field.name in _OTHER_MEDIA or (field.name == "image" and not is_text(field.type))
    ]
    if wrong:
        raise DataError(
            f"{path} does not name one image a row",
            why=f"its columns: {', '.join(wrong)}",
            fix="write the images' names, as their image table has them, as text into a column named image",
        )
