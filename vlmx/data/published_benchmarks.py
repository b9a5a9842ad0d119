"""Which benchmarks does the paper evaluate, and which files, counts and questions does each of them have?

The eleven columns of its tables. TextVQA is two of them: with and without the text that was read in the image.
Counts are those of the paper's averages, and what TRI-ML/vlm-evaluation (d9f5896) checks; TallyQA's parts and the
numbers of images of the RefCOCO val splits are those that their publishers give.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlmx.data import downloads
from vlmx.data.annotation_files import SHOWN, without_collector
from vlmx.data.choice_files import pope_questions, tallyqa_questions
from vlmx.data.downloads import Download
from vlmx.data.published import PUBLISHED, PublishedData, refuse_missing
from vlmx.data.records import Question
from vlmx.data.region_files import ocid_ref_questions, refcoco_questions
from vlmx.data.vqa_files import gqa_questions, textvqa_questions, vizwiz_questions, vqav2_questions
from vlmx.data.wording import Wording
from vlmx.errors import DataError

Parse = Callable[[str, Sequence[Path], Wording], list[Question]]


@dataclass(frozen=True, kw_only=True)
class PublishedBenchmark:
    """A column of the paper's tables.

    Attributes:
        name: what --bench takes.
        title: its name in the literature, and the split.
        data: the published data set whose images it asks about.
        files: all files that its questions are read from.
        parse: from the name, the files and the wording to the questions.
        images: how many images it asks about; None where no source says so.
        parts: how many questions the parts have that scores are broken down by, where a source says so.
    """

    name: str
    title: str
    data: PublishedData
    files: tuple[Download, ...]
    parse: Parse
    images: int | None
    parts: Mapping[str, int] = field(default_factory=dict)

    @property
    def questions(self) -> int:
        """How many questions it has."""
        return self.data.examples

    def load(self, root: Path, wording: Wording) -> list[Question]:
        """Its questions, in the order of its files.

        Raises:
            DataError: a file is missing, damaged or of another split, or two questions have one id.
        """
        refuse_missing([each for each in self.files if not (root / each.path).is_file()], root)
        with without_collector():
            questions = self.parse(self.name, [root / each.path for each in self.files], wording)
        _refuse_twice(questions, root / self.files[0].path)
        return questions


def _refuse_twice(questions: Sequence[Question], path: Path) -> None:
    twice = [name for name, count in Counter(question.id for question in questions).items() if count > 1]
    if twice:
        raise DataError(
            f"{len(twice):,} questions in {path} are there more than once",
            why=f"e.g. {', '.join(twice[:SHOWN])}; an answer to one of them could not be told from one to the other",
            fix="fetch it again; `vlmx data check` says where it comes from",
        )


def _benchmark(
    name: str,
    data: str,
    parse: Parse,
    images: int | None,
    *more: Download,
    title: str = "",
    parts: Mapping[str, int] | None = None,
) -> PublishedBenchmark:
    published = PUBLISHED[data]
    return PublishedBenchmark(
        name=name,
        title=title or published.title,
        data=published,
        files=(*published.annotations, *more),
        parse=parse,
        images=images,
        parts=parts or {},
    )


_COLUMNS = (
    _benchmark("vqav2", "vqav2", vqav2_questions, 40_504, downloads.VQAV2_ANNOTATIONS),
    _benchmark("gqa", "gqa", gqa_questions, 398),
    _benchmark("vizwiz", "vizwiz", vizwiz_questions, 4_319),
    _benchmark(
        "textvqa_ocr", "textvqa", textvqa_questions, 3_166, downloads.TEXTVQA_OCR, title="TextVQA val, with OCR tokens"
    ),
    _benchmark("textvqa", "textvqa", textvqa_questions, 3_166, downloads.TEXTVQA_OCR),
    _benchmark("pope", "pope", pope_questions, 500, parts={"random": 2_910, "popular": 3_000, "adversarial": 3_000}),
    _benchmark("tallyqa", "tallyqa", tallyqa_questions, None, parts={"simple": 22_991, "complex": 15_598}),
    _benchmark("refcoco", "refcoco", refcoco_questions, 1_500, downloads.REFCOCO[1]),
    _benchmark("refcoco+", "refcoco+", refcoco_questions, 1_500, downloads.REFCOCO_PLUS[1]),
    _benchmark("refcocog", "refcocog", refcoco_questions, 1_300, downloads.REFCOCOG[1]),
    _benchmark("ocid_ref", "ocid-ref", ocid_ref_questions, None),
)
PUBLISHED_BENCHMARKS: dict[str, PublishedBenchmark] = {each.name: each for each in _COLUMNS}
LOCALIZATION = ("refcoco", "refcoco+", "refcocog", "ocid_ref")
QUESTION_ANSWERING = tuple(name for name in PUBLISHED_BENCHMARKS if name not in LOCALIZATION)
