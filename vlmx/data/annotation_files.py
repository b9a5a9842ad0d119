"""How is a published annotation file read, and what is said when it is damaged, of another form, or of another split?

Nothing in a file is trusted: a pickle runs no code, and a row that has another form than the published ones is named.
"""

from __future__ import annotations

import gc
import io
import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from vlmx.errors import DataError

T = TypeVar("T")
SHOWN = 3


@contextmanager
def without_collector() -> Iterator[None]:
    """Of the millions of small objects that reading makes none is garbage; looking for it took a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_json(path: Path, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """What a JSON file holds.

    Args:
        object_hook: replaces each object while it is read, for files whose objects do not fit into memory all at once.

    Raises:
        DataError: it is damaged.
    """
    try:
        return json.loads(path.read_bytes(), object_hook=object_hook)
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error


def read_json_lines(path: Path) -> list[Any]:
    """What a file of JSON lines holds; empty lines are left out.

    Raises:
        DataError: it is damaged.
    """
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error


class _PlainPickle(pickle.Unpickler):
    """Reads numbers, texts, lists and dictionaries; whatever would run code is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}; a list of expressions has no need to")


def read_plain_pickle(path: Path) -> Any:
    """What a pickle of Python 2 holds.

    Raises:
        DataError: it is damaged, or more than plain data.
    """
    try:
        return _PlainPickle(io.BytesIO(path.read_bytes()), encoding="latin-1").load()
    except (OSError, pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"cannot read {path}", why=str(error) or repr(error), fix="it is damaged: fetch it again")


def parse_rows(path: Path, rows: Iterable[Any], parse: Callable[[Any], T]) -> list[T]:
    """`parse` of each row.

    Raises:
        DataError: it fails for some, or there is no row; says for how many, and what is wrong with the first few.
    """
    parsed, problems = [], []
    for number, row in enumerate(rows, start=1):
        try:
            parsed.append(parse(row))
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            problems.append(f"row {number}: " + (f"no {error}" if isinstance(error, KeyError) else str(error)))
    if problems or not parsed:
        count = len(parsed) + len(problems)
        raise DataError(
            f"{path} is not the published file",
            why=f"{len(problems):,} of {count:,} rows have another form: " + "; ".join(problems[:SHOWN])
            if problems
            else "the rows are not where they are in the published one",
            fix="fetch it again, and check that it is the file of this split",
        )
    return parsed


def rows_of(content: Any, name: str = "") -> list[Any]:
    """A file's list, or the one under `name`; if the file has another form an empty one, which `parse_rows` refuses."""
    if name:
        content = content.get(name) if isinstance(content, dict) else None
    return content if isinstance(content, list) else []


def items_of(content: Any) -> list[tuple[str, Any]]:
    """What a file has under its ids, with these; if it has another form nothing, which `parse_rows` refuses."""
    return list(content.items()) if isinstance(content, dict) else []


def text_of(row: Any, name: str) -> str:
    """The text under `name`.

    Raises:
        KeyError, ValueError: there is none, or something else.
    """
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"'{name}' is {type(value).__name__}, not a text")
    return value


def id_of(row: Any, name: str) -> str:
    """The number or text under `name` that identifies a row.

    Raises:
        KeyError, ValueError: there is none, or something else.
    """
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"'{name}' is {type(value).__name__}, not an id")
    return str(value)


def wrong_split(path: Path, why: str, wanted: str) -> DataError:
    """The error for a file that is published, but of another split.

    Args:
        why: what shows it.
        wanted: the split that the benchmark is, and the name of its file.
    """
    return DataError(
        f"{path} is the annotation file of the wrong split",
        why=why,
        fix=f"this benchmark is {wanted}: put that file there; `vlmx data check` says where it comes from",
    )


def refuse_unanswered(path: Path, rows: Sequence[Any], name: str, wanted: str) -> None:
    """Make sure that this is no test split, which is published without its answers.

    Args:
        name: what a row has its answers under.

    Raises:
        DataError: no row has any.
    """
    if rows and all(isinstance(row, dict) and name not in row for row in rows):
        raise wrong_split(path, f"none of its {len(rows):,} rows has '{name}': test splits come without", wanted)
