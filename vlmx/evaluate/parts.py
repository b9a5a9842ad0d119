"""How do several processes make one answers.jsonl, each killed at any instant, and it is the same file in the end?

    answers.parts/PLAN/0-of-2.jsonl    what the first of two processes has answered, group after group
    answers.parts/PLAN/0-of-2.lock     held by that process while it lives
    answers.parts/PLAN/taken.jsonl     answers with the same settings that were there when the plan was begun
    answers.parts/PLAN/finished        the plan is in answers.jsonl; the folder goes when nobody holds a lock in it
    answers.jsonl                      in the benchmark's order, written at once when all groups are answered

PLAN is the digest of the header: other settings have other plans. Process i of n answers the groups i, i + n, ...; no
group waits for another process. A group counts as answered when all of it that was not taken over stands in one file;
one that was begun is answered again. Whoever finds all groups answered writes the whole file.

Until then an older answers.jsonl stays as it is. One with the same settings that holds all that was asked, and more,
stays for good; any other is kept beside the new one. Parts are removed when nobody is at work on them and the
answers.jsonl has all that they have.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO

from vlmx.console import note
from vlmx.errors import RunError
from vlmx.evaluate.answers import (
    FINISHED,
    REPLACED,
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
from vlmx.runs import space_error, write_atomic

_TAKEN = "taken.jsonl"


class Work:
    """The share of one process in the answers to one benchmark.

    Args:
        path: the answers.jsonl.
        header: what the answers belong to.
        asked: ids of the questions that are asked, in the benchmark's order.
        groups: all groups of the plan.
        worker: which process this is.

    Attributes:
        path: the answers.jsonl.
        whole: whether it was there already, with an answer to all that is asked.
        open: what this process has to answer: its groups, without questions whose answers were taken over.
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
            self.whole = self._in_place = self._is_whole()
            self.kept = len(asked)
            if self.whole:
                self._clear()
                return
            name = f"{worker.index}-of-{worker.count}"
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._take(self._folder / f"{name}.lock")
            (self._folder / FINISHED).unlink(missing_ok=True)  # its answers.jsonl was removed since
            self._taken = self._take_over()
            done = self._answered()
            self._tell_what_stays()
            self._file = AnswerFile(self._folder / f"{name}.jsonl", header)
        left = [self._without_taken(group) for group in groups if group.number not in done]
        mine = {group.number for group in groups[worker.index :: worker.count]}
        self.open = [group for group in left if group.number in mine]
        self.kept -= sum(len(group.questions) for group in left)

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
            Whether this process was the one that found all groups answered, and nothing is missing of all of `works`.
        """
        if self._lock is None:
            return False
        try:
            with _guard(self.path):
                first = self._publish()
                self._release()
                self._clear()
                return first and all(work._is_in_place() for work in works)
        finally:
            self._release()

    def close(self) -> None:
        """Leave the work to others."""
        if self._lock is not None:
            with _guard(self.path):
                self._release()
                self._clear()

    def _publish(self) -> bool:
        """Put the answers in their place if there are all; False if there are not, or another process has done it."""
        if (self._folder / FINISHED).exists() or len(self._answered()) < len(self._groups):
            return False
        if not self._is_whole():  # else another evaluation, with more questions, has ended meanwhile
            found = read_parts(self._folder)
            assert found is not None
            answers = [found[1][name] for name in self._asked]
            self._keep_replaced(answers)
            write_answers(self.path, self._header, answers)
        (self._folder / FINISHED).touch()
        self._in_place = True
        return True

    def _is_in_place(self) -> bool:
        self._in_place = self._in_place or self._is_whole()
        return self._in_place

    def _is_whole(self) -> bool:
        old = _read(self.path)
        if old is None:
            return False
        return old[0].fits(self._header) and {answer.id for answer in old[1]} >= set(self._asked)

    def _tell_what_stays(self) -> None:
        old = _read(self.path)
        if old is not None and not old[0].fits(self._header):
            why = _why(old[0], self._header)
            note(f"{self.path}: its {len(old[1]):,} answers stay until the new ones are finished: {why}")

    def _keep_replaced(self, answers: Iterable[Answer]) -> None:
        """Keep an answers.jsonl that has anything else than the new answers under another name."""
        old = _read(self.path)
        if old is None or {answer.line() for answer in old[1]} <= {answer.line() for answer in answers}:
            return
        content = self.path.read_bytes()
        kept = self.path.with_name(REPLACED.format(hashlib.sha256(content).hexdigest()[:8]))
        write_atomic(kept, content)
        note(f"{self.path}: {len(old[1]):,} answers are replaced: {_why(old[0], self._header)}; kept as {kept.name}")

    def _take_over(self) -> set[str]:
        """Ids of the answers that are taken over; they are looked for when the plan is begun, and only then."""
        path = self._folder / _TAKEN
        if not any(self._folder.glob("*.jsonl")):
            found = self._same_settings()
            if found:
                write_answers(path, self._header, found.values())
                note(f"{self.path}: {len(found):,} answers with the same settings are taken over")
        taken = _read(path)
        return set() if taken is None else {answer.id for answer in taken[1]}

    def _same_settings(self) -> dict[str, Answer]:
        """Answers to what is asked that differ in the subset or the batch size alone; of the same plan whole groups."""
        files = [self.path, *sorted(self.path.parent.glob(REPLACED.format("*")))]
        sources = [(old[0], {answer.id: answer for answer in old[1]}) for old in map(_read, files) if old is not None]
        folders = sorted(parts_folder(self.path).glob("*/"))
        sources += [found for folder in folders if (found := read_parts(folder)) is not None]
        known: dict[str, Answer] = {}
        for header, by_id in sources:
            if not header.fits(self._header) or header.questions_sha256 != self._header.questions_sha256:
                continue
            wanted = set(self._asked)
            if _plan(header) == _plan(self._header):
                whole = [group for group in self._groups if all(q.id in by_id for q in group.questions)]
                wanted = {q.id for group in whole for q in group.questions}
            known = {**{name: answer for name, answer in by_id.items() if name in wanted}, **known}
        return known

    def _without_taken(self, group: Group) -> Group:
        left = [(q, image) for q, image in zip(group.questions, group.images, strict=True) if q.id not in self._taken]
        return replace(group, questions=tuple(q for q, _ in left), images=tuple(image for _, image in left))

    def _answered(self) -> set[int]:
        """Numbers of the groups that are answered."""
        done: set[int] = set()
        for _, by_id in part_files(self._folder):
            known = by_id.keys() | self._taken
            done |= {group.number for group in self._groups if all(q.id in known for q in group.questions)}
        return done

    def _clear(self) -> None:
        """Remove parts that nobody is at work on and that the answers.jsonl has, too."""
        folders = [folder for folder in sorted(parts_folder(self.path).glob("*/")) if not _is_held(folder)]
        old = _read(self.path) if folders else None
        ids = set() if old is None else {answer.id for answer in old[1]}
        for folder in folders:
            found = None
            if not (folder / FINISHED).exists():
                try:
                    found = read_parts(folder)
                except RunError:
                    continue  # damaged; who goes on with it will be told
            if found is None or not found[1] or (old is not None and old[0].fits(found[0]) and ids >= set(found[1])):
                shutil.rmtree(folder)
        with suppress(OSError):  # other plans are in it
            parts_folder(self.path).rmdir()

    def _take(self, path: Path) -> IO[bytes]:
        """Hold a lock as long as this process lives.

        Raises:
            RunError: another process has it.
        """
        file = open(path, "ab")  # noqa: SIM115  it stays open
        if not _lock(file):
            file.close()
            raise RunError(
                f"another process is answering '{self._header.benchmark}' for this run",
                why=f"it holds {path}",
                fix="wait for it, or end it and give the same command again",
            )
        return file

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _read(path: Path) -> tuple[Header, list[Answer]] | None:
    """A file's header and answers; None if there is no file, or it was torn within its header."""
    return read_file(path) if path.exists() and has_lines(path, 1) else None


def _why(old: Header, new: Header) -> str:
    names = [name.replace("_", " ") for name in old.differences(new)]
    return f"they were made with another {', '.join(names)}" if names else "they are to other questions"


def _plan(header: Header) -> str:
    fields = {**asdict(header), "data_root": None}  # the files may have moved
    if header.questions_sha256:
        fields["wording"] = None  # it is in the digest, as far as it counts
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def _lock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_held(folder: Path) -> bool:
    """Whether a process is at work on a plan."""
    for path in folder.glob("*.lock"):
        with open(path, "ab") as file:
            if not _lock(file):
                return True
    return False


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
