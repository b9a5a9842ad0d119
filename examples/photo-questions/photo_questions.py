"""Which questions do the boxes of a folder of photos answer? What is there, how many, left or right, and where.

Photos with boxes as YOLO writes them (`images/`, `labels/`, `classes.yaml`) become conversations to train on and
questions to ask about other photos. All of it is derived from the boxes, so scores have no published counterpart.

    data/photos/{images,labels,classes.yaml}      the photos, below the data root
    python photo_questions.py data train.json     conversations about the photos that are not held out
    vlmx eval --run RUN --bench derived-presence  questions about those that are
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml
from PIL import Image

from vlmx.cache_specs.geometry import Geometry, convert_box
from vlmx.data.benchmarks import Benchmark
from vlmx.data.records import Box, Question
from vlmx.data.wording import Wording

FOLDER = "photos"
HELD_OUT = 0.3
TURNS = 8  # of one conversation, at most
MANY = 4
GROUPS = {  # as they are asked for -> COCO's classes, by their numbers
    "a person": range(0, 1),
    "a vehicle": range(1, 9),
    "an animal": range(14, 24),
    "food": range(46, 56),
    "furniture": range(56, 62),
    "tableware": range(39, 46),
    "sports equipment": range(29, 39),
}
SQUARE = Geometry(mode="letterbox", height=224, width=224, fill=(127, 127, 127))  # boxes are parts of the padded square


@dataclass(frozen=True, kw_only=True)
class Photo:
    """One photo: its file name, width and height in pixels, and (class number, box in pixels) of its objects."""

    name: str
    wh: tuple[int, int]
    objects: tuple[tuple[int, Box], ...]

    def single(self) -> dict[int, Box]:
        """The boxes of the classes of which there is just one object."""
        times = Counter(number for number, _ in self.objects)
        return {number: box for number, box in self.objects if times[number] == 1}


def read_photos(root: Path, *, held_out: bool) -> list[Photo]:
    """The photos below a data root that are held out, or the others; which ones follows from their names alone."""
    folder = root / FOLDER
    paths = sorted((folder / "images").iterdir(), key=lambda path: _digest(path.name))
    count = round(HELD_OUT * len(paths))
    return [_photo(path, folder / "labels") for path in (paths[:count] if held_out else paths[count:])]


def _photo(path: Path, labels: Path) -> Photo:
    with Image.open(path) as image:
        width, height = image.size
    objects = []
    for line in (labels / f"{path.stem}.txt").read_text().splitlines():
        number, x, y, w, h = line.split()
        left, top = (float(x) - float(w) / 2) * width, (float(y) - float(h) / 2) * height
        objects.append((int(number), (left, top, left + float(w) * width, top + float(h) * height)))
    return Photo(name=path.name, wh=(width, height), objects=tuple(objects))


def presence(photos: Sequence[Photo], names: dict[int, str]) -> list[Question]:
    """Of each group as many photos with it as without, so that nobody who is blind gets more than half."""
    questions = []
    for group, numbers in GROUPS.items():
        has = {photo.name: any(number in numbers for number, _ in photo.objects) for photo in photos}
        order = sorted(photos, key=lambda photo: _digest(group + photo.name))
        count = min(sum(has.values()), len(photos) - sum(has.values()))
        for answer, wanted in (("yes", True), ("no", False)):
            chosen = [photo for photo in order if has[photo.name] == wanted][:count]
            questions += [_text("presence", p, f"Is there {group} in the photo?", answer, group) for p in chosen]
    return questions


def count(photos: Sequence[Photo], names: dict[int, str]) -> list[Question]:
    """How many people, with one answer for all numbers from MANY."""
    questions = []
    for photo in photos:
        people = sum(names[number] == "person" for number, _ in photo.objects)
        answer = str(people) if people < MANY else "many"
        questions.append(_text("count", photo, "How many people are in the photo?", answer, "people"))
    return questions


def left(photos: Sequence[Photo], names: dict[int, str]) -> list[Question]:
    """Which of two objects is on the left; each pair is asked about both ways, so half of the answers are yes."""
    questions = []
    for photo in photos:
        middles = {names[number]: (box[0] + box[2]) / 2 for number, box in photo.single().items()}
        pairs = [(a, b) for a in middles for b in middles if middles[b] - middles[a] > 0.15 * photo.wh[0]]
        for a, b in sorted(pairs, key=lambda pair: _digest(photo.name + "".join(pair)))[:1]:
            for one, other, answer in ((a, b, "yes"), (b, a, "no")):
                prompt = f"Is the {one} to the left of the {other}?"
                questions.append(_text("left", photo, prompt, answer, "left"))
    return questions


def box(photos: Sequence[Photo], names: dict[int, str]) -> list[Question]:
    """Where the one object of its class is, if it takes a twentieth of the photo or more."""
    questions = []
    for photo in photos:
        least = photo.wh[0] * photo.wh[1] / 20
        large = {n: b for n, b in photo.single().items() if (b[2] - b[0]) * (b[3] - b[1]) >= least}
        for number in sorted(large, key=lambda number: _digest(photo.name + names[number]))[:1]:
            questions.append(
                Question(
                    id=f"{photo.name}/{names[number]}",
                    benchmark="derived-box",
                    image=photo.name,
                    prompt="Please provide the bounding box coordinate of the region this sentence describes: "
                    f"the {names[number]}",
                    kind="box",
                    question_type="box",
                    box=large[number],
                    image_wh=photo.wh,
                    object_boxes=tuple(b for _, b in photo.objects),
                )
            )
    return questions


def _text(kind: str, photo: Photo, prompt: str, answer: str, question_type: str) -> Question:
    return Question(
        id=f"{photo.name}/{prompt}",
        benchmark=f"derived-{kind}",
        image=photo.name,
        prompt=prompt,
        kind="text",
        question_type=question_type,
        answers=(answer,),
    )


Kind = Callable[[Sequence[Photo], dict[int, str]], list[Question]]
KINDS: tuple[Kind, ...] = (presence, count, left, box)


def _load(kind: Kind, root: Path, _wording: Wording, *, held_out: bool = True) -> list[Question]:
    names = yaml.safe_load((root / FOLDER / "classes.yaml").read_text())["names"]
    return kind(read_photos(root, held_out=held_out), names)


PRESENCE, COUNT, LEFT, BOX = (
    Benchmark(
        name=f"derived-{kind.__name__}",
        title=f"derived from boxes, {kind.__name__}, held-out photos",
        table=FOLDER,
        load=partial(_load, kind),
    )
    for kind in KINDS
)


def conversations(root: Path) -> list[dict[str, object]]:
    """What there is to learn from the photos that are not held out, as rows of a LLaVA-style list."""
    questions = [question for kind in KINDS for question in _load(kind, root, "default", held_out=False)]
    by_photo: dict[str, list[Question]] = {}
    for question in sorted(questions, key=lambda question: _digest(question.id)):
        by_photo.setdefault(question.image, []).append(question)
    rows: list[dict[str, object]] = []
    for name, asked in by_photo.items():
        for start in range(0, len(asked), TURNS):
            part = asked[start : start + TURNS]
            messages = [message for q in part for message in (("human", f"<image>\n{q.prompt}"), ("gpt", _answer(q)))]
            turns = [{"from": role, "value": text} for role, text in messages]
            rows.append({"id": f"{name}-{start // TURNS}", "image": name, "conversations": turns})
    return rows


def _answer(question: Question) -> str:
    if question.kind == "text":
        return question.answers[0]
    square = convert_box(*question.region[:1], SQUARE, question.region[1], "source", "padded_unit")
    return "[" + ", ".join(f"{min(max(edge, 0.0), 1.0):.2f}" for edge in square) + "]"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(conversations(Path(sys.argv[1])), indent=1))
