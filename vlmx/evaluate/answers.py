"""What does `answers.jsonl` hold, and how does it survive a crash? A header line, then a line per answer.

    {"kind": "header", "benchmark": ..., "control": ..., "questions": ..., "limit": ..., "model": ..., ...}
    {"id": ..., "image": ..., "prompt": ..., "text": ...}

While answers are made, the files of `answers.parts` have the same form, and are read in its place. To these lines are
appended and flushed; a torn last line (the process died while writing it) is dropped when a file is opened again.
answers.replaced-DIGEST.jsonl is what stood in answers.jsonl before answers with other settings were finished.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from vlmx.data.mini.study import BENCHMARKS
from vlmx.data.wording import Wording
from vlmx.errors import RunError
from vlmx.runs import RunFolder, space_error, write_atomic

Control = Literal["none", "shuffled"]
Dtype = Literal["fp32", "bf16"]
NAME = "answers.jsonl"
REPLACED = "answers.replaced-{}.jsonl"  # what an answers.jsonl held before, by the first digits of its SHA-256
PARTS = "answers.parts"  # folder of what is answered already, while answers.jsonl is not finished
FINISHED = "finished"  # file in the folder of a plan whose answers are in answers.jsonl
_FOLDERS: Mapping[Control, str] = {"none": "eval", "shuffled": "eval-shuffled"}
# What may differ without the answers being of another model or to other questions.
_FREE = ("limit", "slim", "asked", "batch_size", "data_root")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer as the model wrote it.

    Attributes:
        id: the question's id in its benchmark.
        image: key of the question's image.
        prompt: the user's message.
        text: the generated text, outer spaces removed, nothing else changed; of a question with options the likeliest.
        probabilities: of the question's options in their order, where these were asked for instead of a text.
        source: the file and the number of the line that it was read from; no part of what it is.
    """

    id: str
    image: str
    prompt: str
    text: str
    probabilities: tuple[float, ...] | None = None
    source: tuple[Path, int] | None = field(default=None, compare=False, repr=False)

    @property
    def named(self) -> str:
        """Where to find it: "RUN/eval/gqa/answers.jsonl, line 7: 201307251"; the id alone if it is from no file."""
        return self.id if self.source is None else f"{self.source[0]}, line {self.source[1]}: {self.id}"

    def line(self) -> str:
        """As it stands in the file."""
        said = {"id": self.id, "image": self.image, "prompt": self.prompt, "text": self.text}
        more = {} if self.probabilities is None else {"probabilities": self.probabilities}
        return json.dumps({**said, **more}) + "\n"


@dataclass(frozen=True, kw_only=True)
class Header:
    """What answers belong to. What has a default was added later: older files lack it.

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
        wording: how the benchmark's questions were worded.
        data_root: where its published files were; None for the mini study, which needs none.
        questions_sha256: of its ids, prompts and annotations; empty where that is not known.
        slim: whether 1,024 questions of each part were asked.
        asked: how many questions were to be asked, whatever chose them; None: as `limit` says.
        batch_size: how many were answered together at most.
        exact: one at a time, nothing shared.
        dtype: what the model computed in.
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
    wording: Wording = "default"
    data_root: str | None = None
    questions_sha256: str = ""
    slim: bool = False
    asked: int | None = None
    batch_size: int | None = None
    exact: bool = False
    dtype: Dtype = "fp32"

    @property
    def to_ask(self) -> int:
        """How many questions were to be asked."""
        return self.asked if self.asked is not None else min(self.questions, self.limit or self.questions)

    @property
    def subset(self) -> str:
        """Which part of the benchmark was asked, in words; empty for all of it."""
        return "slim" if self.slim else f"limit {self.limit:,}" if self.limit is not None else ""

    def differences(self, other: Header) -> list[str]:
        """Names of the fields because of which answers under the two headers may not stand in one file."""
        ours, theirs = asdict(self), asdict(other)
        known = self.questions_sha256 and other.questions_sha256
        # The digest covers the prompts: another wording that leaves them as they are makes no difference.
        free = (*_FREE, "wording" if known and self.questions_sha256 == other.questions_sha256 else "")
        unknown = () if known else ("questions_sha256",)
        return [name for name in ours if ours[name] != theirs[name] and name not in (*free, *unknown)]

    def fits(self, other: Header) -> bool:
        """Whether answers under the two headers may stand in one file."""
        return not self.differences(other)

    def line(self) -> str:
        """As it stands in the file."""
        return json.dumps({"kind": "header", **asdict(self)}) + "\n"


def answers_path(run: RunFolder, benchmark: str, control: Control) -> Path:
    """Where a run keeps its answers to a benchmark."""
    return run.path / _FOLDERS[control] / benchmark / NAME


def answered_benchmarks(run: RunFolder, control: Control) -> list[str]:
    """The benchmarks that a run has answers to: those of the mini study in its order, then others by name."""
    folders = (run.path / _FOLDERS[control]).glob("*/")
    found = {folder.name for folder in folders if (folder / NAME).exists() or has_unfinished(folder / NAME)}
    return [*(name for name in BENCHMARKS if name in found), *sorted(found - set(BENCHMARKS))]


def has_unfinished(path: Path) -> bool:
    """Whether there are answers that are not in an answers.jsonl yet."""
    parts = (part for part in parts_folder(path).glob("*/*.jsonl") if not part.with_name(FINISHED).exists())
    return any(has_lines(part, 2) for part in parts)


def read_answers(path: Path) -> tuple[Header, list[Answer]]:
    """Header and answers of a file, without a torn last line; while it is not finished, those that there are.

    Raises:
        RunError: there are no answers, or a file is empty, or damaged elsewhere than in its last line.
    """
    if not path.exists():
        unfinished = _unfinished(path)
        if unfinished is not None:
            return unfinished
        raise RunError(f"there are no answers at {path}", fix="give `vlmx eval --run RUN` first")
    return read_file(path)


def read_file(path: Path) -> tuple[Header, list[Answer]]:
    """Header and answers of one file; see `read_answers`. Empty lines and fields of later versions are passed over."""
    content = path.read_bytes()
    try:
        *lines, torn = content.decode().split("\n")
    except UnicodeDecodeError as error:
        before = content.count(b"\n", 0, error.start)
        raise _damaged(path, f"line {before + 1} is not text: {error}", only_line=before > 0) from error
    records: list[tuple[int, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append((number, json.loads(line)))
        except json.JSONDecodeError as error:
            raise _damaged(path, f"line {number} is not JSON", only_line=bool(records)) from error
    if not records:
        raise _damaged(path, "it has no complete line" if torn else "it is empty")
    (number, first), *others = records
    return _header(path, number, first), [_answer(path, number, record) for number, record in others]


def _unfinished(path: Path) -> tuple[Header, list[Answer]] | None:
    """The most answers that there are with one model and its settings: those that were written to last."""
    folders = sorted(parts_folder(path).glob("*/"), key=lambda folder: max(p.stat().st_mtime_ns for p in _all(folder)))
    found = [each for folder in folders if (each := read_parts(folder)) is not None]
    if not found:
        return None
    alike = [each for each in found if each[0].fits(found[-1][0])]
    header, by_id = max(alike, key=lambda each: len(each[1]))
    return header, list(by_id.values())


def _all(folder: Path) -> list[Path]:
    return [folder, *folder.glob("*.jsonl")]


def parts_folder(path: Path) -> Path:
    """Where what is answered already lies while an answers.jsonl is not finished: a folder for each plan of work."""
    return path.with_name(PARTS)


def part_files(folder: Path) -> Iterator[tuple[Header, dict[str, Answer]]]:
    """Header and answers by id of each part file of a plan; of an id that comes twice the last answer."""
    for path in sorted(folder.glob("*.jsonl")):
        if not has_lines(path, 1):
            continue  # torn within its header: nothing is in it yet
        header, answers = read_file(path)
        yield header, {answer.id: answer for answer in answers}


def read_parts(folder: Path) -> tuple[Header, dict[str, Answer]] | None:
    """All answers that there are to a plan of work, by id; None if there is no part file."""
    files = list(part_files(folder))
    if not files:
        return None
    return files[0][0], {name: answer for _, by_id in files for name, answer in by_id.items()}


def _header(path: Path, number: int, record: Any) -> Header:
    if not isinstance(record, dict) or record.get("kind") != "header":
        raise _damaged(path, f"line {number} is no header")
    lacking = [
        each.name
        for each in fields(Header)
        if each.default is MISSING and (record.get(each.name) is None and each.name != "limit")
    ]
    if lacking:
        raise _damaged(path, f"the header in line {number} lacks {', '.join(lacking)}")
    known = {each.name for each in fields(Header)}
    return Header(**{"limit": None, **{key: value for key, value in record.items() if key in known}})


def _answer(path: Path, number: int, record: Any) -> Answer:
    if not isinstance(record, dict):
        raise _damaged(path, f"line {number} is no answer", only_line=True)
    for name in ("id", "image", "prompt", "text"):
        if not isinstance(record.get(name), str):
            said = json.dumps(record[name]) if name in record else "missing"
            raise _damaged(path, f"line {number}: '{name}' is {said}, where a text belongs", only_line=True)
    values = record.get("probabilities")
    if values is not None and not (isinstance(values, list) and all(isinstance(v, int | float) for v in values)):
        raise _damaged(path, f"line {number}: 'probabilities' are no list of numbers", only_line=True)
    return Answer(
        id=record["id"],
        image=record["image"],
        prompt=record["prompt"],
        text=record["text"],
        probabilities=None if values is None else tuple(values),
        source=(path, number),
    )


def _damaged(path: Path, why: str, *, only_line: bool = False) -> RunError:
    """What to say of a damaged file; what it says of its other lines is as good as ever, unless that is its header."""
    what = "delete this line" if only_line else "move the file away"
    control: Control = "shuffled" if _FOLDERS["shuffled"] in path.parts else "none"
    return RunError(f"{path} is damaged", why=why, fix=f"{what}, and {asked_again(control)}")


def asked_again(control: Control) -> str:
    """What to do where answers are missing, for an error's fix."""
    option = "" if control == "none" else f" --control {control}"
    return f"give `vlmx eval{option}` again: it asks what is missing"


class AnswerFile:
    """An answers.jsonl, or a part of one, that is being written.

    Args:
        path: the file; what it already holds is kept if it belongs to the same model, cache and questions.
        header: what the answers belong to.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        kept: list[Answer] = []
        if path.exists() and has_lines(path, 1):
            old, answers = read_file(path)
            kept = answers if old.fits(header) else []
        write_answers(path, header, kept)

    def append(self, answers: Iterable[Answer]) -> None:
        """Add answers and hand them to the operating system before returning.

        Raises:
            OutOfSpaceError: the disk is full.
        """
        try:
            with open(self.path, "a") as file:
                file.write("".join(answer.line() for answer in answers))
        except OSError as error:
            raise space_error(error, self.path) from error


def write_answers(path: Path, header: Header, answers: Iterable[Answer]) -> None:
    """Write a whole file, atomically.

    Raises:
        OutOfSpaceError: the disk is full; the old file is intact.
    """
    write_atomic(path, "".join([header.line(), *(answer.line() for answer in answers)]))


def has_lines(path: Path, count: int) -> bool:
    """Whether a file has so many whole lines, or more."""
    with open(path, "rb") as file:
        return all(file.readline().endswith(b"\n") for _ in range(count))
