"""Which conversations and questions make up the mini study? Its train and test splits, as the project's records."""

from __future__ import annotations

from typing import Literal, get_args

from vlmx.data.mini.dice import Dice
from vlmx.data.mini.questions import Asked, Group, ask
from vlmx.data.mini.render import image_bytes
from vlmx.data.mini.scenes import IMAGE_PX, Scene, sample_scene, scene_of
from vlmx.data.records import Conversation, Question, Turn
from vlmx.registry import unknown_name

TRAIN_SCENES = 4000
TEST_SCENES = 800
TURNS = 8
CLUTTER_QUESTIONS = 4  # a bin; every other scene gets one question of each other benchmark

BENCHMARKS: tuple[Group, ...] = get_args(Group)
BOX_BENCHMARKS: tuple[Group, ...] = ("mini-ref", "mini-ref-plain", "mini-ref-phrase", "mini-ref-clutter")
VQA_BENCHMARKS: tuple[Group, ...] = tuple(name for name in BENCHMARKS if name not in BOX_BENCHMARKS)


def scene_keys(split: Literal["train", "test"]) -> list[str]:
    """Keys of all images of a split, in order."""
    count = TRAIN_SCENES if split == "train" else TEST_SCENES
    return [f"{split}/{index:06d}" for index in range(count)]


def image_bytes_of(key: str) -> bytes:
    """The image file (binary PPM) of a scene key such as "train/000123"."""
    return image_bytes(scene_of(key))


def turns_of(scene: Scene, dice: Dice) -> tuple[Asked, ...]:
    """Up to TURNS different questions about a scene: one of each group that fits, then more boxes."""
    groups: list[Group] = [name for name in BENCHMARKS if name != "mini-ref-clutter"]
    groups = ["mini-ref-clutter"] * TURNS if scene.cluttered else groups
    more: tuple[Group, ...] = ("mini-ref-clutter",) if scene.cluttered else BOX_BENCHMARKS[:3]
    asked: dict[str, Asked] = {}
    for group in [*groups, *(dice.pick(more) for _ in range(TURNS))]:
        new = ask(scene, group, dice)
        if new is not None and len(asked) < TURNS:
            asked.setdefault(new.prompt, new)
    return tuple(dice.shuffled(list(asked.values())))


def conversations() -> list[Conversation]:
    """The train split: one conversation a scene; its turns do not refer to each other."""
    result = []
    for key in scene_keys("train"):
        turns = turns_of(scene_of(key), Dice(f"vlmx mini turns:{key}"))
        result.append(
            Conversation(id=key, image=key, turns=tuple(Turn(question=t.prompt, answer=t.answer) for t in turns))
        )
    return result


def questions(benchmark: str) -> list[Question]:
    """The held-out questions of one of BENCHMARKS, in order.

    Raises:
        UnknownNameError: no such benchmark.
    """
    group = next((name for name in BENCHMARKS if name == benchmark), None)
    if group is None:
        raise unknown_name("benchmark of the mini study", benchmark, BENCHMARKS)
    result: list[Question] = []
    for index in range(TEST_SCENES):
        scene = sample_scene("test", index)
        if scene.cluttered != (group == "mini-ref-clutter"):
            continue
        dice = Dice(f"vlmx mini question:{group}:{scene.key}")
        drawn = [ask(scene, group, dice) for _ in range(CLUTTER_QUESTIONS if scene.cluttered else 1)]
        different = {asked.prompt: asked for asked in drawn if asked is not None}
        for number, asked in enumerate(different.values()):
            result.append(_record(scene, asked, number))
    return result


def _record(scene: Scene, asked: Asked, number: int) -> Question:
    boxes = tuple((float(x1), float(y1), float(x2), float(y2)) for x1, y1, x2, y2 in (t.box for t in scene.objects))
    target = next((box for box, t in zip(boxes, scene.objects, strict=True) if t.box == asked.box), None)
    return Question(
        id=f"{asked.group}/{scene.key}/{number}",
        benchmark=asked.group,
        image=scene.key,
        prompt=asked.prompt,
        kind="text" if target is None else "box",
        question_type=asked.type,
        answers=(asked.answer,) if target is None else (),
        box=target,
        image_wh=(IMAGE_PX, IMAGE_PX),
        object_boxes=boxes,
    )
