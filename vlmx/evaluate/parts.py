"""How do several processes make one answers.jsonl, each killed at any instant, and it is the same file in the end?

    answers.parts/PLAN/0-of-2.jsonl    what the first of two processes has answered, group after group
    answers.parts/PLAN/0-of-2.lock     held by that process while it lives
    answers.jsonl                      in the benchmark's order, written at once when all groups are answered

PLAN is the digest of the header: other settings have other plans. Process i of n answers the groups i, i + n, ...; no
group waits for another process. A group counts as answered when all of it stands in one file; one that was begun is
answered again. Whoever finds all groups answered writes the whole file and removes the parts.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO

from vlmx.console import note
from vlmx.errors import RunError
from vlmx.evaluate.answers import (
    Answer,
    AnswerFile,
    Header,
    has_lines,
    part_files,
    parts_folder,
    read_file,
    read_parts,
    write_answers,
)
from vlmx.evaluate.groups import Group
from vlmx.evaluate.many import Worker
from vlmx.runs import space_error


class Work:
    """The share of one process in the answers to one benchmark.

    Args:
        path: the answers.jsonl.
        header: what the answers belong to; answers of another model, or to other questions, are replaced.
        asked: ids of the questions that are asked, in the benchmark's order.
        groups: all groups of the plan.
        worker: which process this is.

    Attributes:
        path: the answers.jsonl.
        whole: whether it was there already, with an answer to all that is asked.
        open: the groups that this process has to answer.
        kept: how many questions were answered before, by any process.

    Raises:
        RunError: another process is at the same work, or a file is damaged.
        OutOfSpaceError: the disk is full.
    """

    def __init__(
        self, path: Path, header: Header, asked: Sequence[str], groups: Sequence[Group], worker: Worker
    ) -> None:
        self.path = path
        self._header = header
        self._asked = asked
        self._groups = groups
        self._folder = parts_folder(path) / _plan(header)
        self._lock: IO[bytes] | None = None
        self.open: list[Group] = []
        with _guard(path):
            self.whole = self._is_whole()
            self.kept = len(asked)
            if self.whole:
                return
            self._make_room()
            name = f"{worker.index}-of-{worker.count}"
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._take(self._folder / f"{name}.lock")
            done = self._answered()
            self._file = AnswerFile(self._folder / f"{name}.jsonl", header)
        mine = groups[worker.index :: worker.count]
        self.open = [group for group in mine if group.number not in done]
        self.kept = sum(len(groups[number].questions) for number in done)

    def write(self, answers: Iterable[Answer]) -> None:
        """Keep the answers of a group.

        Raises:
            OutOfSpaceError: the disk is full.
        """
        self._file.append(answers)

    def finish(self, works: Sequence[Work]) -> bool:
        """Write the whole file if all groups are answered, by whomever.

        Args:
            works: all benchmarks of this evaluation.

        Returns:
            Whether this process wrote it, and it was the last that was missing of all of `works`.
        """
        if self.whole:
            return False
        try:
            with _guard(self.path):
                if self.path.exists():
                    return False  # another process found all groups answered before
                if len(self._answered()) < len(self._groups):
                    return False  # another process is still at work, or has died
                found = read_parts(self._folder)
                assert found is not None
                write_answers(self.path, self._header, (found[1][name] for name in self._asked))
                everything = not self._header.subset
                shutil.rmtree(parts_folder(self.path) if everything else self._folder)
                return all(work.path.exists() for work in works)
        finally:
            self.close()

    def close(self) -> None:
        """Leave the work to others."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _is_whole(self) -> bool:
        if not self.path.exists() or not has_lines(self.path, 1):
            return False
        old, answers = read_file(self.path)
        return old.fits(self._header) and {answer.id for answer in answers} >= set(self._asked)

    def _make_room(self) -> None:
        """Remove an answers.jsonl that does not hold what is asked, and what was begun with another model."""
        if self.path.exists():
            old = read_file(self.path) if has_lines(self.path, 1) else None
            if old is not None and old[1]:
                note(f"{self.path}: {len(old[1])} answers are replaced: {_why(old[0], self._header)}")
            self.path.unlink()
        for folder in sorted(parts_folder(self.path).glob("*/")):
            found = read_parts(folder)
            if found is None or found[0].fits(self._header):
                continue  # another subset: it can be gone on with
            for lock in folder.glob("*.lock"):
                self._take(lock).close()
            note(f"{self.path}: {len(found[1])} answers are replaced: {_why(found[0], self._header)}")
            shutil.rmtree(folder)

    def _answered(self) -> set[int]:
        """Numbers of the groups that are answered."""
        done: set[int] = set()
        for _, by_id in part_files(self._folder):
            done |= {group.number for group in self._groups if all(q.id in by_id for q in group.questions)}
        return done

    def _take(self, path: Path) -> IO[bytes]:
        """Hold a lock as long as this process lives.

        Raises:
            RunError: another process has it.
        """
        file = open(path, "ab")  # noqa: SIM115  it stays open
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise RunError(
                f"another process is answering '{self._header.benchmark}' for this run",
                why=f"it holds {path}",
                fix="wait for it, or end it and give the same command again",
            ) from None
        return file


def _why(old: Header, new: Header) -> str:
    names = [name.replace("_", " ") for name in old.differences(new)]
    if names:
        return f"they were made with another {', '.join(names)}"
    return "they are to fewer questions than are asked now"


def _plan(header: Header) -> str:
    fields = {**asdict(header), "data_root": None}  # the files may have moved
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _guard(path: Path) -> Iterator[None]:
    """What is done in the block, no other process does with the answers of this run at the same time."""
    folder = path.parent.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".answers.lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise space_error(error, path) from error
