"""Are a benchmark's files whole: all there, of the right split, with the published counts, and all photos with them?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlmx.data.annotation_files import SHOWN
from vlmx.data.benchmarks import BENCHMARKS
from vlmx.data.downloads import Download
from vlmx.data.llava665k import missing_images
from vlmx.data.published_benchmarks import PUBLISHED_BENCHMARKS, PublishedBenchmark
from vlmx.data.records import Question
from vlmx.errors import DataError

MOST_PARTS = 5
BOX_TOLERANCE_PX = 1.0  # COCO's boxes are drawn by hand and rounded; some end a fraction of a pixel outside


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that keeps a benchmark from being whole: what, why, and what to do, as in an error."""

    what: str
    why: str = ""
    fix: str = ""


@dataclass(frozen=True, kw_only=True)
class FileState:
    """One file or folder, and whether it is there."""

    download: Download
    there: bool


@dataclass(frozen=True, kw_only=True)
class Count:
    """How many there are, and how many the published one has; None where no source says so."""

    found: int
    published: int | None

    @property
    def differs(self) -> bool:
        """Whether it is another number than the published one."""
        return self.published is not None and self.found != self.published


@dataclass(frozen=True, kw_only=True)
class BenchmarkReport:
    """What was found of one benchmark.

    Attributes:
        name, title: of the benchmark.
        files: its annotation files and, unless photos were not asked for, the folders of its photos.
        problems: what keeps it from being whole beside files that are not there.
        questions, images: None if its files could not be read.
        parts: questions of each part that scores are broken down by; empty if there are none, or many.
    """

    name: str
    title: str
    files: tuple[FileState, ...] = ()
    problems: tuple[Problem, ...] = ()
    questions: Count | None = None
    images: Count | None = None
    parts: Mapping[str, Count] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether it is as published."""
        return not self.problems and all(each.there for each in self.files)


def check_benchmark(name: str, root: Path, *, images: bool = True) -> BenchmarkReport:
    """Read a benchmark's files and look for its photos; no photo is opened.

    Args:
        name: of the benchmark.
        root: the data root.
        images: look for the photos, too; scores need none.

    Raises:
        UnknownNameError: no such benchmark.
    """
    published = PUBLISHED_BENCHMARKS.get(name)
    if published is None:
        return _unpublished(name, root)
    files = [FileState(download=each, there=(root / each.path).is_file()) for each in published.files]
    if images:
        files += [FileState(download=each, there=(root / each.path).is_dir()) for each in published.data.images]
    problems: list[Problem] = []
    questions = _load(name, root, problems)
    if questions is None:
        return BenchmarkReport(name=name, title=published.title, files=tuple(files), problems=tuple(problems))
    keys = list(dict.fromkeys(question.image for question in questions))
    counts = {
        "questions": Count(found=len(questions), published=published.questions),
        "images": Count(found=len(keys), published=published.images),
    }
    parts = _parts(questions, published)
    problems += _count_problems({**counts, **{f"{part} questions": count for part, count in parts.items()}})
    problems += _box_problems(questions)
    if images:
        problems += _photo_problems(keys, [each.download for each in files if each.there], root)
    return BenchmarkReport(
        name=name,
        title=published.title,
        files=tuple(files),
        problems=tuple(problems),
        questions=counts["questions"],
        images=counts["images"],
        parts=parts,
    )


def _unpublished(name: str, root: Path) -> BenchmarkReport:
    """Of the mini study, or of a plug-in: there is nothing to fetch and nothing to compare with."""
    benchmark = BENCHMARKS.get(name)
    problems: list[Problem] = []
    questions = _load(name, root, problems) or []
    return BenchmarkReport(
        name=name,
        title=benchmark.title,
        problems=tuple(problems),
        questions=Count(found=len(questions), published=benchmark.questions),
        images=Count(found=len({question.image for question in questions}), published=None),
    )


def _load(name: str, root: Path, problems: list[Problem]) -> list[Question] | None:
    """The questions; None if files are missing, or if they cannot be read, which is added to `problems`."""
    published = PUBLISHED_BENCHMARKS.get(name)
    if published is not None and any(not (root / each.path).is_file() for each in published.files):
        return None
    try:
        return BENCHMARKS.get(name).load(root, "default")
    except DataError as error:
        problems.append(Problem(what=error.what, why=error.why, fix=error.fix))
        return None


def _parts(questions: Sequence[Question], published: PublishedBenchmark) -> dict[str, Count]:
    found = Counter(question.question_type for question in questions)
    if len(found) > MOST_PARTS or (len(found) == 1 and not published.parts):
        return {}
    names = dict.fromkeys([*published.parts, *sorted(found)])
    return {part: Count(found=found[part], published=published.parts.get(part)) for part in names}


def _count_problems(counts: Mapping[str, Count]) -> list[Problem]:
    different = [
        f"{count.found:,} {what} (published: {count.published:,})" for what, count in counts.items() if count.differs
    ]
    if not different:
        return []
    return [
        Problem(
            what=f"other counts than the published ones: {', '.join(different)}",
            why="the files are cut, of another version, or of another split",
            fix="fetch them again",
        )
    ]


def _box_problems(questions: Sequence[Question]) -> list[Problem]:
    outside = [question for question in questions if question.kind == "box" and not _inside(question)]
    if not outside:
        return []
    first = outside[0]
    return [
        Problem(
            what=f"{len(outside):,} boxes are empty or outside of their image",
            why=f"e.g. that of {first.id}: {first.box} in an image of {first.image_wh}",
            fix="the annotations are damaged or of another form: fetch them again",
        )
    ]


def _inside(question: Question) -> bool:
    (x1, y1, x2, y2), (width, height) = question.region
    low, right, bottom = -BOX_TOLERANCE_PX, width + BOX_TOLERANCE_PX, height + BOX_TOLERANCE_PX
    return low <= x1 < x2 <= right and low <= y1 < y2 <= bottom


def _photo_problems(keys: Sequence[str], there: Sequence[Download], root: Path) -> list[Problem]:
    """Photos that are missing in folders that are there."""
    problems = []
    for folder in there:
        wanted = [key for key in keys if key.startswith(f"{folder.path}/")]
        found = missing_images(wanted, root)
        if found.missing:
            first = ", ".join(key.removeprefix(f"{folder.path}/") for key in found.missing[:SHOWN])
            problems.append(
                Problem(
                    what=f"{len(found.missing):,} of {len(wanted):,} photos in {root / folder.path} are missing",
                    why=f"e.g. {first}",
                    fix="fetch them again, and unpack the whole archive",
                )
            )
    return problems
