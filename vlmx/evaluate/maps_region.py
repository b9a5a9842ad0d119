"""Which image and which box does a user of `vlmx maps` mean? From a key and numbers, or from a run's question."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlmx.cache_specs.geometry import Box
from vlmx.errors import DataError, UsageError
from vlmx.evaluate.aggregate import VQA_QUESTIONS
from vlmx.runs import RunFolder

if TYPE_CHECKING:
    from vlmx.evaluate.answers import Header
    from vlmx.evaluate.score import Grade

_ID = re.compile(r"[0-9a-f]{64}")
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Region:
    """What is looked at, in which photo.

    Attributes:
        image: image id.
        box: x1 y1 x2 y2 in pixels of the photo.
        source_wh: width and height of the photo; None if nobody has said it yet.
        title: for the figure.
        photo: bytes of the photo; None if it is not at hand.
        answers: by run name its cache and its answer; empty without a run.
    """

    image: str
    box: Box
    source_wh: tuple[int, int] | None
    title: str
    photo: bytes | None = None
    answers: tuple[tuple[str, str, Grade], ...] = ()


def region_of_key(image: str, dataset: str | None, box_text: str, *, caches: str, data_root: Path) -> Region:
    """The box "x,y,w,h" of the image of that id or key.

    Raises:
        UsageError: it is not a box.
        DataError: no data set has the image, or several mean different images by its key.
    """
    box = parse_xywh(box_text)
    image_id, source_wh, found_in = find_image(image, dataset, caches)
    title = f"image {image[:12]}" if _ID.fullmatch(image) else image
    return Region(
        image=image_id, box=box, source_wh=source_wh, title=title, photo=own_photo(image, found_in, data_root)
    )


def parse_xywh(text: str) -> Box:
    """ "x,y,w,h" as x1 y1 x2 y2.

    Raises:
        UsageError: it is not four numbers.
    """
    try:
        x, y, width, height = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"--box {text} is not a box", fix="give four numbers, x,y,w,h, in pixels of the photo, without spaces"
        ) from None
    return (x, y, x + width, y + height)


def find_image(image: str, dataset: str | None, caches: str) -> tuple[str, tuple[int, int] | None, str]:
    """Id, size and data set of an image, from the tables below the caches.

    Args:
        image: an image id, or a key.
        dataset: the data set of the key; None to look in all.
        caches: folder or url of all caches.

    Returns:
        The id, width and height if a table knows them, and the name of that data set, "" if there is none.

    Raises:
        DataError: no data set has it, or several mean different images by it.
    """
    from vlmx.cache_specs.ids import ImageTable, table_names
    from vlmx.cache_specs.places import place_of

    names = [dataset] if dataset else table_names(place_of(caches))
    is_id = bool(_ID.fullmatch(image))
    found: dict[str, tuple[tuple[int, int], str]] = {}
    for name in names:
        known = ImageTable.open(caches, name)
        if is_id:
            usable = set(known.keys()) - set(known.failed())
            keys = [key for key in sorted(usable) if known.id_of(key) == image][:1]
        else:
            keys = [image] if image in known or dataset else []
        for key in keys:
            found.setdefault(known.id_of(key), (known.source_wh(key), name))
    if len(found) > 1:
        where = ", ".join(name for _, name in found.values())
        raise DataError(f"'{image}' is another image in each of {where}", fix="say which one with --data")
    if found:
        ((image_id, (source_wh, name)),) = found.items()
        return image_id, source_wh, name
    if is_id:
        return image, None, ""
    raise DataError(
        f"no data set below {caches} has an image '{image}'",
        why=f"looked in {', '.join(names)}" if names else "there are no data sets",
        fix="give its key as the data set has it, or its id of 64 hex digits",
    )


def own_photo(key: str, dataset: str, data_root: Path) -> bytes | None:
    """The photo where it is at hand without being named: drawn by the mini study, or below the data root."""
    from vlmx.data.benchmarks import MINI
    from vlmx.data.mini.study import image_bytes_of

    if dataset == MINI and not _ID.fullmatch(key):
        return image_bytes_of(key)
    path = data_root / key
    return path.read_bytes() if path.is_file() else None


def region_of_question(
    runs: Sequence[RunFolder],
    wanted: str,
    caches: str,
    *,
    data_root: Path | None = None,
    benchmark: str | None = None,
) -> Region:
    """The box that a question asks for, with what each run answered.

    Args:
        runs: evaluated runs.
        wanted: a question's id, or a part of its text.
        caches: folder or url of all caches.
        data_root: where published benchmarks and their photos lie; None: where they were when the run was answered.
        benchmark: the question's; None to look in all.

    Raises:
        UsageError: no box question of a run is like that, or several are, or the benchmark has no boxes.
        DataError: the files of a benchmark are missing or damaged.
    """
    from vlmx.cache_specs.ids import ImageTable
    from vlmx.data.benchmarks import BENCHMARKS
    from vlmx.data.mini.questions import BOX_REQUEST
    from vlmx.data.published import DATA_ROOT
    from vlmx.evaluate.compare import SAME_FILES, is_same, key_of

    found = [_answer(run, wanted, benchmark, data_root) for run in runs]
    asked = found[0][1].question
    meant = dict.fromkeys(key_of(grade.question) for _, grade in found)
    if len(meant) > 1:
        names = ", ".join(f"{name} of {of}" for of, name in meant)
        raise UsageError(f"'{wanted}' is another question in each run", why=names, fix="give its id, and --bench NAME")
    if not all(is_same(asked, grade.question) for _, grade in found):
        raise UsageError(
            f"'{wanted}' is not the same question in each run",
            why="; ".join(f"{run.name}: {_phrase(grade)}" for run, (_, grade) in zip(runs, found, strict=True)),
            fix=f"name one run alone, or {SAME_FILES}",
        )
    answers = [(run.name, header.cache, grade) for run, (header, grade) in zip(runs, found, strict=True)]
    root = data_root or Path(found[0][0].data_root or DATA_ROOT)
    box, source_wh = asked.region
    dataset = BENCHMARKS.get(asked.benchmark).table
    return Region(
        image=ImageTable.open(caches, dataset).id_of(asked.image),
        box=box,
        source_wh=source_wh,
        title=asked.prompt.removeprefix(BOX_REQUEST).strip(),
        photo=own_photo(asked.image, dataset, root),
        answers=tuple(answers),
    )


def _answer(run: RunFolder, wanted: str, benchmark: str | None, data_root: Path | None) -> tuple[Header, Grade]:
    """What a run's answers were made with, and its answer to the one box question that is meant."""
    from vlmx.evaluate.answers import answered_benchmarks
    from vlmx.evaluate.score import grades_of_run

    benchmarks = _box_benchmarks(run, answered_benchmarks(run, "none"), benchmark)
    graded = [grades_of_run(run, name, "none", data_root=data_root) for name in benchmarks]
    asked = [(header, grade) for header, grades in graded for grade in grades if grade.question.kind == "box"]
    exact = [(header, grade) for header, grade in asked if grade.question.id == wanted]
    found = exact or [(h, grade) for h, grade in asked if wanted.casefold() in grade.question.prompt.casefold()]
    if not found:
        raise UsageError(
            f"run '{run.name}' has answered no box question like '{wanted}'",
            why=f"it has answers to {len(asked):,} box questions",
            fix="give a question's id as in answers.jsonl, or a part of its text",
        )
    if len(found) > 1:
        names = ", ".join(dict.fromkeys(header.benchmark for header, _ in found))
        few = "; ".join(f"{header.benchmark} {grade.question.id}: {_phrase(grade)}" for header, grade in found[:_SHOWN])
        fixes = [
            *(["say which benchmark with --bench NAME"] if len({header.benchmark for header, _ in found}) > 1 else []),
            *([] if exact else ["give the id of one of them, or more of its text"]),
        ]
        raise UsageError(
            f"'{wanted}' is in {len(found)} questions of {names}",
            why=few,
            fix=", and ".join(fixes),
        )
    return found[0]


def _phrase(grade: Grade) -> str:
    return grade.question.prompt.partition(": ")[2]


def _box_benchmarks(run: RunFolder, answered: Sequence[str], wanted: str | None) -> list[str]:
    """Those of the answered benchmarks in which the question may be; reading the others would only take time."""
    from vlmx.data.benchmarks import expand

    if wanted is None:
        return [name for name in answered if name not in VQA_QUESTIONS]
    names = expand(wanted)
    there = [name for name in answered if name in names]
    if not there:
        raise UsageError(
            f"run '{run.name}' has no answers to '{wanted}'", why=f"it has answered {', '.join(answered) or 'nothing'}"
        )
    return there


def source_wh_of(region: Region, photo_wh: tuple[int, int] | None, size: str | None) -> tuple[int, int]:
    """Width and height of the photo, from whoever knows them.

    Raises:
        UsageError: nobody knows, two do not agree, or `size` is not WxH.
    """
    said: dict[str, tuple[int, int]] = {}
    if region.source_wh is not None:
        said["the data set"] = region.source_wh
    if photo_wh is not None:
        said["the photo"] = photo_wh
    if size is not None:
        match = re.fullmatch(r"(\d+)x(\d+)", size)
        if match is None or not all(map(int, match.groups())):
            raise UsageError(f"--size {size} is not a size", fix="give width x height in pixels, e.g. 640x480")
        said["--size"] = (int(match[1]), int(match[2]))
    if not said:
        raise UsageError(
            "the size of the photo is not known, so its box has no place",
            why="no data set below the caches has this image",
            fix="give --size WxH, or --photo FILE",
        )
    if len(set(said.values())) > 1:
        raise UsageError(
            "the sizes of the photo do not agree",
            why=", ".join(f"{who}: {width} x {height}" for who, (width, height) in said.items()),
            fix="check that --photo and --size are of this image",
        )
    return next(iter(said.values()))
