"""Does the model learn to see while it trains? A few held-out questions before each checkpoint, and the collapse alarm.

The alarm is for what the paper calls localization collapse (section 4.4.2): text answers get better while boxes stay
where guessing leaves them. Its two stabilizations are the 3-layer connector and square 512 x 512 input.

The numbers are for watching, not for reporting: a text answer counts when it equals an accepted one, a box when it
overlaps the true one by half (IoU). `vlmx eval` and `vlmx score` follow the benchmarks' own rules.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.fsdp import register_fsdp_forward_method

from vlmx.cache_specs.geometry import Geometry, convert_box
from vlmx.cache_specs.ids import ImageTable, table_key
from vlmx.cache_specs.token_source import TokenSource, extract_commands
from vlmx.data.benchmarks import BENCHMARKS, expand, load_benchmark
from vlmx.data.published import DATA_ROOT
from vlmx.data.records import Box, Question
from vlmx.errors import DataError, UsageError
from vlmx.models.prompts import Prompt
from vlmx.models.vlm import VLM
from vlmx.runs import RunFolder
from vlmx.train.parallel import World, compute_in
from vlmx.train.settings import Precision, TrainConfig

MAX_NEW_TOKENS = 48
BATCH = 16
EVALUATIONS_BEFORE_ALARM = 3


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Held-out accuracy after some steps, 0..1.

    Attributes:
        text, texts: of the text questions, and their number.
        box, boxes: of the box questions, and their number.
        box_chance: what the same boxes would get as answers to each other's questions.
    """

    text: float
    texts: int
    box: float
    boxes: int
    box_chance: float

    @property
    def mean(self) -> float:
        """Over both kinds, each the same, as far as there are questions of it."""
        parts = [value for value, count in ((self.text, self.texts), (self.box, self.boxes)) if count]
        return sum(parts) / len(parts)

    @property
    def numbers(self) -> dict[str, float]:
        """What is logged of it: only of kinds of which there are questions, and no chance among one box."""
        numbers = {"text_accuracy": self.text} if self.texts else {}
        numbers |= {"box_accuracy": self.box} if self.boxes else {}
        return numbers | ({"box_chance": self.box_chance} if self.boxes > 1 else {})


class Watch:
    """A few questions of each benchmark, and the tokens of their images.

    Attributes:
        questions: in the order in which they are answered.
        digest: of the questions, to see whether two looks were at the same ones.

    Args:
        config: of the training.
        reader: where the training's tokens come from.

    Raises:
        UnknownNameError: no such benchmark.
        UsageError: there are no checkpoints before which questions could be answered.
        DataError: a benchmark's files are missing, or its images were never extracted.
        CacheError: the cache lacks images of the questions.
    """

    def __init__(self, config: TrainConfig, reader: TokenSource) -> None:
        self.reader = reader
        self.questions: list[Question] = []
        self.image_ids: dict[str, str] = {}
        root = config.watch.data_root
        for name in watched(config):
            some = sorted(_load(name, root), key=lambda q: hashlib.sha256(q.id.encode()).hexdigest())
            some = some[: config.watch.limit]
            dataset = BENCHMARKS.get(name).table
            table = _table(reader, dataset, root)
            ids = {q.image: table.id_of(q.image) for q in some}
            reader.require(
                {image: key for key, image in ids.items()},
                data=_as_data(dataset, root),
            )
            self.questions += some
            self.image_ids |= ids
        self.questions.sort(key=lambda q: (len(q.prompt), q.id))  # prompts of equal length are decoded together
        self.digest = hashlib.sha256("\n".join(f"{q.benchmark} {q.id}" for q in self.questions).encode()).hexdigest()

    def look(self, vlm: VLM, prompt: Prompt, world: World, precision: Precision) -> Seen:
        """Answer all questions; every process does, with the same result, and the model is left in training mode."""
        texts: list[str] = []
        if world.distributed:  # so that it gathers the parameters that no layer owns, as `forward` does
            register_fsdp_forward_method(vlm, "generate")
        vlm.eval()
        for start in range(0, len(self.questions), BATCH):
            part = self.questions[start : start + BATCH]
            visual_BND = torch.from_numpy(self.reader.read_float32([self.image_ids[q.image] for q in part]))
            prompts_ids = [prompt.encode_question(q.prompt) for q in part]
            with compute_in(precision, world):
                answers = vlm.generate(visual_BND.to(world.device), prompts_ids, MAX_NEW_TOKENS)
            texts += [prompt.decode(ids) for ids in answers]
        vlm.train()
        return score(self.questions, texts, self.reader.spec.geometry)

    def recall(self, run: RunFolder, start: int) -> list[Seen]:
        """The looks of a run that goes on after `start` steps, as far as they were at these questions; from here on the
        run's status tells which ones are.

        Raises:
            RunError: metrics.jsonl is damaged.
            OutOfSpaceError: the disk is full.
        """
        known = run.status.get("held_out", {})
        since = min(start, known["since_step"]) if known.get("questions") == self.digest else start
        run.set_status("running", held_out={"questions": self.digest, "since_step": since})
        return [
            self._seen(line)
            for line in run.metrics()
            if since < line["step"] <= start and ("text_accuracy" in line or "box_accuracy" in line)
        ]

    def _seen(self, line: Mapping[str, float]) -> Seen:
        """A look as it was logged."""
        texts = sum(q.kind == "text" for q in self.questions)
        return Seen(
            text=line.get("text_accuracy", 0.0),
            texts=texts,
            box=line.get("box_accuracy", 0.0),
            boxes=len(self.questions) - texts,
            box_chance=line.get("box_chance", 0.0),
        )


def _as_data(dataset: str, root: str) -> str:
    """A data set as `vlmx extract --data` takes it."""
    return dataset if root == DATA_ROOT else f"{dataset} --data-root {root}"


def _table(reader: TokenSource, dataset: str, root: str) -> ImageTable:
    if reader.parts and not reader.root.exists(table_key(dataset)):
        raise DataError(
            f"the images of the held-out questions, '{dataset}', were never extracted",
            why=f"{reader.root} has no image table of them",
            fix=extract_commands(reader.parts, _as_data(dataset, root)),
        )
    return ImageTable.open(reader.root, dataset)


def _load(name: str, root: str) -> list[Question]:
    try:
        return load_benchmark(name, root=root)
    except DataError as error:  # its fix is for commands that have --data-root
        fix = error.fix.replace("--data-root", "watch.data_root=FOLDER")
        raise DataError(error.what, why=error.why, fix=fix) from error


def watched(config: TrainConfig) -> list[str]:
    """The benchmarks that are answered while a training runs; none unless it is set so.

    Raises:
        UnknownNameError: one of them does not exist.
        UsageError: there are no checkpoints before which questions could be answered.
    """
    if config.watch.benchmarks is None:
        return []
    if not config.checkpoint.every_steps:
        raise UsageError(
            f"watch.benchmarks={config.watch.benchmarks} would never be answered",
            why="they are answered before each checkpoint, and checkpoint.every_steps is 0",
            fix="set checkpoint.every_steps, or leave watch.benchmarks out",
        )
    return expand(config.watch.benchmarks)


class CollapseAlarm:
    """Says once when text answers get better and boxes do not.

    Args:
        connector, geometry: of the training.
    """

    def __init__(self, *, connector: str, geometry: Geometry) -> None:
        self.connector = connector
        self.geometry = geometry
        self._seen: list[Seen] = []
        self._said = False

    def add(self, seen: Seen) -> str | None:
        """What to tell the user after one more look; None if there is nothing to say.

        Boxes are at chance when they are within two standard errors of it, in this look and in all before; text has
        become better when it is more than two above the first look. Three looks are waited for.
        """
        self._seen.append(seen)
        first = self._seen[0]
        if self._said or len(self._seen) < EVALUATIONS_BEFORE_ALARM or not (seen.boxes and seen.texts):
            return None
        at_chance = all(s.box - s.box_chance <= 2 * _error(s.box, s.boxes) for s in self._seen)
        better = seen.text - first.text > 2 * _error(seen.text, seen.texts)
        if not (at_chance and better):
            return None
        self._said = True
        help_ = []
        if self.connector != "mlp3":
            help_.append("connector=mlp3")
        if (self.geometry.height, self.geometry.width) != (512, 512):
            help_.append("a cache at --res 512 (square, 512 x 512)")
        return (
            f"localization collapse: text answers went from {first.text:.0%} to {seen.text:.0%}, but boxes are right in"
            f" {seen.box:.0%}, where guessing gives {seen.box_chance:.0%}. What helped in the paper (section 4.4.2): "
            + (" and ".join(help_) or "nothing beyond what this run has already")
        )


def score(questions: Sequence[Question], texts: Sequence[str], geometry: Geometry) -> Seen:
    """Accuracy of answers."""
    right = [
        _plain(text) in {_plain(answer) for answer in q.answers}
        for q, text in zip(questions, texts, strict=True)
        if q.kind == "text"
    ]
    pairs = [(q, _box_of(text)) for q, text in zip(questions, texts, strict=True) if q.kind == "box"]
    truths = []
    for question, _ in pairs:
        truth, image_wh = question.region
        truths.append(convert_box(truth, geometry, image_wh, "source", "padded_unit"))
    hits = [[box is not None and _iou(box, truth) >= 0.5 for truth in truths] for _, box in pairs]
    own = sum(row[number] for number, row in enumerate(hits))
    others = sum(map(sum, hits)) - own
    boxes = len(pairs)
    return Seen(
        text=sum(right) / max(1, len(right)),
        texts=len(right),
        box=own / max(1, boxes),
        boxes=boxes,
        box_chance=others / max(1, boxes * (boxes - 1)),
    )


def _error(accuracy: float, count: int) -> float:
    """The standard error of an accuracy, which is not taken to be 0 or 1 (one right and one wrong are added)."""
    p = (accuracy * count + 1) / (count + 2)
    return math.sqrt(p * (1 - p) / count)


def _plain(text: str) -> str:
    return text.strip().rstrip(".").lower()


def _box_of(text: str) -> Box | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if not (isinstance(value, list) and len(value) == 4 and all(isinstance(edge, int | float) for edge in value)):
        return None
    return (float(value[0]), float(value[1]), float(value[2]), float(value[3]))


def _iou(box: Box, other: Box) -> float:
    width, height = (min(box[k + 2], other[k + 2]) - max(box[k], other[k]) for k in (0, 1))
    if width <= 0 or height <= 0:
        return 0.0
    areas = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other))
    return width * height / (areas - width * height)
