"""What does `answers.jsonl` hold, and how does it survive a crash? A header line, then a line per answer.

    {"kind": "header", "benchmark": ..., "control": ..., "questions": ..., "limit": ..., "model": ..., ...}
    {"id": ..., "image": ..., "prompt": ..., "text": ...}

Lines are appended and flushed; a torn last line (the process died while writing it) is dropped when the file is
opened again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from vlmx.data.mini.study import BENCHMARKS
from vlmx.errors import RunError
from vlmx.runs import RunFolder, space_error, write_atomic

Control = Literal["none", "shuffled"]
_FOLDERS: Mapping[Control, str] = {"none": "eval", "shuffled": "eval-shuffled"}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer as the model wrote it.

    Attributes:
        id: the question's id in its benchmark.
        image: key of the question's image.
        prompt: the user's message.
        text: the generated text, outer spaces removed, nothing else changed.
    """

    id: str
    image: str
    prompt: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Header:
    """What answers belong to.

    Attributes:
        benchmark: its name.
        control: "shuffled" if every question got the tokens of another image.
        questions: how many questions the benchmark has.
        limit: how many of them were asked; None for all.
        model: sha256 of the trained connector, which no two trainings share.
        cache, fingerprint: where the image tokens came from.
        encoder_weights: SHA-256 of the encoder's weights, or "random:SEED" for an untrained one; joined
            encoders have theirs with + between them.
        geometry: how images were brought to the encoder's size, as plain data; boxes are converted with it.
        prompt_format: name of the prompt format.
    """

    benchmark: str
    control: Control
    questions: int
    limit: int | None
    model: str
    cache: str
    fingerprint: str
    encoder_weights: str
    geometry: Mapping[str, Any]
    prompt_format: str

    def fits(self, other: Header) -> bool:
        """Whether answers under the two headers may stand in one file: all but the limit is equal."""
        return {**asdict(self), "limit": None} == {**asdict(other), "limit": None}


def answers_path(run: RunFolder, benchmark: str, control: Control) -> Path:
    """Where a run keeps its answers to a benchmark."""
    return run.path / _FOLDERS[control] / benchmark / "answers.jsonl"


def answered_benchmarks(run: RunFolder, control: Control) -> list[str]:
    """The benchmarks that a run has answers to: those of the mini study in its order, then others by name."""
    found = {path.parent.name for path in (run.path / _FOLDERS[control]).glob("*/answers.jsonl")}
    return [*(name for name in BENCHMARKS if name in found), *sorted(found - set(BENCHMARKS))]


def read_answers(path: Path) -> tuple[Header, list[Answer]]:
    """Header and answers of a file, without a torn last line.

    Raises:
        RunError: the file is missing, empty, or damaged elsewhere than in its last line.
    """
    if not path.exists():
        raise RunError(f"there are no answers at {path}", fix="give `vlmx eval --run RUN` first")
    *lines, torn = path.read_text().split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise _damaged(path, f"line {number} is not JSON") from error
    if not records:
        raise _damaged(path, "it has no complete line" if torn else "it is empty")
    try:
        header = Header(**{key: value for key, value in records[0].items() if key != "kind"})
        return header, [Answer(**record) for record in records[1:]]
    except TypeError as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, why: str) -> RunError:
    return RunError(f"{path} is damaged", why=why, fix="delete it and give `vlmx eval` again")


class AnswerFile:
    """An answers.jsonl that is being written.

    Args:
        path: the file; what it already holds is kept if it belongs to the same model, cache and questions.
        header: what the answers belong to.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self.replaced = 0
        kept: list[Answer] = []
        if path.exists():
            old, answers = read_answers(path) if _has_a_line(path) else (None, [])
            if old is not None and old.fits(header):
                kept = answers
            else:
                self.replaced = len(answers)
        lines = [{"kind": "header", **asdict(header)}, *map(asdict, kept)]
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))
        self.done = {answer.id for answer in kept}

    def append(self, answers: Iterable[Answer]) -> None:
        """Add answers and hand them to the operating system before returning.

        Raises:
            OutOfSpaceError: the disk is full.
        """
        added = list(answers)
        try:
            with open(self.path, "a") as file:
                file.write("".join(json.dumps(asdict(answer)) + "\n" for answer in added))
        except OSError as error:
            raise space_error(error, self.path) from error
        self.done |= {answer.id for answer in added}


def _has_a_line(path: Path) -> bool:
    return b"\n" in path.read_bytes()
